"""Several answers to one puzzle -> one matching that can be trusted as far as it says.

:func:`consensus` takes the matching with the highest expected cell accuracy under the votes (minimum Bayes risk; the
votes of each cell stand for the probability of each type, and the best one-to-one assignment is found by
``scipy.optimize.linear_sum_assignment``). It comes with, for each cell, how strong the votes for it are.
:func:`majority`, :func:`medoid` and :func:`likeliest` are the plainer rules it is compared with. The command that
votes over prediction files is :mod:`recipe.cello1.inference.vote`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax, xlogy

from recipe.cello1.task.answer import parse_answer

Answer = tuple[str, ...]

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


def logprob_weights(logprobs: Sequence[float], tokens: Sequence[int]) -> np.ndarray:
    """Weigh answers by how sure the model was of them.

    Parameters
    ----------
    logprobs
        Summed log-probability (natural) of each answer.
    tokens
        Tokens of each; the mean per token is what counts, so that long answers are not at a disadvantage.

    Returns
    -------
    Weights that add up to the number of answers.

    Raises
    ------
    ValueError
        If the lengths differ or a log-probability is not finite.
    """
    values, lengths = np.asarray(logprobs, dtype=float), np.asarray(tokens, dtype=float)
    if values.shape != lengths.shape or values.ndim != 1:
        msg = f"logprobs and tokens must have the same length, got {values.shape} and {lengths.shape}"
        raise ValueError(msg)
    if not np.isfinite(values).all():
        msg = "logprobs must be finite"
        raise ValueError(msg)
    return len(values) * softmax(values / np.maximum(lengths, 1))


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


def vote_entropy(votes: np.ndarray) -> np.ndarray:
    """Say how far the votes of each row are divided.

    Parameters
    ----------
    votes
        Float array, rows x types, not negative.

    Returns
    -------
    Float array: Shannon entropy of each row scaled to a sum of 1, in bits; NaN for a row of zeros.
    """
    totals = votes.sum(axis=1, keepdims=True)
    shares = np.divide(votes, totals, out=np.zeros_like(votes, dtype=np.float64), where=totals > 0)
    entropy = -xlogy(shares, shares).sum(axis=1) / np.log(2) + 0.0  # not -0.0
    entropy[totals[:, 0] == 0] = np.nan
    return entropy


def _describe(
    chosen: np.ndarray, votes: np.ndarray, candidates: Sequence[str], smoothing: float, n_answers: int, n_used: int
) -> Consensus:
    rows = np.arange(len(chosen))
    totals = votes.sum(axis=1, keepdims=True)
    shares = np.divide(votes, totals, out=np.zeros_like(votes), where=totals > 0)
    support = shares[rows, chosen]
    others = shares.copy()
    others[rows, chosen] = 0
    return Consensus(
        types=tuple(candidates[j] for j in chosen),
        support=support,
        margin=support - others.max(axis=1),
        entropy=vote_entropy(votes),
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
