"""Make new puzzles of old ones: every gene of a cell comes from a random cell of the type.

``python -m recipe.cello1 recombine --prepared DATA --cells FOLDER --n 12000 --out new.json``

With a few hundred cells of each type a small model soon knows them by heart, and nothing of their types: one gave a
legal answer to 95% of the training puzzles and to 24% of the test puzzles. A recombined cell has each gene at the place
that it takes in the list of a random cell of the type, and lacks a random part of its genes, as in a shallower
sequencing run. The cells are those of the training puzzles in DATA, which ``prepare`` has written, of whatever donor,
read once more and further down from the same files. The puzzles take their types and their donor from these, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from recipe.cello1.data.expression.reader import CellReader, GeneLists
from recipe.cello1.data.expression.store import SUFFIXES, Store
from recipe.cello1.formats.atomic import check_place, read_json
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.task.order import order_by_size
from recipe.cello1.task.puzzle import Puzzle

DEPTH = 100  # genes read of each cell: what comes up where others are lost
_MOST_CELLS = 500  # of a type
_KEPT = ("donor_id", "batch", "dataset", "tissue", "disease")


class Recombiner:
    """Makes cells of a type from the ranked genes of others."""

    def __init__(self, cells: Sequence[Sequence[str]]) -> None:
        self._genes = np.array(sorted({gene for cell in cells for gene in cell}), dtype=object)
        column = {gene: i for i, gene in enumerate(self._genes.tolist())}
        self._places = np.full((len(cells), len(self._genes)), np.inf, dtype=np.float32)
        for row, cell in enumerate(cells):
            self._places[row, [column[gene] for gene in cell]] = np.arange(len(cell))

    def make(self, n_top: int, lost: tuple[float, float], rng: np.random.Generator) -> tuple[str, ...]:
        """Make a cell."""
        columns = np.arange(len(self._genes))
        places = self._places[rng.integers(len(self._places), size=len(columns)), columns]
        # Genes of the same place come in random order: each was alone there in a cell of its own.
        order = np.lexsort((rng.random(len(columns)), places))[: int(np.isfinite(places).sum())]
        kept = order[rng.random(len(order)) >= rng.uniform(*lost)]
        return tuple(self._genes[(kept if len(kept) >= n_top else order)[:n_top]].tolist())


def recombine(
    puzzles: Sequence[Puzzle],
    cells: Mapping[str, Sequence[Sequence[str]]],
    n: int,
    n_top: int,
    lost: tuple[float, float],
    rng: np.random.Generator,
) -> list[Puzzle]:
    """Make puzzles with the types and donors of others, of every size the same share of any stretch."""
    of_type = {name: Recombiner(own) for name, own in sorted(cells.items())}
    drawn = [i for _ in range(-(-n // len(puzzles))) for i in rng.permutation(len(puzzles)).tolist()][:n]
    made = []
    for position in order_by_size([puzzles[i].n_cells for i in drawn], "mixed", rng):
        old = puzzles[drawn[position]]
        answer = [(old.answer or ())[i] for i in rng.permutation(old.n_cells)]
        lists = tuple(of_type[name].make(n_top, lost, rng) for name in answer)
        meta = {name: old.meta[name] for name in _KEPT if name in old.meta}
        made.append(Puzzle(lists, old.candidates, tuple(answer), old.context, meta))
    return made


def read_again(
    puzzles: Sequence[Puzzle], inputs: Sequence[Path], lists: GeneLists, rng: np.random.Generator
) -> dict[str, list[tuple[str, ...]]]:
    """Read the cells of puzzles once more, by type."""
    known: dict[str, dict[str, str]] = {}  # data set -> cell -> type
    for number, puzzle in enumerate(puzzles):
        if not puzzle.cell_ids or "dataset" not in puzzle.meta:
            msg = f"puzzle {number} has no cell_ids; give puzzles that prepare has made from expression files"
            raise ValueError(msg)
        known.setdefault(str(puzzle.meta["dataset"]), {}).update(zip(puzzle.cell_ids, puzzle.answer or (), strict=True))
    found: dict[str, list[tuple[str, ...]]] = {}
    for name, types in sorted(known.items()):
        with Store(_find(name, inputs)) as store:
            ids, _ = store.cell_ids(np.arange(store.n_obs))
            of_type: dict[str, list[int]] = {}
            for row, cell in enumerate(ids):
                if cell in types:
                    of_type.setdefault(types[cell], []).append(row)
            chosen = {
                row: kind for kind, rows in of_type.items() for row in rng.permutation(rows)[:_MOST_CELLS].tolist()
            }
            for row, genes in CellReader(store, lists).read(np.array(sorted(chosen), dtype=np.int64)):
                if genes:
                    found.setdefault(chosen[row], []).append(genes)
    if missing := sorted({name for types in known.values() for name in types.values()} - found.keys()):
        msg = f"inputs has no cells of {missing} with the ids of the puzzles; give the files that prepare has read"
        raise ValueError(msg)
    return found


def _find(name: str, inputs: Sequence[Path]) -> Path:
    """Find the file of a data set, which is called as its path below the input without suffix."""
    below = [path / f"{name}{suffix}" for path in inputs for suffix in SUFFIXES if path.suffix not in SUFFIXES]
    for path in [*(path for path in inputs if path.stem == name), *below]:
        if path.exists():
            return path
    msg = f"inputs has no file of the data set {name!r}; give what prepare was given, not {', '.join(map(str, inputs))}"
    raise FileNotFoundError(msg)


def shares(text: str) -> tuple[float, float]:
    """Read a range of shares."""
    low, _, high = text.partition("-")
    try:
        found = float(low), float(high or low)
    except ValueError:
        found = -1.0, -1.0
    if not 0 <= found[0] <= found[1] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of shares; write 0-0.7, for example")
    return found


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prepared", required=True, type=Path, help="folder that prepare has written")
    parser.add_argument("--cells", required=True, nargs="+", type=Path, help="the INPUT that prepare was given")
    parser.add_argument("--out", required=True, type=Path, help="the new puzzles: JSON or JSONL")
    parser.add_argument("--n", type=int, required=True, help="how many puzzles")
    parser.add_argument(
        "--lose-genes",
        type=shares,
        default=(0.0, 0.7),
        metavar="LOW-HIGH",
        help="share of its genes that a cell loses (0-0.7)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of everything drawn (%(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_place(args.out)
    if args.n < 1 or args.seed < 0:
        raise ValueError(f"n must be at least 1 and seed= at least 0, got {args.n} and {args.seed}")
    settings = read_json(args.prepared / "manifest.json")["settings"]
    given = {item.name: settings[item.name] for item in fields(GeneLists)}
    lists = GeneLists(**given | {"n_top": DEPTH, "exclude_genes": tuple(settings["exclude_genes"])})
    data = load_puzzles(args.prepared / "train" / "train_data.json", require_gold=True)
    rng = np.random.default_rng(args.seed)
    cells = read_again(data.puzzles, args.cells, lists, rng)
    made = recombine(data.puzzles, cells, args.n, settings["n_top"], args.lose_genes, rng)
    write_puzzles(args.out, made, data.variant)
    n_cells = sum(map(len, cells.values()))
    print(f"{len(made)} puzzles recombined from {n_cells} cells of {len(cells)} types: {args.out}", file=sys.stderr)
