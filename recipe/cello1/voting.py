"""Several answers to one puzzle -> one matching that can be trusted as far as it says.

:func:`consensus` takes the matching with the highest expected cell accuracy under the votes (minimum Bayes risk; the
votes of each cell stand for the probability of each type, and the best one-to-one assignment is found by
``scipy.optimize.linear_sum_assignment``). It comes with, for each cell, how strong the votes for it are.
:func:`majority`, :func:`medoid` and :func:`likeliest` are the plainer rules it is compared with.

As a command, it turns predictions with several samples for each item into one prediction each::

    python -m recipe.cello1.voting predictions.jsonl --out voted.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax, xlogy

from recipe.cello1.answer import format_answer, parse_answer
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import check_prediction, item_to_puzzle, read_predictions, write_items

Answer = tuple[str, ...]
RULES = ("consensus", "majority", "medoid", "likeliest")

# Of two matchings with the same votes, the one nearer to the most common whole answer: too little to outweigh a vote.
_TIE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Consensus:
    """A matching and how well the votes support it.

    Attributes
    ----------
    types
        The type of each cell.
    support
        For each cell the share of its votes that are for its type, float array of length n_cells; 0 where no vote was
        cast.
    margin
        Support minus that of the strongest other type of the cell, -1 to 1. Negative where the cell gave way to
        another one that needed the type more.
    entropy
        Entropy of the cell's votes, in bits; NaN where no vote was cast.
    probability
        Smoothed share, float array of length n_cells: what is maximised, and what calibration is measured on.
    votes
        Vote weights, float array of shape (n_cells, n_candidates), columns as ``candidates``.
    candidates
        The candidate types.
    n_answers
        Answers given.
    n_used
        Answers that could be counted.
    """

    types: Answer
    support: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    probability: np.ndarray
    votes: np.ndarray
    candidates: Answer
    n_answers: int
    n_used: int

    @property
    def expected_accuracy(self) -> float:
        """Mean of ``probability``: the cell accuracy to expect if the votes are calibrated."""
        return float(self.probability.mean())

    def cells(self) -> list[dict[str, Any]]:
        """Return plain values for each cell.

        Returns
        -------
        ``type``, ``support``, ``margin``, ``entropy`` (``None`` without votes), ``probability``.
        """
        return [
            {
                "type": name,
                "support": float(self.support[i]),
                "margin": float(self.margin[i]),
                "entropy": None if np.isnan(self.entropy[i]) else float(self.entropy[i]),
                "probability": float(self.probability[i]),
            }
            for i, name in enumerate(self.types)
        ]


def read_answers(texts: Iterable[object], n_cells: int) -> list[Answer | None]:
    """Read responses.

    Parameters
    ----------
    texts
        Responses of a model to the same puzzle.
    n_cells
        Cells of the puzzle.

    Returns
    -------
    The types of each, ``None`` for a response that is malformed or names another number of types. One that names a type
    twice is kept: what it says about each cell is still a vote.
    """
    found: list[Answer | None] = []
    for text in texts:
        parsed = parse_answer(text)
        found.append(parsed.items if parsed.ok and len(parsed.items) == n_cells else None)
    return found


def vote_matrix(
    answers: Sequence[Answer | None],
    candidates: Sequence[str],
    n_cells: int,
    weights: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Count the votes.

    Parameters
    ----------
    answers
        What :func:`read_answers` returned.
    candidates
        Candidate types; case is ignored, as in scoring. Votes for others are not counted.
    n_cells
        Cells of the puzzle.
    weights
        Weight of each answer, 0 or more; 1 by default.

    Returns
    -------
    Float array of shape (n_cells, n_candidates).

    Raises
    ------
    ValueError
        If an answer has another length, or the weights do not fit.
    """
    weights = np.ones(len(answers)) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != (len(answers),):
        msg = f"weights must have one number for each of the {len(answers)} answers, got shape {weights.shape}"
        raise ValueError(msg)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        msg = "weights must be finite and 0 or more"
        raise ValueError(msg)
    column = {name.lower(): j for j, name in enumerate(candidates)}
    votes = np.zeros((n_cells, len(candidates)))
    for answer, weight in zip(answers, weights, strict=True):
        if answer is None:
            continue
        if len(answer) != n_cells:
            msg = f"answers must have {n_cells} types or be None, got {answer}"
            raise ValueError(msg)
        for i, name in enumerate(answer):
            if (j := column.get(name.lower())) is not None:
                votes[i, j] += weight
    return votes


def logprob_weights(logprobs: Sequence[float], tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Weigh answers by how sure the model was of them.

    Parameters
    ----------
    logprobs
        Summed log-probability (natural) of each answer.
    tokens
        Tokens of each; the mean per token is what counts, so that long answers are not at a disadvantage.
    temperature
        The higher, the more even the weights.

    Returns
    -------
    Weights that add up to the number of answers.

    Raises
    ------
    ValueError
        If the lengths differ, a log-probability is not finite, or ``temperature`` is not positive.
    """
    values, lengths = np.asarray(logprobs, dtype=float), np.asarray(tokens, dtype=float)
    if values.shape != lengths.shape or values.ndim != 1:
        msg = f"logprobs and tokens must have the same length, got {values.shape} and {lengths.shape}"
        raise ValueError(msg)
    if not np.isfinite(values).all():
        msg = "logprobs must be finite"
        raise ValueError(msg)
    if not temperature > 0:
        msg = f"temperature must be above 0, got {temperature!r}"
        raise ValueError(msg)
    return len(values) * softmax(values / np.maximum(lengths, 1) / temperature)


def consensus(
    answers: Sequence[Answer | None],
    candidates: Sequence[str],
    n_cells: int,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    smoothing: float = 0.5,
) -> Consensus:
    """Find the matching with the highest expected cell accuracy under the votes.

    Ties go to the matching nearer to the most common whole answer, then to the order of the candidates; nothing is
    random.

    Parameters
    ----------
    answers
        What :func:`read_answers` returned; at least one.
    candidates
        Candidate types, at least as many as there are cells.
    n_cells
        Cells of the puzzle.
    weights
        Weight of each answer, 1 by default; see :func:`logprob_weights`.
    smoothing
        Votes added to each cell, spread evenly over the candidates, so that a few votes do not make a certainty.

    Returns
    -------
    The matching and its support. Without any usable answer it is arbitrary, and its support 0.

    Raises
    ------
    ValueError
        If there are no answers, fewer candidates than cells, candidates that differ only in case, or a negative
        smoothing.
    """
    if not answers:
        msg = "answers is empty; at least one answer (or None) is needed"
        raise ValueError(msg)
    if len({name.lower() for name in candidates}) != len(candidates):
        msg = f"candidates must differ by more than case, got {list(candidates)}"
        raise ValueError(msg)
    votes = vote_matrix(answers, candidates, n_cells, weights)
    prefer = _most_common([answer for answer in answers if answer is not None])
    chosen = assign(votes, smoothing=smoothing, prefer=_columns(prefer, candidates))
    return _describe(chosen, votes, candidates, smoothing, len(answers), sum(answer is not None for answer in answers))


def assign(
    votes: np.ndarray, *, smoothing: float = 0.5, prefer: Sequence[int] | None = None, one_to_one: bool = True
) -> np.ndarray:
    """Choose a column for each row so that the expected number of right choices is highest.

    Parameters
    ----------
    votes
        Vote weights, array of shape (rows, columns), 0 or more.
    smoothing
        Votes added to each row, spread evenly.
    prefer
        Column of each row to prefer among equals; -1 for none.
    one_to_one
        Whether no column may be chosen twice. Otherwise each row takes its strongest column.

    Returns
    -------
    int64 array: the column of each row.

    Raises
    ------
    ValueError
        If ``votes`` is not such an array, has fewer columns than rows (one-to-one), or ``smoothing`` is negative.
    """
    votes = np.asarray(votes, dtype=float)
    if votes.ndim != 2 or not votes.size or not np.isfinite(votes).all() or (votes < 0).any():
        msg = f"votes must be a non-empty matrix of finite numbers, 0 or more, got shape {votes.shape}"
        raise ValueError(msg)
    if one_to_one and votes.shape[0] > votes.shape[1]:
        msg = f"votes has {votes.shape[0]} rows and only {votes.shape[1]} columns; no one-to-one assignment exists"
        raise ValueError(msg)
    gain = _probabilities(votes, smoothing)
    if prefer is not None:
        rows = np.flatnonzero(np.asarray(prefer) >= 0)
        gain[rows, np.asarray(prefer)[rows]] += _TIE
    if not one_to_one:
        return gain.argmax(axis=1)
    return linear_sum_assignment(gain, maximize=True)[1]


def _probabilities(votes: np.ndarray, smoothing: float) -> np.ndarray:
    """Return the smoothed share of each column in its row; even shares where there are no votes at all."""
    if not smoothing >= 0:
        msg = f"smoothing must be 0 or more, got {smoothing!r}"
        raise ValueError(msg)
    even = 1 / votes.shape[1]
    totals = votes.sum(axis=1, keepdims=True) + smoothing
    return np.divide(votes + smoothing * even, totals, out=np.full(votes.shape, even), where=totals > 0)


def _describe(
    chosen: np.ndarray, votes: np.ndarray, candidates: Sequence[str], smoothing: float, n_answers: int, n_used: int
) -> Consensus:
    rows = np.arange(len(chosen))
    totals = votes.sum(axis=1, keepdims=True)
    shares = np.divide(votes, totals, out=np.zeros_like(votes), where=totals > 0)
    support = shares[rows, chosen]
    others = shares.copy()
    others[rows, chosen] = 0
    entropy = -xlogy(shares, shares).sum(axis=1) / np.log(2) + 0.0  # not -0.0
    entropy[totals[:, 0] == 0] = np.nan
    return Consensus(
        types=tuple(candidates[j] for j in chosen),
        support=support,
        margin=support - others.max(axis=1),
        entropy=entropy,
        probability=_probabilities(votes, smoothing)[rows, chosen],
        votes=votes,
        candidates=tuple(candidates),
        n_answers=n_answers,
        n_used=n_used,
    )


def _most_common(answers: Sequence[Answer]) -> Answer | None:
    """Return the most common whole answer, the first of several."""
    counts = Counter(tuple(name.lower() for name in answer) for answer in answers)
    return counts.most_common(1)[0][0] if counts else None


def _columns(answer: Answer | None, candidates: Sequence[str]) -> list[int] | None:
    if answer is None:
        return None
    column = {name.lower(): j for j, name in enumerate(candidates)}
    return [column.get(name.lower(), -1) for name in answer]


def majority(answers: Sequence[Answer | None], candidates: Sequence[str], n_cells: int) -> Answer:
    """Take the most voted type of each cell, whatever the other cells take: not always a legal answer.

    Parameters
    ----------
    answers, candidates, n_cells
        As for :func:`consensus`.

    Returns
    -------
    The types; the first candidate where no vote was cast.
    """
    votes = vote_matrix(answers, candidates, n_cells)
    return tuple(candidates[j] for j in assign(votes, one_to_one=False))


def medoid(answers: Sequence[Answer | None]) -> Answer | None:
    """Take the answer that agrees with the others in most cells, the first of several; legal ones go first.

    Parameters
    ----------
    answers
        What :func:`read_answers` returned.

    Returns
    -------
    One of the answers, ``None`` if there is none.
    """
    usable = [answer for answer in answers if answer is not None]
    if not usable:
        return None
    codes = np.array([[name.lower() for name in answer] for answer in usable])
    agreement = (codes[:, None, :] == codes[None, :, :]).sum(axis=(1, 2))
    legal = np.array([len(set(row)) == len(row) for row in codes])
    return usable[int(np.lexsort((-agreement, ~legal))[0])]


def likeliest(answers: Sequence[Answer | None], weights: Sequence[float] | np.ndarray) -> Answer | None:
    """Take the answer of the highest weight (best of k), the first of several.

    Parameters
    ----------
    answers
        What :func:`read_answers` returned.
    weights
        Weight of each; see :func:`logprob_weights`.

    Returns
    -------
    One of the answers, ``None`` if there is none.
    """
    order = np.argsort(-np.asarray(weights, dtype=float), kind="stable")
    return next((answers[i] for i in order if answers[i] is not None), None)


# ----------------------------------------------------------------------------------------------------- second round


def open_cells(found: Consensus, min_support: float) -> list[int]:
    """Find the cells that the votes leave open.

    Parameters
    ----------
    found
        A consensus.
    min_support
        Cells with less support are open.

    Returns
    -------
    Their positions. None if a single one is open and no decoys are left: there is nothing to choose from then.
    """
    cells = np.flatnonzero(found.support < min_support).tolist()
    free = len(found.candidates) - (len(found.types) - len(cells))
    return cells if len(cells) > 1 or (cells and free > 1) else []


def second_puzzle(puzzle: Puzzle, found: Consensus, cells: Sequence[int]) -> Puzzle:
    """Make the smaller puzzle of the open cells: the types of the settled ones are taken off the candidates.

    Parameters
    ----------
    puzzle
        The puzzle.
    found
        Its consensus.
    cells
        The open cells, as :func:`open_cells` returned.

    Returns
    -------
    A puzzle of the open cells. It has gold only if the gold of the open cells is still among the candidates.

    Raises
    ------
    ValueError
        If ``cells`` is empty.
    """
    if not cells:
        msg = "cells is empty; there is nothing to ask again"
        raise ValueError(msg)
    settled = {name for i, name in enumerate(found.types) if i not in set(cells)}
    candidates = tuple(name for name in puzzle.candidates if name not in settled)
    gold = None if puzzle.answer is None else tuple(puzzle.answer[i] for i in cells)
    if gold is not None and not set(gold) <= set(candidates):
        gold = None
    return Puzzle(tuple(puzzle.cells[i] for i in cells), candidates, gold, puzzle.context, {"open_cells": list(cells)})


def merge_rounds(found: Consensus, cells: Sequence[int], second: Sequence[str]) -> Answer:
    """Put the answer to the smaller puzzle in its place.

    Parameters
    ----------
    found
        The first consensus.
    cells
        The open cells.
    second
        Their types.

    Returns
    -------
    The types of all cells.
    """
    types = list(found.types)
    for i, name in zip(cells, second, strict=True):
        types[i] = name
    return tuple(types)


# ---------------------------------------------------------------------------------------------------------- command


def vote_records(
    records: Sequence[Mapping[str, Any]],
    *,
    rule: str = "consensus",
    weighted: bool | None = None,
    smoothing: float = 0.5,
    variant: str = "batch",
) -> list[dict[str, Any]]:
    """Turn several predictions for each item into one.

    Parameters
    ----------
    records
        Prediction and error records; the latter cast no vote.
    rule
        One of ``RULES``.
    weighted
        Whether to weigh the answers by log-probability (``predict --logprobs``); by default where every prediction has
        it.
    smoothing
        As for :func:`consensus`.
    variant
        Task variant of the items.

    Returns
    -------
    One prediction record for each item, by index: the item, the voted answer as ``prediction`` (with the reasoning of
    the first response that gave just this answer, if one did), the answers it is made of (``voted``, with their
    ``weights`` if they have some) and, for a consensus, ``cells``. Items with error records only get an error record.

    Raises
    ------
    ValueError
        If the rule is unknown, an item cannot be read, or log-probabilities are wanted and missing.
    """
    if rule not in RULES:
        msg = f"rule must be one of {', '.join(RULES)}, got {rule!r}"
        raise ValueError(msg)
    if weighted is None:
        weighted = has_logprobs(records)
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["index"], []).append(record)
    voted = []
    for index in sorted(groups):
        group = sorted(groups[index], key=lambda record: record.get("sample", 0))
        answered = [record for record in group if check_prediction(record, f"prediction {index}")]
        made = ("prediction", "error", "sample", "tokens", "prompt_tokens", "finish_reason", "logprob")
        base = {key: value for key, value in group[0].items() if key not in made}
        if not answered:
            voted.append({**base, "sample": 0, "error": group[0]["error"]})
            continue
        voted.append({**base, "sample": 0, **_vote(base, answered, rule, weighted, smoothing, variant, index)})
    return voted


def has_logprobs(records: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether every prediction has its log-probability, so that answers can be weighed by it.

    Parameters
    ----------
    records
        Prediction and error records.

    Returns
    -------
    Whether they have.
    """
    own = [record for record in records if "prediction" in record]
    return bool(own) and all(
        isinstance(record.get("logprob"), float | int) and isinstance(record.get("tokens"), int) for record in own
    )


_MADE = ("index", "engine", "model", "fingerprint", "sampling", "prompt_layout")


def _vote(
    base: Mapping[str, Any],
    answered: Sequence[Mapping[str, Any]],
    rule: str,
    weighted: bool,
    smoothing: float,
    variant: Any,
    index: int,
) -> dict[str, Any]:
    item = {key: value for key, value in base.items() if key not in _MADE}
    puzzle = item_to_puzzle(item, index, variant, require_gold=False)
    if not puzzle.candidates:
        msg = f"item {index} has no candidates to vote for"
        raise ValueError(msg)
    answers = read_answers([record["prediction"] for record in answered], puzzle.n_cells)
    weights = None
    if rule == "likeliest" or (weighted and rule == "consensus"):
        if missing := [record.get("sample", 0) for record in answered if record.get("logprob") is None]:
            msg = f"prediction {index}, sample {missing[0]} has no 'logprob'; predict with --logprobs"
            raise ValueError(msg)
        weights = logprob_weights([r["logprob"] for r in answered], [r["tokens"] for r in answered])
    found: dict[str, Any] = {"rule": rule, "voted": [None if answer is None else list(answer) for answer in answers]}
    if weights is not None:
        found["weights"] = weights.tolist()
    types: Answer | None
    if rule == "consensus":
        result = consensus(answers, puzzle.candidates, puzzle.n_cells, weights=weights, smoothing=smoothing)
        types = result.types
        found["cells"] = result.cells()
    elif rule == "majority":
        types = majority(answers, puzzle.candidates, puzzle.n_cells)
    elif rule == "medoid":
        types = medoid(answers)
    else:
        types = likeliest(answers, weights)
    # Without one usable answer there is nothing to choose from: an empty response, which is scored as malformed.
    text = "" if types is None else _text_for(types, answers, answered)
    return {**found, "prediction": text}


def _text_for(types: Answer, answers: Sequence[Answer | None], answered: Sequence[Mapping[str, Any]]) -> str:
    """Return the first response that gives just this answer, for its reasoning; else the answer alone."""
    wanted = [name.lower() for name in types]
    for answer, record in zip(answers, answered, strict=True):
        if answer is not None and [name.lower() for name in answer] == wanted:
            return record["prediction"]
    return format_answer(types)


def add_weighted(parser: argparse.ArgumentParser) -> None:
    """Add the switch of weighing by log-probability.

    Parameters
    ----------
    parser
        Where to.
    """
    parser.add_argument(
        "--weighted",
        action=argparse.BooleanOptionalAction,
        help="weigh the answers by log-probability (default: where every prediction has it)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.cello1.voting", description="Combine several predictions for each item into one."
    )
    parser.add_argument("predictions", type=Path, help="predictions with several samples for each item")
    parser.add_argument("--out", type=Path, required=True, help="voted predictions, .jsonl or .json")
    parser.add_argument("--rule", default="consensus", choices=RULES)
    add_weighted(parser)
    parser.add_argument("--smoothing", type=float, default=0.5)
    parser.add_argument("--variant", default="batch", help="task variant")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments, ``sys.argv`` by default.

    Returns
    -------
    0, or 2 if the predictions cannot be combined.
    """
    args = _parser().parse_args(argv)
    try:
        records = read_predictions(args.predictions)
        voted = vote_records(
            records, rule=args.rule, weighted=args.weighted, smoothing=args.smoothing, variant=args.variant
        )
        write_items(args.out, voted)
    except (ValueError, OSError) as error:
        print(f"voting: {error}", file=sys.stderr)
        return 2
    print(f"voting: {len(records)} predictions combined into {len(voted)} in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
