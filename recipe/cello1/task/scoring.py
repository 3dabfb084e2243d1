"""The one scorer: reward of the training and metric of the evaluation.

Verdict
-------
``dense`` (the published code): -1 for a malformed answer, a wrong number of items or duplicates; otherwise
``(cell accuracy + exact match) / 2``. ``sparse`` (the main text of the paper): -1 / 0 / 1. Types are compared without
regard to case. A label that is not among the candidates is simply a wrong label, as in the published code; ``Score``
says so in ``in_candidates``.

Where the published code is not followed
----------------------------------------
On every input the score is that of the published ``compute_score`` but for names that look the same (NFC and NFD,
invisible characters, micro sign and mu), which are one name here, and -1 in these cases, in which that code pays for
something other than the answer in the tags:

1. *The reasoning is read.* The line that opens with ``<answer>`` is blank and a line of the reasoning holds a ``|``:
   the published code scores that line, whatever stands in the tags (nothing, a wrong list, no list). Here it is
   ``not_in_tags``, ``empty_answer`` or ``no_separator``, unless the tags hold the very same list.
2. *A second, contradicting line.* The published code scores the first line inside ``<answer>`` and ignores the rest.
   Here a further line that holds a ``|`` and other items, or any line that continues a list ending in ``|``, is a
   ``contradiction``. Repetitions, and remarks without ``|``, are ignored as published.
3. *Duplicates that differ only in case* are ``duplicate``: they are compared without regard to case when paid for.

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

from recipe.cello1.task.answer import Reason, parse_answer, split_types, type_fault
from recipe.cello1.task.text import normal_form, shown

Mode = Literal["dense", "sparse"]
MODES: tuple[str, ...] = ("dense", "sparse")
MALFORMED_SCORE = -1.0


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one response.

    Attributes
    ----------
    score
        -1 to 1, see the module docstring.
    cell_accuracy
        Share of cells with the right type, 0 to 1; 0 whenever ``score`` is -1.
    exact_match
        Whether all cells are right.
    format_valid
        Whether the response has the format (a wrong count and duplicates are valid format, as in the paper).
    unique
        Whether the format is valid and no type is used twice.
    reason
        Empty for a legal answer, else why it scored -1.
    uniqueness
        Distinct items over items, without regard to case; 0 for an invalid format. The paper averages this.
    items
        The types read from the answer; empty for an invalid format.
    in_candidates
        Whether every item is a candidate; ``None`` when no candidates were given or no items were read.
    """

    score: float
    cell_accuracy: float
    exact_match: bool
    format_valid: bool
    unique: bool
    reason: Reason
    uniqueness: float = 0.0
    items: tuple[str, ...] = ()
    in_candidates: bool | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers only, all as floats: what a training loop logs.

        Returns
        -------
        ``score``, ``cell_accuracy``, ``exact_match``, ``format_valid``, ``unique``.
        """
        return {
            "score": self.score,
            "cell_accuracy": self.cell_accuracy,
            "exact_match": float(self.exact_match),
            "format_valid": float(self.format_valid),
            "unique": float(self.unique),
        }


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
        msg = f"gold must be a str or a sequence of types, got {type(gold).__name__}"
        raise ValueError(msg)
    types = tuple(gold)
    if not all(isinstance(name, str) for name in types):
        msg = f"gold must hold only str, got {[type(name).__name__ for name in types]}"
        raise ValueError(msg)
    return _gold_from_types(tuple(map(normal_form, types)))


@lru_cache(maxsize=4096)
def _gold_from_text(gold: str) -> tuple[str, ...]:
    return _gold_from_types(split_types(gold))


@lru_cache(maxsize=4096)
def _gold_from_types(types: tuple[str, ...]) -> tuple[str, ...]:
    if not types:
        msg = "gold is empty; every scored item needs one type for each cell"
        raise ValueError(msg)
    seen: set[str] = set()
    for name in types:
        if fault := type_fault(name):
            msg = f"gold: the type {shown(name)} {fault}"
            raise ValueError(msg)
        if name.lower() in seen:
            msg = f"gold names {name!r} twice (case is ignored); no legal answer could match it"
            raise ValueError(msg)
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
    if mode not in MODES:
        msg = f"mode must be one of {', '.join(MODES)}, got {mode!r}"
        raise ValueError(msg)
    if isinstance(candidates, str):
        msg = "candidates must be a collection of types, got a str"
        raise ValueError(msg)
    wanted = gold_types(gold)

    parsed = parse_answer(text)
    if not parsed.ok:
        return _malformed(parsed.reason)
    items = parsed.items
    if not parsed.separated and len(wanted) > 1:
        return _malformed(Reason.NO_SEPARATOR)

    folded = list(map(str.lower, items))
    distinct = len(set(folded))
    unique = distinct == len(items)
    known = None if candidates is None else {normal_form(name).lower() for name in candidates}.issuperset(folded)
    reason = Reason.OK
    if len(items) != len(wanted):
        reason = Reason.WRONG_COUNT
    elif not unique:
        reason = Reason.DUPLICATE
    if reason:
        return Score(MALFORMED_SCORE, 0.0, False, True, unique, reason, distinct / len(items), items, known)

    right = sum([mine == want.lower() for mine, want in zip(folded, wanted, strict=True)])
    accuracy = right / len(wanted)
    exact = right == len(wanted)
    score = (accuracy + exact) / 2 if mode == "dense" else float(exact)
    return Score(score, accuracy, exact, True, True, reason, 1.0, items, known)


def _malformed(reason: Reason) -> Score:
    return Score(MALFORMED_SCORE, 0.0, False, False, False, reason)
