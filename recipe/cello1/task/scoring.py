"""The one scorer: reward of the training and metrics of the evaluation.

Reward
------
``dense`` (the published code): -1 for a malformed answer, a wrong number of items or duplicates; otherwise
``(share of cells right + exact match) / 2``. ``sparse`` (the main text of the paper): -1 / 0 / 1. Types are compared
without regard to case. A type that is not among the candidates is simply a wrong type, as in the published code.

Where the published reward is not followed
------------------------------------------
On every input the score is that of the published ``compute_score`` but for names that look the same (NFC and NFD,
invisible characters, micro sign and mu), which are one name here, and in these cases, in which that code pays for
something other than the answer in the tags. The first three score -1 here:

1. *The reasoning is read.* The tags hold no list, the line that opens with ``<answer>`` is blank, and a line of the
   reasoning holds a ``|``: the published code scores that line. Here it is ``empty_answer`` or ``no_separator``.
2. *A second, contradicting line.* The published code scores the first line inside ``<answer>`` and ignores the rest.
   Here a further line that holds a ``|`` and other items, or any line that continues a list ending in ``|``, is a
   ``contradiction``. Repetitions, and remarks without ``|``, are ignored as published.
3. *Duplicates that differ only in case* are ``duplicate``: they are compared without regard to case when paid for.
4. *A list on a line of its own* below ``<answer>`` is scored as what it says. The published code scores a line of the
   reasoning in its place if one holds a ``|``, and takes a ``</answer>`` on the same line for a part of the last type.

Where the published evaluator is not followed
---------------------------------------------
``partial_accuracy``, ``exact_match``, ``format_validity`` and ``uniqueness`` are those of the published evaluator, but:

1. The answer is read as above, by the evaluator's own rules elsewhere.
2. An answer with more types than cells has a partial accuracy and exact match of 0; the published evaluator ignores
   what is too much and pays the rest in full.
3. Failures of the machinery are not scored (:mod:`recipe.cello1.evaluation.evaluate`); there they count as 0.

One cell
--------
For a gold answer of one type the published code has no verdict but -1, since it demands a ``|``. Here the ``|`` is
not needed then, and the answer in the tags alone decides.

Gold that is empty, repeats a type or is not text is an error of the data and raises; it is never scored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from recipe.cello1.task.answer import ParsedAnswer, Reason, parse_answer, split_types, type_fault
from recipe.cello1.task.text import normal_form, shown

Mode = Literal["dense", "sparse"]
MODES: tuple[str, ...] = ("dense", "sparse")
MALFORMED_SCORE = -1.0

# What is measured on each answer, beside its score: fields of `Score`, and the names of the metrics everywhere.
METRICS = ("partial_accuracy", "exact_match", "format_validity", "uniqueness", "strict_accuracy", "legal")


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one response.

    Attributes
    ----------
    score
        -1 to 1, see the module docstring.
    partial_accuracy
        Share of cells with the right type, position by position, also where a type repeats or is missing; 0 for a
        malformed answer and one with too many types.
    exact_match
        Whether all cells are right.
    format_validity
        Whether the tags are in place and the answer holds a list.
    uniqueness
        Different items over items, case included as in the published evaluator; 0 for a malformed answer.
    strict_accuracy
        ``partial_accuracy``, but 0 whenever ``score`` is -1.
    legal
        Whether the answer has the right number of types, none twice, and each a candidate (where those are known).
    reason
        Empty for an answer that is scored, else why it got -1.
    items
        The types read from the answer; empty for a malformed one.
    in_candidates
        Whether every item is a candidate; ``None`` when no candidates were given or no items were read.
    """

    score: float
    partial_accuracy: float
    exact_match: bool
    format_validity: bool
    uniqueness: float
    strict_accuracy: float
    legal: bool
    reason: Reason
    items: tuple[str, ...] = ()
    in_candidates: bool | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers only, all as floats: what a training loop logs.

        Returns
        -------
        ``score`` and the metrics: everything above ``reason``.
        """
        return {name: float(getattr(self, name)) for name in ("score", *METRICS)}


def gold_types(gold: str | Sequence[str]) -> tuple[str, ...]:
    """Read a gold answer.

    Parameters
    ----------
    gold
        ``"type 1 | type 2"`` or the types in cell order.

    Returns
    -------
    The types in cell order.

    Raises
    ------
    ValueError
        If the gold is not text, is empty, holds an unusable name, or repeats a type (without regard to case).
    """
    if isinstance(gold, str):
        return _gold_from_text(gold)
    if isinstance(gold, bytes) or not isinstance(gold, Sequence):
        raise ValueError(f"gold must be a str or a sequence of types, got {type(gold).__name__}")
    types = tuple(gold)
    if not all(isinstance(name, str) for name in types):
        raise ValueError(f"gold must hold only str, got {[type(name).__name__ for name in types]}")
    return _gold_from_types(tuple(map(normal_form, types)))


@lru_cache(maxsize=4096)
def _gold_from_text(gold: str) -> tuple[str, ...]:
    return _gold_from_types(split_types(gold))


@lru_cache(maxsize=4096)
def _gold_from_types(types: tuple[str, ...]) -> tuple[str, ...]:
    if not types:
        raise ValueError("gold is empty; every scored item needs one type for each cell")
    seen: set[str] = set()
    for name in types:
        if fault := type_fault(name):
            raise ValueError(f"gold: the type {shown(name)} {fault}")
        if name.lower() in seen:
            raise ValueError(f"gold names {name!r} twice (case is ignored); no legal answer could match it")
        seen.add(name.lower())
    return types


def score_answer(
    text: object,
    gold: str | Sequence[str],
    mode: Mode = "dense",
    candidates: Collection[str] | None = None,
) -> Score:
    """Score a response against the gold answer.

    Parameters
    ----------
    text
        The response. Never raises on it, whatever it is; what is not text is malformed.
    gold
        ``"type 1 | type 2"`` or the types in cell order.
    mode
        ``"dense"`` or ``"sparse"``.
    candidates
        The candidate types, to learn whether the answer kept to them. They do not change the score.

    Returns
    -------
    The verdict.

    Raises
    ------
    ValueError
        If the gold is unusable, ``mode`` is unknown, or ``candidates`` is a plain string.
    """
    return score_parsed(parse_answer(text), gold, mode, candidates)


def score_types(
    types: Sequence[str] | None,
    gold: str | Sequence[str],
    mode: Mode = "dense",
    candidates: Collection[str] | None = None,
) -> Score:
    """Score types that are at hand, voted ones for example, as a response that names them.

    Parameters
    ----------
    types
        Types in cell order; ``None`` for no answer.
    gold, mode, candidates
        As for :func:`score_answer`.

    Returns
    -------
    The verdict.
    """
    items = tuple(map(normal_form, types or ()))
    reason = Reason.OK if items else Reason.EMPTY_ANSWER
    return score_parsed(ParsedAnswer(items, "", not reason, reason, bool(items)), gold, mode, candidates)


def score_parsed(
    parsed: ParsedAnswer,
    gold: str | Sequence[str],
    mode: Mode = "dense",
    candidates: Collection[str] | None = None,
) -> Score:
    """Score an answer that has been read.

    Parameters
    ----------
    parsed
        What :func:`recipe.cello1.task.answer.parse_answer` found.
    gold, mode, candidates
        As for :func:`score_answer`.

    Returns
    -------
    The verdict.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(candidates, str):
        raise ValueError("candidates must be a collection of types, got a str")
    wanted = gold_types(gold)
    reason, items = parsed.reason, parsed.items
    if not reason and not parsed.separated and len(wanted) > 1:
        reason, items = Reason.NO_SEPARATOR, ()
    if reason:
        return Score(MALFORMED_SCORE, 0.0, False, parsed.separated, 0.0, 0.0, False, reason)

    folded = list(map(str.lower, items))
    known = None if candidates is None else {normal_form(name).lower() for name in candidates}.issuperset(folded)
    if len(items) != len(wanted):
        reason = Reason.WRONG_COUNT
    elif len(set(folded)) < len(folded):
        reason = Reason.DUPLICATE
    right = sum([mine == want.lower() for mine, want in zip(folded, wanted, strict=False)])
    partial = right / len(wanted) if len(items) <= len(wanted) else 0.0
    uniqueness = len(set(items)) / len(items)
    if reason:
        return Score(MALFORMED_SCORE, partial, False, True, uniqueness, 0.0, False, reason, items, known)
    exact = right == len(wanted)
    score = (partial + exact) / 2 if mode == "dense" else float(exact)
    return Score(score, partial, exact, True, uniqueness, partial, known is not False, reason, items, known)
