"""How fast puzzles are answered: this project's vLLM path against the published way, and what the constraint costs.

``python benchmarks/bench_predict.py`` makes a model of the embedded default's size with random weights and 64 puzzles
(``--model`` and ``--data`` take others), and answers them in one process

- as published: a transformers text-generation pipeline, one puzzle after the other;
- with :func:`recipe.cello1.inference.predict.predict` on vLLM, free and constrained, into a prediction file.

All of them greedy and with the same limit of tokens, after a first puzzle each that is not timed; engine starts are
timed apart. Random weights never end a turn, so that free answers have as many tokens everywhere. The constrained ones
stop where the answer ends; the constraint is therefore judged by the time its logits processor takes of each step
("constraint" is that time over the rest), not by comparing two runs. A line of its own says what it takes of a token
with a vocabulary of real size and 60 candidates, on the CPU and without a model.

Exit code 1: less than ten times as fast as published, or more than 5% of the time for the constraint.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rows import Row, finish, lacking, machine, not_run, software
from tqdm import tqdm

from recipe.cello1.cold_start.tiny_model import build_model, build_tokenizer
from recipe.cello1.engines.constrained import Cursor, Vocabulary, mask_logits, matching_for
from recipe.cello1.engines.protocol import Decoding, Engine, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.predictions import read_predictions
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer

PACKAGES = ("cello1", "torch", "transformers", "vllm")
TIMES_AS_FAST = 10
CONSTRAINT_SHARE = 0.05
LARGE = 150_000  # tokens, about as many as Qwen2.5 has
COLUMNS = ("path", "puzzles", "tokens", "start [s]", "run [s]", "puzzles/s", "tokens/s", "times as fast", "legal")


def make_puzzles(n: int) -> list[Puzzle]:
    """Draw puzzles like those of the embedded default: 3 to 5 cells with 12 genes each."""
    rng = np.random.default_rng(0)
    types = [f"{name} cell" for name in ("B", "NK", "T helper", "T killer", "dendritic", "plasma", "stem", "mast")]
    puzzles = []
    for _ in range(n):
        size = int(rng.integers(3, 6))
        chosen = tuple(types[i] for i in rng.permutation(len(types))[:size])
        cells = tuple(tuple(f"GENE{g}" for g in rng.permutation(300)[:12]) for _ in chosen)
        puzzles.append(Puzzle(cells, tuple(sorted(chosen)), chosen, "The cells are from blood."))
    return puzzles


def make_model(folder: Path, puzzles: Sequence[Puzzle], hidden_size: int, n_layers: int) -> str:
    """Write a model with random weights and a tokenizer for the puzzles."""
    tokenizer = build_tokenizer(puzzles)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "n_layers": n_layers}
    build_model(tokenizer, seed=0, n_heads=hidden_size // 32, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Answered:
    """One line of the table: a way to answer the puzzles."""

    def __init__(self, path: str, puzzles: Sequence[Puzzle], start: float, run: float, found: Sequence[Any]) -> None:
        texts, tokens = [text for text, _ in found], sum(count for _, count in found)
        legal = [
            not score_answer(text, p.answer or p.candidates).reason for text, p in zip(texts, puzzles, strict=True)
        ]
        self.path, self.start, self.run, self.tokens = path, start, run, tokens
        self.n, self.legal, self.texts = len(puzzles), sum(legal), texts

    @property
    def speed(self) -> float:
        """Puzzles a second."""
        return self.n / self.run

    def cells(self, base: Answered) -> list[str]:
        """Return the columns; ``base`` is what the speed is measured by."""
        return [
            self.path,
            str(self.n),
            str(self.tokens),
            f"{self.start:.1f}",
            f"{self.run:.2f}",
            f"{self.speed:.2f}",
            f"{self.tokens / self.run:.0f}",
            f"{self.speed / base.speed:.1f}",
            f"{self.legal}/{self.n}",
        ]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds something takes, and what it returns."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def published(model: str, puzzles: Sequence[Puzzle], max_tokens: int) -> Answered:
    """Answer with a transformers pipeline, one puzzle after the other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging, pipeline

    logging.set_verbosity_error()  # it warns about the published arguments, once a puzzle

    def start() -> Any:
        # bfloat16 as published where the processor has it; emulated it would only be slower.
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False, weights_only=True)
        return pipeline("text-generation", model=loaded, tokenizer=tokenizer)

    seconds, pipe = timed(start)
    pad = pipe.tokenizer.eos_token_id
    generate = pipe.model.generate
    counts: list[int] = []

    def counted(input_ids: Any, **options: Any) -> Any:
        ids = generate(input_ids=input_ids, **options)
        counts.append(ids.shape[1] - input_ids.shape[1])
        return ids

    pipe.model.generate = counted

    def answer(puzzle: Puzzle) -> tuple[str, int]:
        found = pipe(messages(puzzle), max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad)
        return found[0]["generated_text"][-1]["content"], counts[-1]

    with torch.inference_mode():
        answer(puzzles[0])
        run, found = timed(lambda: [answer(puzzle) for puzzle in tqdm(puzzles, desc="as published", unit="item")])
    return Answered("transformers pipeline, one at a time (as published)", puzzles, seconds, run, found)


def ours(
    name: str, engine: Engine, start: float, puzzles: Sequence[Puzzle], out: Path, max_tokens: int, watch: Watch | None
) -> Answered:
    """Answer with ``predict``, constrained if there is a watch for it."""
    decode: Decoding = "free" if watch is None else "constrained"
    sampling = Sampling(max_tokens=max_tokens)
    first = out / f"first-{decode}.jsonl"
    predict(engine, puzzles[:1], first, sampling=sampling, decode=decode, progress=False)
    target = out / f"all-{decode}.jsonl"
    if watch is not None:
        watch.seconds = 0.0
    run, done = timed(lambda: predict(engine, puzzles, target, sampling=sampling, decode=decode))
    if done.failed:
        raise RuntimeError(f"{done.failed} puzzles failed: {dict(done.errors)}")
    records = read_predictions(target)
    return Answered(name, puzzles, start, run, [(record["prediction"], record["tokens"]) for record in records])


class Watch:
    """Measures the time spent in the logits processor, which must run in this process."""

    def __init__(self) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from recipe.cello1.engines.constrained.vllm_processor import MatchingLogitsProcessor

        self.seconds = 0.0
        for name in ("apply", "update_state"):
            setattr(MatchingLogitsProcessor, name, self._timed(getattr(MatchingLogitsProcessor, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return wrapped


def large_vocabulary() -> tuple[float, float, int]:
    """Take the median microseconds that mask and advance take of a token, in the reasoning and in the answer."""
    import torch

    rng = np.random.default_rng(0)
    types = tuple(
        f"{kind} {cell} cell" for kind in map("subset {}".format, range(10)) for cell in "T B NK mast stem fat".split()
    )
    text = " | ".join(types)
    words = rng.integers(97, 123, size=(LARGE, 8), dtype=np.uint8)
    tokens = {bytes((byte,)) for byte in range(256)} | {b" " * (i % 2) + word.tobytes() for i, word in enumerate(words)}
    tokens |= {text[i : i + n].encode() for i in range(len(text)) for n in range(2, 9)}
    vocabulary = Vocabulary([b"", *sorted(tokens)], 0)
    matching = matching_for(vocabulary, types, len(types))
    logits = torch.from_numpy(rng.gumbel(size=(1, len(vocabulary.tokens))).astype(np.float32))
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        cursor = Cursor(matching, matching.reserve + 100, opened=True)
        while not cursor.done:
            shifted = logits.roll(int(rng.integers(logits.shape[1])), dims=1)
            answering = cursor.only() is not None
            began = time.perf_counter()
            mask_logits(shifted, {0: cursor})
            seconds = time.perf_counter() - began
            token = int(shifted.argmax())
            began = time.perf_counter()
            cursor.advance(token)
            spent[answering].append(seconds + time.perf_counter() - began)
    thinking, answering = (float(np.median(seconds)) * 1e6 for seconds in spent)
    return thinking, answering, len(vocabulary.tokens)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(prog="python benchmarks/bench_predict.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; default: one with random weights is made")
    parser.add_argument("--data", type=Path, help="puzzles; default: some are made")
    parser.add_argument("--n", type=int, default=64, help="puzzles (default 64)")
    parser.add_argument("--max-tokens", type=int, default=160, help="longest answer (default 160)")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the random model (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="of the random model (default 4)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if why := lacking("torch", "transformers", "vllm"):
        print(f"bench_predict: not run: {why}", file=sys.stderr)
        return finish([not_run("answer puzzles", why)], args.json)
    puzzles = (load_puzzles(args.data).puzzles if args.data else make_puzzles(args.n))[: args.n]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or make_model(folder / "model", puzzles, args.hidden_size, args.layers)
        rows = [published(model, puzzles, args.max_tokens)]
        options = {"max_num_seqs": max(64, args.n)}
        start, engine = timed(lambda: start_engine("vllm", model, **options))
        with engine:
            rows.append(ours("vLLM, `predict`", engine, start, puzzles, folder, args.max_tokens, None))
        watch = Watch()
        start, engine = timed(lambda: start_engine("vllm", model, constrained=True, **options))
        with engine:
            rows.append(ours("vLLM, `predict --constrain`", engine, start, puzzles, folder, args.max_tokens, watch))
    table = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *(row.cells(rows[0]) for row in rows)]
    print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in table))
    thinking, answering, size = large_vocabulary()
    print(
        f"\nWith {size:,} tokens and 60 candidates the constraint takes {thinking:.0f} us for a token of the reasoning "
        f"and {answering:.0f} us for one of the answer (mask and advance, one request, CPU)."
    )
    same = sum(a == b for a, b in zip(rows[0].texts, rows[1].texts, strict=True))
    constrained, spent = rows[-1], watch.seconds
    if not spent:
        raise RuntimeError("the logits processor was never called in this process; its time cannot be told")
    print(
        f"\nThe free answers of both are the same for {same} of {len(puzzles)} puzzles. The constraint took "
        f"{spent / constrained.tokens * 1e6:.0f} us per token, {spent / (constrained.run - spent):.1%} of the rest.\n"
        f"{software(PACKAGES)}\n{machine()}"
    )
    speeds = [row.speed for row in rows]
    times = speeds[1] / speeds[0]
    share = spent / (constrained.run - spent)
    alone, free, legal = (f"{speed:.2f} puzzles/s" for speed in speeds)
    bound = f">= {TIMES_AS_FAST}", times >= TIMES_AS_FAST
    results = [
        Row(
            f"answer {len(puzzles)} puzzles, `predict` on vLLM",
            free,
            f"{alone} (pipeline, as published)",
            f"{times:.1f}",
            *bound,
        ),
        Row("the same, only legal answers", legal, f"{free} (free)", f"{speeds[2] / speeds[1]:.2f}"),
        Row(
            "the constraint alone, each token",
            f"{spent / constrained.tokens * 1e6:.0f} us",
            f"{(constrained.run - spent) / constrained.tokens * 1e6:.0f} us (the rest)",
            f"{share:.1%}",
            f"<= {CONSTRAINT_SHARE:.0%}",
            share <= CONSTRAINT_SHARE,
        ),
        Row(
            f"the constraint with {size:,} tokens, each token",
            f"{thinking:.0f} us reasoning, {answering:.0f} us answer",
        ),
    ]
    return finish(results, args.json)


if __name__ == "__main__":
    sys.exit(main())
