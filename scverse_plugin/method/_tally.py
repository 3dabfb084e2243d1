"""Answers to votes, votes to labels.

``recipe.cello1.task.voting`` reads the answers, counts them and finds the assignment. This module adds what annotation
needs: a vote counts against how often unit and type have met, and nothing becomes a label that the
votes do not carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2_contingency

from recipe.cello1.task.voting import assign, read_answers, vote_entropy, vote_matrix
from scverse_plugin.method._false import FalseRate, find_threshold
from scverse_plugin.method._plan import Draft

SMOOTHING = 0.5  # meetings added to each pair: a type met once must not beat one met ten times
MIXED_GAP = 0.25  # see CellChecks
MIXED_AGREEMENT = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """Votes and meetings."""

    # Types, the decoys last
    types: tuple[str, ...]
    # How many of them are decoys
    n_decoys: int
    # Float arrays of shape (units, types)
    votes: np.ndarray
    met: np.ndarray
    # int64, for each unit the puzzles without a vote for it, and all of them
    failures: np.ndarray
    puzzles: np.ndarray
    # Puzzles whose answer names a type twice: they count only for the cells whose type stands once in it
    repeated: int
    # Every single vote: unit, row of the cell, type, position in the puzzle, cells in it; int64 of shape (votes, 5)
    casts: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """How often each type was chosen when it was met; 0 where it never was."""
        return np.divide(self.votes, self.met, out=np.zeros_like(self.votes), where=self.met > 0)

    @property
    def weighed(self) -> np.ndarray:
        """The same, drawn towards 0 where they met seldom: what is compared when types compete."""
        return self.votes / (self.met + SMOOTHING)


def count(
    drafts: Sequence[Draft],
    texts: Sequence[str | None],
    n_units: int,
    types: Sequence[str],
    decoys: Sequence[str] = (),
    tables: Sequence[np.ndarray | None] | None = None,
) -> Tally:
    """Count votes; where the probabilities of an answer are known, a vote is divided among the types by them."""
    everything = (*types, *decoys)
    column = {name: j for j, name in enumerate(everything)}
    votes = np.zeros((n_units, len(everything)))
    met = np.zeros_like(votes)
    failures = np.zeros(n_units, dtype=np.int64)
    puzzles = np.zeros(n_units, dtype=np.int64)
    repeated = 0
    casts: list[tuple[int, int, int, int, int]] = []
    for draft, text, table in zip(drafts, texts, tables or [None] * len(drafts), strict=True):
        n = len(draft.members)
        if table is not None:
            columns = [column[name] for name in draft.candidates]
            for row, unit, cell in zip(table, draft.members, draft.cells, strict=True):
                puzzles[unit] += 1
                met[unit, columns] += 1
                votes[unit, columns] += row
                casts.append((unit, cell, columns[int(row.argmax())], 0, 1))  # each cell stood alone at the front
            continue
        (answer,) = read_answers([text], n)
        repeated += names_twice(answer)
        counted = vote_matrix([answer], draft.candidates, n)
        counted[:, counted.sum(axis=0) > 1] = 0
        columns = [column[name] for name in draft.candidates]
        for position, unit in enumerate(draft.members):
            puzzles[unit] += 1
            chosen = np.flatnonzero(counted[position])
            if not len(chosen):
                failures[unit] += 1
                continue
            met[unit, columns] += 1
            which = columns[int(chosen[0])]
            votes[unit, which] += 1
            casts.append((unit, draft.cells[position], which, position, n))
    return Tally(
        everything, len(decoys), votes, met, failures, puzzles, repeated, np.array(casts, dtype=np.int64).reshape(-1, 5)
    )


def together(tallies: Sequence[Tally]) -> Tally:
    """Add up what several models say of the same units."""
    first = tallies[0]
    votes, met, failures, puzzles = (
        sum(getattr(tally, name) for tally in tallies) for name in ("votes", "met", "failures", "puzzles")
    )
    repeated = sum(tally.repeated for tally in tallies)
    casts = np.concatenate([tally.casts for tally in tallies])
    return Tally(first.types, first.n_decoys, votes, met, failures, puzzles, repeated, casts)


def names_twice(answer: Sequence[str] | None) -> bool:
    """Say whether an answer names a type twice, so that one of the two cells must be wrong."""
    return answer is not None and len({name.lower() for name in answer}) < len(answer)


@dataclass(frozen=True, slots=True, eq=False)
class Calls:
    """What the votes say of each unit."""

    # int64, the type with most to be said for it; -1 without votes. Never a decoy
    best: np.ndarray
    # Float array, how often it was chosen when it was met; calibrated, where there is a map
    support: np.ndarray
    # Float array, the same before the map
    raw: np.ndarray
    # int64, the strongest other type, decoys included; -1 where no other type got a vote
    runner_up: np.ndarray
    # Float arrays: its support, and the difference. The margin is negative for a unit that gave way to another, or
    # whose best type has less support but met it more often
    runner_up_support: np.ndarray
    margin: np.ndarray
    # Float array, bits; NaN without votes
    entropy: np.ndarray
    # For each unit ``"ok"``, which alone means a label, ``"low_support"``, ``"tie"``, ``"decoy"`` or ``"no_votes"``
    status: tuple[str, ...]
    # The least support of a label, and how many labels are false where decoys have set it
    threshold: float
    false: FalseRate | None


def call(
    tally: Tally,
    allowed: np.ndarray,
    *,
    samples: Sequence[str],
    one_to_one: Sequence[str],
    min_support: float,
    max_false: float | None = None,
    adjust: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Calls:
    """Decide on the labels."""
    n_types = len(tally.types) - tally.n_decoys
    rates = tally.rates
    weighed = tally.weighed
    n_votes = tally.votes.sum(axis=1)
    best = np.full(len(rates), -1)
    voted = n_votes > 0
    names = np.asarray(samples, dtype=object)
    for sample in dict.fromkeys(samples):
        rows = np.flatnonzero((names == sample) & voted)
        if not len(rows):
            continue
        columns = np.flatnonzero(allowed[rows[0]])
        chosen = assign(weighed[np.ix_(rows, columns)], smoothing=SMOOTHING, one_to_one=sample in one_to_one)
        best[rows] = columns[chosen]
    rows = np.arange(len(rates))
    raw = np.where(voted, rates[rows, best], 0.0)
    others = rates.copy()
    others[rows[voted], best[voted]] = -1
    second = others.argmax(axis=1) if others.shape[1] > 1 else np.zeros(len(rates), dtype=np.int64)
    second_support = np.maximum(others[rows, second], 0.0)
    runner_up = np.where(second_support > 0, second, -1)
    entropy = vote_entropy(rates)
    entropy[~voted] = np.nan
    support = np.where(voted, adjust(raw), 0.0)
    status = []
    for i in rows.tolist():
        forced = names[i] in one_to_one
        if not voted[i]:
            status.append("no_votes")
        elif second[i] >= n_types and second_support[i] >= raw[i]:
            status.append("decoy")
        elif raw[i] == second_support[i] and not forced:
            status.append("tie")
        else:
            status.append("ok" if raw[i] > 0 else "low_support")
    threshold, false = min_support, None
    if max_false is not None:
        leading = np.array(status) == "ok"
        of_decoys = adjust(rates[:, n_types:][tally.met[:, n_types:] > 0])
        n_wrong = float(allowed.sum(axis=1).mean()) - 1
        false = find_threshold(support[leading], of_decoys, n_wrong, int(voted.sum()), max_false)
        threshold = false.threshold
    low = support < threshold
    status = ["low_support" if text == "ok" and low[i] else text for i, text in enumerate(status)]
    margin = raw - second_support
    return Calls(best, support, raw, runner_up, second_support, margin, entropy, tuple(status), threshold, false)


@dataclass(frozen=True, slots=True, eq=False)
class CellChecks:
    """How much the cells of a unit agree with each other."""

    # int64, cells of the unit that got votes
    cells: np.ndarray
    # Share of these cells whose own votes name the unit's type first; NaN without votes
    agreement: np.ndarray
    # Chance that two votes on one cell agree, less the chance that votes on two different cells do. Near 0 where
    # the cells are alike, however unsure the model is; large where each cell is clear and they differ, as in a
    # mixture of types (over-merged clusters, doublets). NaN unless some cell was asked twice and there are two
    # cells
    gap: np.ndarray
    # bool, whether ``gap`` is at least ``MIXED_GAP`` and twice its standard error among cells that are alike, and
    # ``agreement`` below ``MIXED_AGREEMENT``
    mixed: np.ndarray


def check_cells(tally: Tally, best: np.ndarray) -> CellChecks:
    """Compare the cells of each unit."""
    n_units = len(best)
    cells = np.zeros(n_units, dtype=np.int64)
    agreement = np.full(n_units, np.nan)
    gap = np.full(n_units, np.nan)
    needed = np.full(n_units, MIXED_GAP)
    casts = tally.casts[np.argsort(tally.casts[:, 0], kind="stable")]
    units, starts = np.unique(casts[:, 0], return_index=True)
    blocks = np.split(casts, starts[1:]) if len(units) else []
    for unit, block in zip(units.tolist(), blocks, strict=True):
        rows, own = np.unique(block[:, 1], return_inverse=True)
        table = np.zeros((len(rows), len(tally.types)))
        np.add.at(table, (own, block[:, 2]), 1)
        cells[unit] = len(rows)
        # A cell with two leading types agrees only if the unit's is not behind.
        agreement[unit] = float((table[:, best[unit]] == table.max(axis=1)).mean())
        gap[unit], error = _gap(table)
        needed[unit] = max(MIXED_GAP, 2 * error)
    mixed = (gap >= needed) & (agreement < MIXED_AGREEMENT)
    return CellChecks(cells, agreement, gap, mixed)


def _gap(table: np.ndarray) -> tuple[float, float]:
    """Return agreement within rows less agreement between rows, over all pairs of votes, and its standard error."""
    n = table.sum(axis=1)
    pairs_within = (n * (n - 1)).sum()
    pairs_between = n.sum() ** 2 - (n**2).sum()
    if not pairs_within or not pairs_between:
        return np.nan, np.nan
    within = (table * (table - 1)).sum() / pairs_within
    between = ((table.sum(axis=0) ** 2).sum() - (table**2).sum()) / pairs_between
    return float(within - between), float(np.sqrt(between * (1 - between) / (pairs_within / 2)))


def decoy_rate(tally: Tally) -> float:
    """Return how often a decoy was chosen when one was shown: an estimate of how often any wrong type is."""
    if not tally.n_decoys:
        return float("nan")
    chances = tally.met[:, -tally.n_decoys :].sum()
    return float(tally.votes[:, -tally.n_decoys :].sum() / chances) if chances else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class PositionBias:
    """How much it matters where in a puzzle a cell stands."""

    # For each position the votes, and the share of them for the unit's type
    n: np.ndarray
    agreement: np.ndarray
    # Of a chi-squared test that the share is the same everywhere; NaN where there is nothing to compare
    p_value: float


def position_bias(tally: Tally, best: np.ndarray) -> PositionBias:
    """Compare the positions in a puzzle; cells alone in theirs do not count."""
    casts = tally.casts[tally.casts[:, 4] > 1]
    if not len(casts):
        return PositionBias(np.zeros(0, dtype=np.int64), np.zeros(0), float("nan"))
    right = casts[:, 2] == best[casts[:, 0]]
    n = np.bincount(casts[:, 3])
    hits = np.bincount(casts[:, 3], weights=right)
    agreement = np.divide(hits, n, out=np.full(len(n), np.nan), where=n > 0)
    shown = n > 0
    table = np.array([hits[shown], n[shown] - hits[shown]])
    possible = shown.sum() > 1 and (table.sum(axis=1) > 0).all()
    p_value = float(chi2_contingency(table).pvalue) if possible else float("nan")
    return PositionBias(n, agreement, p_value)
