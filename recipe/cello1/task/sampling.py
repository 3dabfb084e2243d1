"""The sampler that draws puzzles from labelled cells.

Training draws one cell per cell type; annotation draws one cell per cluster: the same sampler with another label.
For each size the donors take turns in random order; types are drawn uniformly among those of the donor, cells uniformly
among those of the type. No set of cells is drawn twice for a size; there may be fewer than asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Protocol, TypeAlias

import numpy as np

from recipe.cello1.task.labels import Labels, make_labels


class Coded(Protocol):
    """A column of text as codes, such as a pandas categorical."""

    @property
    def codes(self) -> np.ndarray:
        """Position of each row's value in ``categories``, -1 for none."""
        ...

    @property
    def categories(self) -> Sequence[Any]:
        """The values."""
        ...


Column: TypeAlias = Sequence[str | None] | np.ndarray | Coded


@dataclass(frozen=True, slots=True)
class PuzzleIndex:
    """The rows that make one puzzle."""

    rows: tuple[int, ...]
    labels: tuple[str, ...]
    donor: str = ""
    batch: str = ""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The labels, sorted."""
        return tuple(sorted(self.labels))


@dataclass(frozen=True, slots=True)
class _Group:
    """The cells of one donor and batch: for each label present, its name and rows."""

    donor: str
    batch: str
    names: tuple[str, ...]
    rows: tuple[np.ndarray, ...]

    def n_sets(self, size: int) -> int:
        """Count the cell sets of one size with all labels different (elementary symmetric polynomial)."""
        ways = [1] + [0] * size
        for rows in self.rows:
            for k in range(size, 0, -1):
                ways[k] += ways[k - 1] * len(rows)
        return ways[size]

    def all_sets(self, size: int) -> list[tuple[tuple[int, int], ...]]:
        """List these sets as (label position, row) pairs."""
        return [
            tuple(zip(chosen, rows, strict=True))
            for chosen in combinations(range(len(self.rows)), size)
            for rows in product(*[self.rows[label].tolist() for label in chosen])
        ]


def sample_puzzles(
    labels: Column,
    donors: Column | None,
    *,
    sizes: Iterable[int],
    n_per_size: int,
    rng: np.random.Generator | int,
    batches: Column | None = None,
) -> list[PuzzleIndex]:
    """Draw puzzles: one cell for each of N different labels, all from one donor (and batch); see the module."""
    if rng is None:
        raise ValueError("rng is None; pass a numpy Generator or a seed, so that the puzzles can be drawn again")
    if isinstance(n_per_size, bool) or not isinstance(n_per_size, int | np.integer) or n_per_size < 1:
        raise ValueError(f"n_per_size must be a positive integer, got {n_per_size!r}")
    rng = np.random.default_rng(rng)
    groups = _groups(labels, donors, batches)
    return [puzzle for size in _sizes(sizes) for puzzle in _sample_size(groups, size, int(n_per_size), rng)]


def _sample_size(groups: list[_Group], size: int, wanted: int, rng: np.random.Generator) -> list[PuzzleIndex]:
    """Draw up to ``wanted`` puzzles of one size, the groups taking turns."""
    drawers = [_Drawer(group, size, wanted, rng) for group in groups if len(group.rows) >= size]
    found: list[PuzzleIndex] = []
    while drawers and len(found) < wanted:
        order = rng.permutation(len(drawers))
        for position in order[: wanted - len(found)]:
            found.append(drawers[position].draw())
        drawers = [drawer for drawer in drawers if drawer.left]
    return found


class _Drawer:
    """Draws different cell sets of one size from one group."""

    def __init__(self, group: _Group, size: int, wanted: int, rng: np.random.Generator) -> None:
        self.group = group
        self.size = size
        self.rng = rng
        self.left = group.n_sets(size)
        self.seen: set[tuple[tuple[int, int], ...]] = set()
        # With few sets, drawing until a new one comes up would take forever near the end: list and shuffle them.
        self.listed: list[tuple[tuple[int, int], ...]] | None = None
        if self.left <= 4 * wanted:
            everything = group.all_sets(size)
            self.listed = [everything[i] for i in rng.permutation(len(everything))]

    def draw(self) -> PuzzleIndex:
        """Return a set not returned before; ``left`` must not be 0."""
        cells = self.listed.pop() if self.listed is not None else self._new()
        self.left -= 1
        shuffled = [cells[i] for i in self.rng.permutation(self.size)]
        return PuzzleIndex(
            rows=tuple(row for _, row in shuffled),
            labels=tuple(self.group.names[label] for label, _ in shuffled),
            donor=self.group.donor,
            batch=self.group.batch,
        )

    def _new(self) -> tuple[tuple[int, int], ...]:
        while True:
            chosen = np.sort(self.rng.choice(len(self.group.rows), size=self.size, replace=False)).tolist()
            rows = [self.group.rows[label] for label in chosen]
            cells = tuple((label, int(r[self.rng.integers(len(r))])) for label, r in zip(chosen, rows, strict=True))
            if cells not in self.seen:
                self.seen.add(cells)
                return cells


def _sizes(sizes: Iterable[int]) -> list[int]:
    found = list(sizes)
    for size in found:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"sizes must hold positive integers, got {size!r}")
    if len(set(found)) != len(found):
        raise ValueError(f"sizes holds a size twice: {found}")
    return [int(size) for size in found]


def _groups(labels: Column, donors: Column | None, batches: Column | None) -> list[_Group]:
    """Sort the rows once by donor, batch and label; the groups come out sorted by name."""
    label_codes, label_names = _codes(labels, 0)
    n = len(label_codes)
    donor_codes, donor_names = _codes(donors, n)
    batch_codes, batch_names = _codes(batches, n)
    for name, codes in (("donors", donor_codes), ("batches", batch_codes)):
        if len(codes) != n:
            raise ValueError(f"{name} has {len(codes)} entries for {n} labels; give one for each cell")

    rows = np.flatnonzero((label_codes >= 0) & (donor_codes >= 0))
    # Batch codes are shifted by one: a missing batch is a batch of its own.
    group_codes = donor_codes[rows] * (len(batch_names) + 1) + batch_codes[rows] + 1
    keys = group_codes * max(len(label_names), 1) + label_codes[rows]
    rows = rows[np.argsort(keys, kind="stable")]
    keys = np.sort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    groups: dict[int, list[tuple[str, np.ndarray]]] = {}
    for start, chunk in zip(starts.tolist(), np.split(rows, starts[1:]) if len(starts) else [], strict=True):
        group, label = divmod(int(keys[start]), len(label_names))
        groups.setdefault(group, []).append((label_names[label], chunk))
    found = []
    for code, members in groups.items():
        donor, batch = divmod(code, len(batch_names) + 1)
        batch_name = batch_names[batch - 1] if batch else ""
        names, arrays = zip(*members, strict=True)
        found.append(_Group(donor_names[donor], batch_name, names, arrays))
    return found


def _codes(values: Column | None, n: int) -> tuple[np.ndarray, Sequence[str]]:
    """Return codes and names; without a column, one name for all."""
    if values is None:
        return np.zeros(n, dtype=np.int64), [""]
    found = values if isinstance(values, Labels) else make_labels(values)
    return found.codes.astype(np.int64), found.categories
