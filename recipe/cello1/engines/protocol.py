"""What answers prompts: one small protocol, which every engine follows.

An engine takes requests (chat messages) and sampling options and gives completions, in the order they get done. What
it cannot answer comes back as a :class:`Failure` in place of a completion: the failure of one item stops no other, and
is never mistaken for an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

import numpy as np

Message = Mapping[str, str]

# How puzzles are answered: as the model answers, held to legal answers, or read out cell by cell or slot by slot.
Decoding = Literal["free", "constrained", "matrix", "soft"]
DECODINGS = get_args(Decoding)
# How a request tells a vLLM server or engine to constrain its answer (SamplingParams.extra_args, vllm_xargs).
CANDIDATES_ARG = "cello1_candidates"
N_ANSWERS_ARG = "cello1_n_answers"
REASONING_BUDGET_ARG = "cello1_reasoning_budget"
# What reads them there.
LOGITS_PROCESSOR = "recipe.cello1.engines.constrained.vllm_processor:MatchingLogitsProcessor"


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
    stop
        Text before which a completion ends, as if the model had ended its turn there; empty for none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 2048
    logprobs: bool = False
    reasoning_budget: int | None = None
    stop: str = ""

    def __post_init__(self) -> None:
        for name, kind in (
            ("temperature", Real),
            ("top_p", Real),
            ("max_tokens", Integral),
            ("reasoning_budget", Integral),
        ):
            value = getattr(self, name)
            right = isinstance(value, kind) and not isinstance(value, bool)
            if not right and (name != "reasoning_budget" or value is not None):
                whole = "whole " if kind is Integral else ""
                raise ValueError(f"{name} must be a {whole}number, got {value!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens!r}")
        if self.reasoning_budget is not None and self.reasoning_budget < 0:
            raise ValueError(f"reasoning_budget must be 0 or more tokens, got {self.reasoning_budget!r}")

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values, as they are written into prediction records.

        Returns
        -------
        The attributes, without an empty ``stop``.
        """
        return {name: value for name, value in asdict(self).items() if name != "stop" or value}


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
        :mod:`recipe.cello1.engines.constrained`.
    n_answers
        Types the answer must name; 0 leaves it unconstrained.
    prefix
        What the assistant's turn begins with: the completion goes on from there, and its text does not repeat it. Not
        together with a constraint.
    """

    messages: Sequence[Message]
    seed: int | None = None
    candidates: tuple[str, ...] = ()
    n_answers: int = 0
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """Texts of which one may come next.

    Attributes
    ----------
    messages
        Chat messages with ``role`` and ``content``.
    prefix
        What the assistant has written so far.
    options
        The texts to compare, all different.
    """

    messages: Sequence[Message]
    prefix: str
    options: tuple[str, ...]


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
    can_score
        Whether the engine has :meth:`score`.
    """

    name: str
    model: str
    fingerprint: str
    constraint: str
    can_score: bool

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

    def score(self, choices: Iterable[Choice]) -> Iterator[tuple[int, np.ndarray | Failure]]:
        """Say how likely each option is to come next, each choice exactly once, in any order.

        Parameters
        ----------
        choices
            What to compare.

        Yields
        ------
        Position of the choice, and the natural-log probability of each option's text, float64, up to a number that is
        the same for all of them (that of the tokens they all begin with); or why there is none.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Closing twice is allowed."""
        ...


class EngineBase(Engine):
    """An engine for ``with``, which closes it."""

    can_score = False

    def score(self, choices: Iterable[Choice]) -> Iterator[tuple[int, np.ndarray | Failure]]:
        """Refuse; an engine that can has a method of its own, as for :class:`Engine`."""
        raise EngineError(f"the engine {self.name!r} gives no probabilities of texts; use vllm or transformers")

    def close(self) -> None:
        """Free what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def sample_seed(seed: int, index: int, sample: int) -> int:
    """Derive the seed of one completion, which then depends on nothing that happens before it.

    Parameters
    ----------
    seed
        Seed of the run.
    index
        Position of the item.
    sample
        Number of the sample.

    Returns
    -------
    An int below 2**31.
    """
    return int(np.random.SeedSequence([seed, index, sample]).generate_state(1)[0] >> 1)
