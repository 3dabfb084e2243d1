"""List what two puzzle files share: cells, donors, puzzles."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.data.fingerprints import (
    Fingerprint,
    all_have_ids,
    cell_keys,
    donor_keys,
    fingerprints_of,
    nameless_contexts,
)
from recipe.cello1.data.published import read_puzzle_file
from recipe.cello1.formats.atomic import atomic_write, check_place, dumps


@dataclass(frozen=True, slots=True)
class Shared:
    """How many of some kind there are on each side, and on both."""

    # Different ones on each side
    train: int
    test: int
    # Those of the test side that stand on the train side, too
    shared: int

    @property
    def per_cent(self) -> float:
        """Shared ones in per cent of the test side, to two digits."""
        return round(100 * self.shared / self.test, 2) if self.test else 0.0


@dataclass(frozen=True, slots=True)
class Audit:
    """What two sides share."""

    # Different cells and donors
    cells: Shared
    donors: Shared
    # Test puzzles that stand in train as they are shown
    puzzles: Shared
    # Further test puzzles whose cells make a train puzzle in another order or context
    reordered: Shared
    # Test puzzles with at least one cell, or their donor, in train
    puzzles_with_shared_cells: Shared
    puzzles_with_shared_donors: Shared
    # Test puzzles that share no cell with train
    clean_puzzles: int
    # Puzzles that name no donor, whose context stands for it
    donors_from_context: int

    @property
    def leaks(self) -> bool:
        """Whether anything is on both sides."""
        parts = (self.cells, self.donors, self.puzzles, self.reordered)
        return any(part.shared for part in parts)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it, with per cents."""
        found = asdict(self)
        for name, value in found.items():
            if isinstance(value, dict):
                value["per_cent_of_test"] = getattr(self, name).per_cent
        return {**found, "leaks": self.leaks}

    def lines(self) -> list[str]:
        """Return it as a table for people."""
        rows = [
            ("cells", self.cells),
            ("donors", self.donors),
            ("identical puzzles", self.puzzles),
            ("same cells in another order", self.reordered),
            ("test puzzles with a train cell", self.puzzles_with_shared_cells),
            ("test puzzles with a train donor", self.puzzles_with_shared_donors),
        ]
        table = [f"{'':32}{'train':>10}{'test':>10}{'shared':>10}{'of test':>9}"]
        table += [f"{name:32}{s.train:>10,}{s.test:>10,}{s.shared:>10,}{s.per_cent:>8.2f}%" for name, s in rows]
        table.append(f"test puzzles that share no cell with train: {self.clean_puzzles:,} of {self.puzzles.test:,}")
        if self.donors_from_context:
            table.append(
                f"puzzles that name no donor, so that their context stands for it: {self.donors_from_context:,}"
            )
        return table


def audit(train: Sequence[Fingerprint], test: Sequence[Fingerprint]) -> Audit:
    """Compare two sides."""
    have_ids = all_have_ids(train) and all_have_ids(test)
    train_keys = _joined([cell_keys(puzzle, have_ids) for puzzle in train])
    train_cells = _joined([_main_keys(puzzle, have_ids) for puzzle in train])
    hits = [_shared_cells(puzzle, have_ids, train_keys) for puzzle in test]
    test_cells = [_main_keys(puzzle, have_ids) for puzzle in test]
    shared_cells = _joined([cells[hit] for cells, hit in zip(test_cells, hits, strict=True)])
    with_cells = sum(bool(hit.any()) for hit in hits)

    nameless = nameless_contexts([*train, *test])
    train_donors = _joined([donor_keys(puzzle, nameless) for puzzle in train])
    donor_hits = [_inside(donor_keys(puzzle, nameless), train_donors).any() for puzzle in test]
    test_donors = {_main_donor(puzzle) for puzzle in test} - {None}
    shared_donors = {_main_donor(puzzle) for puzzle, hit in zip(test, donor_hits, strict=True) if hit}
    shown = {puzzle.shown for puzzle in train}
    cells_shown = {puzzle.cells_shown for puzzle in train}
    identical = [puzzle.shown in shown for puzzle in test]
    reordered = [puzzle.cells_shown in cells_shown and not same for puzzle, same in zip(test, identical, strict=True)]
    sizes = len(train), len(test)
    return Audit(
        Shared(len(train_cells), len(_joined(test_cells)), len(shared_cells)),
        Shared(len({_main_donor(puzzle) for puzzle in train} - {None}), len(test_donors), len(shared_donors)),
        Shared(*sizes, sum(identical)),
        Shared(*sizes, sum(reordered)),
        Shared(*sizes, with_cells),
        Shared(*sizes, sum(map(bool, donor_hits))),
        len(test) - with_cells,
        sum(puzzle.donor is None and puzzle.context is not None for puzzle in [*train, *test]),
    )


def _joined(keys: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *keys]))


def _main_keys(puzzle: Fingerprint, have_ids: bool) -> np.ndarray:
    """Return one key for each cell, to count cells by."""
    return puzzle.cell_ids if have_ids else puzzle.cell_genes


def _main_donor(puzzle: Fingerprint) -> int | None:
    """Return one key for the donor, to count donors by."""
    return puzzle.context if puzzle.donor is None else puzzle.donor


def _shared_cells(puzzle: Fingerprint, have_ids: bool, train_keys: np.ndarray) -> np.ndarray:
    """Say of each cell whether it is known on the other side by any of its keys."""
    hit = _inside(puzzle.cell_genes, train_keys)
    if have_ids:
        hit &= puzzle.telling
    for ids in (puzzle.cell_ids, puzzle.donor_cell_ids):
        if len(ids):
            hit |= _inside(ids, train_keys)
    return hit


def _inside(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("train", help="puzzle file (JSON, JSONL, or parquet, RL data too)")
    parser.add_argument("test", help="puzzle file")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--fail-on-leak", action="store_true", help="exit with 1 if they share anything")
    return parser


def run(args: argparse.Namespace) -> str | None:
    """Run the command."""
    if args.out:
        check_place(args.out)
    sides = [read_puzzle_file(path, variant=None) for path in (args.train, args.test)]
    if failures := [text for side in sides for text in side.failures]:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ValueError(f"{failures[0]}{more}; an audit needs every puzzle")
    result = audit(*[fingerprints_of(side.puzzles) for side in sides])
    print("\n".join(result.lines()))
    if args.out:
        atomic_write(args.out, dumps({"train": args.train, "test": args.test, **result.plain()}, 1) + "\n")
    if args.fail_on_leak and result.leaks:
        return "the two files share something (fail_on_leak=True)"
    return None
