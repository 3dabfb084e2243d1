"""Which cells and candidates meet in a puzzle.

One-to-one holds only inside a puzzle whose cells are of different types. Two groups of one type in the same puzzle
force one of them to a wrong answer, and so does a list that lacks the right type. Therefore members, orders and
candidate subsets change from round to round, and a vote is counted against how often group and type have met.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scverse_plugin.method._units import Unit

LARGEST_PUZZLE = 8  # cells; the smallest size that the published models are trained on
LARGEST_LIST = 15  # candidates; the largest size of the same data


@dataclass(frozen=True, slots=True)
class Draft:
    """A puzzle before genes and texts are filled in."""

    # Number of the round
    round: int
    # Donor of all cells
    donor: str
    # Position of each unit, in cell order
    members: tuple[int, ...]
    # Row of each cell
    cells: tuple[int, ...]
    # Types in the order they are shown
    candidates: tuple[str, ...]
    # Whether it only serves to shorten the list of candidates
    screening: bool = False


def choose_puzzle_size(n_units: int, n_types: int, *, cells: bool) -> int:
    """Choose how many cells a puzzle has."""
    if cells or n_types < 2:
        return 1
    if n_units > n_types:
        return max(1, min(LARGEST_PUZZLE, n_types // 2))
    return max(1, min(LARGEST_PUZZLE, n_units, n_types))


class Members:
    """Draws, round by round, which units meet; each is in at least one puzzle of every round."""

    def __init__(
        self, units: Sequence[Unit], size: Mapping[str, int], rng: np.random.Generator, full: Collection[str] = ()
    ) -> None:
        self.units = units
        self.size = size
        self.rng = rng
        self.full = full  # donors whose puzzles are filled up
        self._uses = [np.zeros(len(unit.cells), dtype=np.int64) for unit in units]
        here: dict[str, list[int]] = {}
        for position, unit in enumerate(units):
            for donor in dict.fromkeys(unit.donors):
                here.setdefault(donor, []).append(position)
        self._here = {donor: np.array(positions) for donor, positions in here.items()}

    def round(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Draw one round."""
        done = np.zeros(len(self.units), dtype=bool)
        puzzles = []
        for first in self.rng.permutation(len(self.units)).tolist():
            if done[first]:
                continue
            donor = self.units[first].donors[self._least_used(first)]
            here = self._here[donor]
            others = here[~done[here] & (here != first)]
            size = self.size[donor]
            waiting = 1 + len(others)
            n = -(-waiting // -(-waiting // size))  # as even as the sizes can be
            chosen = [first, *self.rng.choice(others, n - 1, replace=False).tolist()]
            # A few left over would make a puzzle that says little: others join them once more.
            if len(chosen) < (wanted := min(len(here), size, size if donor in self.full else max(2, size // 2))):
                spare = np.setdiff1d(here, chosen)
                chosen += self.rng.choice(spare, wanted - len(chosen), replace=False).tolist()
            chosen = [chosen[i] for i in self.rng.permutation(len(chosen))]
            done[chosen] = True
            puzzles.append((donor, tuple(chosen), tuple([self._cell(unit, donor) for unit in chosen])))
        return puzzles

    def _least_used(self, unit: int, donor: str | None = None) -> int:
        uses = self._uses[unit]
        if len(uses) == 1:
            return 0
        allowed = [i for i, name in enumerate(self.units[unit].donors) if donor in (None, name)]
        fewest = min(uses[i] for i in allowed)
        allowed = [i for i in allowed if uses[i] == fewest]
        return allowed[int(self.rng.integers(len(allowed)))]

    def _cell(self, unit: int, donor: str) -> int:
        which = self._least_used(unit, donor)
        self._uses[unit][which] += 1
        return self.units[unit].cells[which]


def candidate_blocks(types: Sequence[str], size: int, rng: np.random.Generator) -> list[list[str]]:
    """Deal the types into lists that fit a puzzle, each type at least once."""
    order = [types[i] for i in rng.permutation(len(types))]
    blocks = [order[i : i + size] for i in range(0, len(order), size)]
    lacking = size - len(blocks[-1])
    if len(blocks) > 1 and lacking:
        others = [name for block in blocks[:-1] for name in block]
        blocks[-1] += [others[i] for i in rng.choice(len(others), lacking, replace=False)]
    return blocks


def leading_candidates(
    rates: np.ndarray, types: Sequence[str], members: Sequence[int], size: int, rng: np.random.Generator
) -> list[str]:
    """Choose the types that the members of a puzzle are likely to be: the best of each, the second best of each..."""
    noise = rng.random((len(members), len(types)))
    order = np.lexsort((noise, -rates[list(members)]), axis=1)
    found: dict[int, None] = {}
    for rank in range(len(types)):
        for row in rng.permutation(len(members)):
            if len(found) == size:
                return [types[i] for i in found]
            found[int(order[row, rank])] = None
    return [types[i] for i in found]


def arrange(candidates: Sequence[str], rng: np.random.Generator | None) -> tuple[str, ...]:
    """Order the candidates of a puzzle."""
    ordered = sorted(candidates)
    return tuple(ordered) if rng is None else tuple([ordered[i] for i in rng.permutation(len(ordered))])
