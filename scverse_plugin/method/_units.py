"""What gets a label: a group of cells (over all donors, or of one sample), or a single cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that gets one label."""

    # Name of the group; of the cell where every cell is a unit of its own
    group: str
    # The sample whose candidates hold; empty where all samples share theirs
    sample: str
    # Rows of the cells drawn to stand for it
    cells: tuple[int, ...]
    # Donor of each of these cells; empty strings without donors
    donors: tuple[str, ...]


def draw_cells(rows: np.ndarray, donors: np.ndarray | None, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw cells of a group, from as many donors as possible."""
    if donors is None:
        return rng.choice(rows, size=min(n, len(rows)), replace=False, shuffle=True)
    order = rng.permutation(len(rows))
    codes = donors[order]
    # Turn of each cell: how many cells of its donor come before it.
    by_donor = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[by_donor], prepend=-1))
    turn = np.empty(len(rows), dtype=np.int64)
    turn[by_donor] = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    return rows[order[np.argsort(turn, kind="stable")[:n]]]
