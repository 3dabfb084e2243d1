"""What answers prompts: one small protocol, and :func:`start_engine`, which loads the engine asked for and no other.

An engine takes requests (chat messages) and sampling options and gives completions, in the order they get done. What
it cannot answer comes back as a :class:`Failure` in place of a completion: the failure of one item stops no other, and
is never mistaken for an answer.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from recipe.cello1.answer import THINK_OPEN
from recipe.cello1.constrained import Vocabulary, matching_for, tokens_needed

Message = Mapping[str, str]

# Module and class of each engine. They are imported only when started: each needs its own packages.
ENGINES = {
    "vllm": ("recipe.cello1.engine_vllm", "VllmEngine"),
    "openai": ("recipe.cello1.engine_openai", "OpenAIEngine"),
    "transformers": ("recipe.cello1.engine_transformers", "TransformersEngine"),
}

# How a request tells a vLLM server or engine to constrain its answer (SamplingParams.extra_args, vllm_xargs).
CANDIDATES_ARG = "cello1_candidates"
N_ANSWERS_ARG = "cello1_n_answers"
REASONING_BUDGET_ARG = "cello1_reasoning_budget"

_SAMPLED_BYTES = 1 << 16


class EngineError(RuntimeError):
    """An engine that cannot be started, or has stopped for good."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; the same for all requests of a run.

    Attributes
    ----------
    temperature
        0 takes the likeliest token at each step (greedy).
    top_p
        Probability mass of the tokens sampled from, in (0, 1].
    max_tokens
        Longest completion, in tokens.
    logprobs
        Whether to return the log-probability of each completion.
    reasoning_budget
        Most tokens of reasoning, for constrained requests; ``None``: as many as leave room for the answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 2048
    logprobs: bool = False
    reasoning_budget: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            msg = f"temperature must be 0 (greedy) or more, got {self.temperature!r}"
            raise ValueError(msg)
        if not 0 < self.top_p <= 1:
            msg = f"top_p must be above 0 and at most 1, got {self.top_p!r}"
            raise ValueError(msg)
        if self.max_tokens < 1:
            msg = f"max_tokens must be at least 1, got {self.max_tokens!r}"
            raise ValueError(msg)
        if self.reasoning_budget is not None and self.reasoning_budget < 0:
            msg = f"reasoning_budget must be 0 or more tokens, got {self.reasoning_budget!r}"
            raise ValueError(msg)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values, as they are written into prediction records.

        Returns
        -------
        The attributes.
        """
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to answer.

    Attributes
    ----------
    messages
        Chat messages with ``role`` and ``content``.
    seed
        Seed of this completion when sampling; ``None`` leaves it to the engine.
    candidates
        With ``n_answers``: constrain the answer to that many different ones of these types. See
        :mod:`recipe.cello1.constrained`.
    n_answers
        Types the answer must name; 0 leaves it unconstrained.
    """

    messages: Sequence[Message]
    seed: int | None = None
    candidates: tuple[str, ...] = ()
    n_answers: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes
    ----------
    text
        What the assistant's turn holds, including a ``<think>`` that the chat template has put there.
    finish_reason
        ``"stop"`` (the model ended its turn) or ``"length"`` (it ran out of room).
    tokens
        Tokens of the completion.
    prompt_tokens
        Tokens of the prompt.
    logprob
        Summed natural-log probability of the sampled tokens; ``None`` unless asked for and known.
    """

    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no completion: a fault of the machinery or of the request, never of the model.

    Attributes
    ----------
    error
        What happened, in words.
    """

    error: str


@runtime_checkable
class Engine(Protocol):
    """What answers prompts.

    Attributes
    ----------
    name
        Kind of engine, a key of ``ENGINES``.
    model
        Path or name of the model, as given.
    fingerprint
        Tells two states of a model under the same path apart; empty when unknown.
    constraint
        What the engine can hold an answer to: ``"exact"`` (a legal matching), ``"candidates"`` (format, number and
        names, but a type may come twice) or nothing (empty).
    """

    name: str
    model: str
    fingerprint: str
    constraint: str

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer requests, each exactly once, in any order.

        Parameters
        ----------
        requests
            What to answer; read as room comes free, so it may be long.
        sampling
            How.

        Yields
        ------
        Position of the request, and its completion or failure.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Closing twice is allowed."""
        ...


class EngineBase:
    """``with engine:`` for the engines."""

    def close(self) -> None:
        """Free what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_engine(name: str, model: str | Path, **options: Any) -> Engine:
    """Start an engine.

    Parameters
    ----------
    name
        A key of ``ENGINES``.
    model
        Folder of the model, or its name on the Hugging Face hub or server.
    **options
        Options of the engine, see its class.

    Returns
    -------
    The engine; close it after use (``with start_engine(...) as engine:``).

    Raises
    ------
    ValueError
        If there is no such engine.
    FileNotFoundError
        If ``model`` is a path and nothing is there.
    EngineError
        If the engine cannot be started, its packages are missing for example.
    """
    if name not in ENGINES:
        msg = f"engine must be one of {', '.join(ENGINES)}, got {name!r}"
        raise ValueError(msg)
    module, cls = ENGINES[name]
    return getattr(import_module(module), cls)(str(model), **options)


def start_engines(name: str, model: str | Path, number: int = 1, **options: Any) -> Engine:
    """Start one engine, or several of the same kind side by side as Ray actors.

    Parameters
    ----------
    name, model, **options
        As for :func:`start_engine`.
    number
        How many.

    Returns
    -------
    An engine that stands for all of them; close it after use.

    Raises
    ------
    ValueError
        If there is no such engine, or ``number`` is not positive.
    FileNotFoundError
        If ``model`` is a path and nothing is there.
    EngineError
        If an engine cannot be started.
    """
    if number < 1:
        msg = f"number of engines must be at least 1, got {number}"
        raise ValueError(msg)
    if number == 1:
        return start_engine(name, model, **options)
    if name not in ENGINES:
        msg = f"engine must be one of {', '.join(ENGINES)}, got {name!r}"
        raise ValueError(msg)
    return import_module("recipe.cello1.engine_ray").RayEngines(name, str(model), number, **options)


def constraint_args(request: Request, sampling: Sampling) -> dict[str, Any]:
    """Return what tells our vLLM logits processor to constrain a request.

    Parameters
    ----------
    request
        The request.
    sampling
        For the reasoning budget.

    Returns
    -------
    Keys and values for ``extra_args`` or ``vllm_xargs``; empty for an unconstrained request.
    """
    if not request.n_answers:
        return {}
    args: dict[str, Any] = {CANDIDATES_ARG: list(request.candidates), N_ANSWERS_ARG: request.n_answers}
    if sampling.reasoning_budget is not None:
        args[REASONING_BUDGET_ARG] = sampling.reasoning_budget
    return args


def check_model_path(model: str) -> None:
    """Check that what looks like the path of a model folder is one.

    Parameters
    ----------
    model
        Path, or name on the Hugging Face hub (``owner/name``), which is not looked up.

    Raises
    ------
    FileNotFoundError
        If it looks like a path and is none, or the folder holds no ``config.json``.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            msg = f"model: {model} holds no config.json; give the folder of a model in Hugging Face format"
            raise FileNotFoundError(msg)
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        msg = f"model: {model} does not exist; give a model folder, or a name on the Hugging Face hub (owner/name)"
        raise FileNotFoundError(msg)


def fingerprint(model: str) -> str:
    """Compute a short hash that changes when the model in a folder changes.

    Of each weight file the size and samples of the bytes count, so that this takes no time for a large model; training
    changes nearly every weight.

    Parameters
    ----------
    model
        Model folder; for a name on the hub there is no fingerprint.

    Returns
    -------
    12 hexadecimal digits, or an empty string.
    """
    path = Path(model)
    if not path.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with open(file, "rb") as stream:
                for part in range(8):
                    stream.seek(max(0, size - _SAMPLED_BYTES) * part // 7)
                    digest.update(stream.read(_SAMPLED_BYTES))
        elif file.name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def lora_rank(lora: str) -> int:
    """Read the rank of a LoRA adapter.

    Parameters
    ----------
    lora
        Folder of the adapter, as PEFT saves it.

    Returns
    -------
    The rank.

    Raises
    ------
    FileNotFoundError
        If the folder holds no adapter.
    """
    path = Path(lora) / "adapter_config.json"
    if not path.is_file():
        msg = f"lora: {lora} holds no adapter_config.json; give the folder of a LoRA adapter as PEFT saves it"
        raise FileNotFoundError(msg)
    return int(json.loads(path.read_text())["r"])


def cpu_dtype() -> str:
    """Choose the number format for CPUs.

    Returns
    -------
    ``"auto"`` (the model's own), but ``"float32"`` where the processor would emulate bfloat16, which is slow (x86
    without AMX or AVX512-BF16).
    """
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "auto"
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "auto" if any(getattr(torch.cpu, check, bool)() for check in checks) else "float32"


def constraint_fault(vocabulary: Vocabulary | None, request: Request, room: int) -> str:
    """Say why a request's answer cannot be constrained.

    Parameters
    ----------
    vocabulary
        Tokens of the model; ``None`` if the engine was not started for constrained answers.
    request
        The request.
    room
        Most tokens the completion may have.

    Returns
    -------
    Why not; empty if it can, or if the request is unconstrained.
    """
    if not request.n_answers:
        return ""
    if vocabulary is None:
        return "the engine was not started for constrained answers; start it with constrained=True"
    try:
        matching = matching_for(vocabulary, request.candidates, request.n_answers)
    except ValueError as error:
        return str(error)
    if (needed := tokens_needed(matching)) > room:
        return f"the answer may need {needed} tokens and there is room for {room}; give more max_tokens"
    return ""


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], str]:
    """Apply the chat template.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    messages
        Chat messages.

    Returns
    -------
    Token ids of the prompt, and what the template has already put into the assistant's turn (``<think>`` in the
    templates of some reasoning models): the completion goes on from there, so it belongs in front of its text.

    Raises
    ------
    ValueError
        If the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template; use a chat model, or add chat_template.jinja to its folder"
        raise ValueError(msg)
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens, so the tokenizer must not add its own.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    opened = text.rfind(THINK_OPEN) if text.rstrip().endswith(THINK_OPEN) else len(text)
    return ids, text[opened:]
