"""Several answers to one puzzle -> one matching; ``docs/voting.md`` has the formulas.

:func:`consensus` takes the matching with the highest expected cell accuracy under the votes (minimum Bayes risk; the
votes of each cell stand for the probability of each type, and the best one-to-one assignment is found by
``scipy.optimize.linear_sum_assignment``). :func:`majority`, :func:`medoid` and :func:`likeliest` are the plainer rules
it is compared with. The command that votes over prediction files is ``inference.vote``.
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
_MOST = 15  # candidates up to which all matchings are summed over: 32,768 sets


@dataclass(frozen=True, slots=True, eq=False)
class Consensus:
    """A matching and how well the votes support it; float arrays of length n_cells."""

    # The type of each cell
    types: Answer
    # Share of the cell's votes that are for its type; 0 where no vote was cast
    support: np.ndarray
    # Support minus that of the strongest other type; negative where the cell gave way to one that needed the type more
    margin: np.ndarray
    # Of the cell's votes, in bits; NaN where no vote was cast
    entropy: np.ndarray
    # Smoothed share: what is maximised, and what calibration is measured on
    probability: np.ndarray
    # Answers given, and answers that could be counted
    n_answers: int
    n_used: int

    def cells(self) -> list[dict[str, Any]]:
        """Return plain values for each cell: type, support, margin, entropy (``None`` without votes), probability."""
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
    """Read responses; ``None`` for one that is malformed or names another number of types."""
    # An answer that names a type twice is kept: what it says about each cell is still a vote.
    items = [parse_answer(text).items for text in texts]
    return [found if len(found) == n_cells else None for found in items]


def vote_matrix(
    answers: Sequence[Answer | None],
    candidates: Sequence[str],
    n_cells: int,
    weights: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Count the votes as a float array (n_cells, n_candidates); case is ignored, and so are votes for other types."""
    weights = np.ones(len(answers)) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != (len(answers),):
        msg = f"weights must have one number for each of the {len(answers)} answers, got shape {weights.shape}"
        raise ValueError(msg)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights must be finite and 0 or more")
    votes = np.zeros((n_cells, len(candidates)))
    for answer, weight in zip(answers, weights, strict=True):
        if answer is None:
            continue
        if len(answer) != n_cells:
            raise ValueError(f"answers must have {n_cells} types or be None, got {answer}")
        for i, j in enumerate(_columns(answer, candidates)):
            if j >= 0:
                votes[i, j] += weight
    return votes


def logprob_weights(logprobs: Sequence[float], tokens: Sequence[int]) -> np.ndarray:
    """Weigh answers by their mean log-probability per token; the weights add up to the number of answers."""
    values, lengths = np.asarray(logprobs, dtype=float), np.asarray(tokens, dtype=float)
    if values.shape != lengths.shape or values.ndim != 1:
        raise ValueError(f"logprobs and tokens must have the same length, got {values.shape} and {lengths.shape}")
    if not np.isfinite(values).all():
        raise ValueError("logprobs must be finite")
    return len(values) * softmax(values / np.maximum(lengths, 1))


def consensus(
    answers: Sequence[Answer | None],
    candidates: Sequence[str],
    n_cells: int,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    smoothing: float = 0.5,
) -> Consensus:
    """Find the matching with the highest expected cell accuracy under the votes."""
    # Ties go to the matching nearer to the most common whole answer, then to the order of the candidates; nothing is
    # random. Without any usable answer the matching is arbitrary, and its support 0.
    if not answers:
        raise ValueError("answers is empty; at least one answer (or None) is needed")
    if len({name.lower() for name in candidates}) != len(candidates):
        raise ValueError(f"candidates must differ by more than case, got {list(candidates)}")
    votes = vote_matrix(answers, candidates, n_cells, weights)
    used = [answer for answer in answers if answer is not None]
    whole = Counter(tuple(name.lower() for name in answer) for answer in used).most_common(1)
    chosen = assign(votes, smoothing=smoothing, prefer=_columns(whole[0][0], candidates) if whole else None)
    rows = np.arange(n_cells)
    shares = _shares(votes)
    support = shares[rows, chosen]
    shares[rows, chosen] = 0
    return Consensus(
        types=tuple(candidates[j] for j in chosen),
        support=support,
        margin=support - shares.max(axis=1),
        entropy=vote_entropy(votes),
        probability=_probabilities(votes, smoothing)[rows, chosen],
        n_answers=len(answers),
        n_used=len(used),
    )


def assign(
    votes: np.ndarray, *, smoothing: float = 0.5, prefer: Sequence[int] | None = None, one_to_one: bool = True
) -> np.ndarray:
    """Choose a column for each row so that the expected number of right choices is highest, as an int64 array."""
    # Among equals each row takes the column that it prefers; -1 for none. Not one to one, each takes its strongest.
    votes = _checked("votes", votes, one_to_one)
    gain = _probabilities(votes, smoothing)
    if prefer is not None:
        rows = np.flatnonzero(np.asarray(prefer) >= 0)
        gain[rows, np.asarray(prefer)[rows]] += _TIE
    if not one_to_one:
        return gain.argmax(axis=1)
    return linear_sum_assignment(gain, maximize=True)[1]


def matched(probabilities: np.ndarray, *, smoothing: float = 1e-3) -> np.ndarray:
    """Condition rows of probabilities on each column being used once at most: how sure a cell is beside the others."""
    # The share of each choice among the one-to-one matchings, each weighed by the product of its probabilities: a cell
    # whose own row leaves two types open is sure of one of them where another cell certainly has the other. Some of an
    # even distribution is mixed in, since no row rules a type out for good. Beyond 15 candidates, the most that a
    # Cell-o1 puzzle has, there are too many sets of used columns, and each row stands for itself.
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing must be above 0 and at most 1, got {smoothing!r}")
    values = _checked("probabilities", probabilities, True)
    rows = (1 - smoothing) * _probabilities(values, 0.0) + smoothing / values.shape[1]
    return _by_subsets(rows) if values.shape[1] <= _MOST else rows


def _checked(name: str, values: Any, one_to_one: bool) -> np.ndarray:
    """Return the values as a float matrix, or say why they are none."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{name} must be a non-empty matrix of finite numbers, 0 or more, got shape {values.shape}")
    if one_to_one and values.shape[0] > values.shape[1]:
        msg = f"{name} has {values.shape[0]} rows and only {values.shape[1]} columns; no one-to-one assignment exists"
        raise ValueError(msg)
    return values


def _by_subsets(rows: np.ndarray) -> np.ndarray:
    """Sum over the matchings; the index of a state is the set of columns that are used, as bits."""
    n, m = rows.shape
    before, after = np.zeros((n + 1, 1 << m)), np.zeros((n + 1, 1 << m))
    before[0, 0] = after[n] = 1.0
    halves = [(-1, 2, 1 << j) for j in range(m)]  # of a state: without and with column j
    for i in range(n):
        for j, shape in enumerate(halves):
            before[i + 1].reshape(shape)[:, 1] += rows[i, j] * before[i].reshape(shape)[:, 0]
    for i in range(n - 1, 0, -1):
        for j, shape in enumerate(halves):
            after[i].reshape(shape)[:, 0] += rows[i, j] * after[i + 1].reshape(shape)[:, 1]
    sums = np.array(
        [[(before[i].reshape(s)[:, 0] * after[i + 1].reshape(s)[:, 1]).sum() for s in halves] for i in range(n)]
    )
    found = rows * sums
    return found / found.sum(axis=1, keepdims=True)


def _probabilities(votes: np.ndarray, smoothing: float) -> np.ndarray:
    """Return the smoothed share of each column in its row; even shares where there are no votes at all."""
    if not smoothing >= 0:
        raise ValueError(f"smoothing must be 0 or more, got {smoothing!r}")
    even = 1 / votes.shape[1]
    totals = votes.sum(axis=1, keepdims=True) + smoothing
    return np.divide(votes + smoothing * even, totals, out=np.full(votes.shape, even), where=totals > 0)


def _shares(votes: np.ndarray) -> np.ndarray:
    totals = votes.sum(axis=1, keepdims=True)
    return np.divide(votes, totals, out=np.zeros_like(votes, dtype=np.float64), where=totals > 0)


def vote_entropy(votes: np.ndarray) -> np.ndarray:
    """Return the Shannon entropy of each row of votes scaled to a sum of 1, in bits; NaN for a row of zeros."""
    shares = _shares(votes)
    entropy = -xlogy(shares, shares).sum(axis=1) / np.log(2) + 0.0  # not -0.0
    entropy[votes.sum(axis=1) == 0] = np.nan
    return entropy


def _columns(answer: Answer, candidates: Sequence[str]) -> list[int]:
    column = {name.lower(): j for j, name in enumerate(candidates)}
    return [column.get(name.lower(), -1) for name in answer]


def majority(answers: Sequence[Answer | None], candidates: Sequence[str], n_cells: int) -> Answer:
    """Take the most voted type of each cell, whatever the other cells take: not always a legal answer."""
    votes = vote_matrix(answers, candidates, n_cells)
    return tuple(candidates[j] for j in assign(votes, one_to_one=False))


def medoid(answers: Sequence[Answer | None]) -> Answer | None:
    """Take the answer that agrees with the others in most cells, the first of several; legal ones go first."""
    usable = [answer for answer in answers if answer is not None]
    if not usable:
        return None
    codes = np.array([[name.lower() for name in answer] for answer in usable])
    agreement = (codes[:, None, :] == codes[None, :, :]).sum(axis=(1, 2))
    legal = np.array([len(set(row)) == len(row) for row in codes])
    return usable[int(np.lexsort((-agreement, ~legal))[0])]


def likeliest(answers: Sequence[Answer | None], weights: Sequence[float] | np.ndarray) -> Answer | None:
    """Take the answer of the highest weight (best of k), the first of several."""
    order = np.argsort(-np.asarray(weights, dtype=float), kind="stable")
    return next((answers[i] for i in order if answers[i] is not None), None)
