"""Command-line options of everything that asks a model: which engine, how to ask and how to sample."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from recipe.cello1.engines.protocol import DECODINGS, Decoding, Sampling
from recipe.cello1.engines.start import ENGINES
from recipe.cello1.task.prompt import LAYOUTS, VARIANTS

READ_OUT = ("matrix", "soft")  # ways of decoding that average over samples
# Of a read-out: as many as take a fifth of the tokens of a vote of eight. `benchmarks/bench_voting.py` compares them.
SAMPLES = 3
_LORA = ("--lora", str, "folder of a LoRA adapter")
_DTYPE = ("--dtype", str, "number format; default: the model's own, float32 on CPUs without bfloat16")
_MAX_LEN = ("--max-model-len", int, "longest prompt and answer together, in tokens")
# Options of each engine, under the names its class has for them; bool is a switch.
_ENGINE_FLAGS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "vllm": (
        _MAX_LEN,
        ("--tensor-parallel-size", int, "GPUs that share each layer"),
        ("--max-num-seqs", int, "most answers generated at a time"),
        ("--gpu-memory-utilization", float, "share of the GPU's memory to use"),
        _DTYPE,
        _LORA,
    ),
    "openai": (
        ("--base-url", str, "address of the API (default: OPENAI_BASE_URL); the key comes from OPENAI_API_KEY"),
        ("--concurrency", int, "requests in flight at a time (default 32)"),
        ("--timeout", float, "seconds to wait for one answer (default 1200)"),
        ("--retries", int, "how often to try again (default 6)"),
        ("--longest-wait", float, "most seconds to wait when the server asks for it (default 600)"),
        (
            "--server",
            str,
            "vllm, other or auto: how to ask for --decode constrained (default auto: asks the server)",
        ),
        ("--think-opened", bool, "the server's chat template ends with <think>, which its answers then lack"),
    ),
    "transformers": (_MAX_LEN, _DTYPE, _LORA, ("--batch-size", int, "answers made together (default 16)")),
}


def add_sampling(
    parser: argparse.ArgumentParser, *, temperature: float | None = None, max_tokens: int = 2048
) -> argparse._ArgumentGroup:
    """Add the options of what is asked and how that go with any use of a model."""
    group = parser.add_argument_group("prompt and sampling")
    group.add_argument("--prompt-layout", choices=LAYOUTS, help="default: the one that RL data names, else system")
    group.add_argument("--variant", choices=sorted(VARIANTS), help="default: the one that RL data names, else batch")
    usual = "0, which is greedy; with --decode soft 1" if temperature is None else f"{temperature:g}"
    group.add_argument("--temperature", type=float, default=temperature, help=f"default {usual}")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="longest answer (default %(default)s)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--limit", type=int, help="only the first LIMIT puzzles")
    return group


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Add the options of prompt and sampling, with those for predictions."""
    group = add_sampling(parser)
    group.add_argument("--samples", type=int, help=f"answers for each puzzle (default 1; of a read-out {SAMPLES})")
    group.add_argument("--logprobs", action="store_true", help="record the log-probability of each answer")
    group.add_argument(
        "--decode",
        choices=DECODINGS,
        help="free: as the model answers | constrained (default, on a server only if asked for): only legal one-to-one "
        "matchings can be answered | matrix: each cell's probabilities are read out and matched, from --samples pieces "
        "of evidence for it | soft: the probabilities in each slot of --samples answers are averaged and matched",
    )
    for name, decoding in (("--constrain", "constrained"), ("--free", "free")):
        group.add_argument(
            name, dest="decode", action="store_const", const=decoding, help=f"the same as --decode {decoding}"
        )
    group.add_argument("--reasoning-budget", type=int, help="with --decode constrained: most tokens of reasoning")


def add_engines(parser: argparse.ArgumentParser) -> None:
    """Add model, engine and the options of every engine."""
    parser.add_argument("--model", "--llm_name", required=True, help="model folder or name")
    parser.add_argument("--engine", default="vllm", choices=sorted(ENGINES))
    parser.add_argument("--num-engines", type=int, default=1, help="engines side by side, as Ray actors (default 1)")
    _add_flags(parser, *_ENGINE_FLAGS)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model on a server, which answers freely."""
    parser.add_argument("--model", required=True, help="name of the model on the server")
    _add_flags(parser, "openai", without=("--server",))  # it only decides how answers are constrained
    parser.set_defaults(engine="openai", decode="free", logprobs=False, reasoning_budget=None)


def _add_flags(parser: argparse.ArgumentParser, *engines: str, without: Sequence[str] = ()) -> None:
    known = set(without)
    for engine in engines:
        group = parser.add_argument_group(f"engine {engine}")
        for flag, kind, text in _ENGINE_FLAGS[engine]:
            if flag not in known:  # shared by several engines: shown with the first
                known.add(flag)
                how: dict[str, Any] = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
                group.add_argument(flag, help=text, **how)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Collect the options of sampling, and check those of what is asked."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit must be at least 1, got {args.limit}")
    if args.reasoning_budget is not None and not _to_constrain(args):
        raise ValueError("reasoning_budget needs decode='constrained'")
    temperature, _ = sampling_defaults(args.decode, args.temperature, getattr(args, "samples", None))
    return Sampling(temperature, args.top_p, args.max_tokens, args.logprobs, args.reasoning_budget)


def sampling_defaults(decode: Decoding | None, temperature: float | None, samples: int | None) -> tuple[float, int]:
    """Fill in temperature and number of samples: a read-out averages a few samples, else there is one greedy answer."""
    # Samples for matrix differ by the order of the other cells; those for soft by chance only.
    if temperature is None:
        temperature = 1.0 if decode == "soft" and samples != 1 else 0.0
    several = decode == "matrix" or (decode == "soft" and temperature > 0)
    return temperature, (SAMPLES if several else 1) if samples is None else samples


def _to_constrain(args: argparse.Namespace) -> bool:
    """Whether the engine must be able to; a server tells too late that it cannot."""
    return args.decode == "constrained" or (args.decode in (None, "soft") and args.engine != "openai")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the options of the engine."""
    own = {flag for flag, *_ in _ENGINE_FLAGS[args.engine]}
    options: dict[str, Any] = {"constrained": True} if _to_constrain(args) else {}
    for flag in dict.fromkeys(flag for flags in _ENGINE_FLAGS.values() for flag, *_ in flags):
        name = flag[2:].replace("-", "_")
        if (value := getattr(args, name, None)) is not None:
            if flag not in own:
                raise ValueError(f"{name} does not apply to the engine {args.engine}")
            options[name] = value
    return options
