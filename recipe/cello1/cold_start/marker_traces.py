"""Write reasoning traces from marker genes.

``python -m recipe.cello1 traces markers --cells train.h5ad --data puzzles.json --out sft.json``

The evidence comes from labelled training cells only. A trace has one line for each cell, which cites those genes of the
cell that speak most for its true type, and from the second line on names the candidates that are left::

    Cell 1: GNLY, NKG7, CD7 -> CD56+ NK
    Cell 2: LYZ, CST3, AIF1 (CD14+ Monocyte, CD19+ B) -> CD14+ Monocyte
    Cell 3: CD74, CD79A, HLA-DRA (CD19+ B) -> CD19+ B

The candidates that are left are what a batch tells beyond its cells: without them a small model used a type twice in
half of its answers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recipe.cello1.formats.items import REASONING_KEY
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.task.puzzle import Puzzle

Evidence = Mapping[str, Mapping[str, float]]


def marker_evidence(cells: Sequence[Sequence[str]], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure how much each gene speaks for each type."""
    # The share of the type's cells that list the gene, minus the mean of that share over the other types: 1 for a gene
    # that all cells of this type list and no others. Every type weighs the same, however many cells it has.
    if len(cells) != len(labels):
        msg = f"labels has {len(labels)} entries for {len(cells)} cells; give one for each cell"
        raise ValueError(msg)
    n_cells = Counter(labels)
    if len(n_cells) < 2:
        msg = f"labels holds {sorted(n_cells)}; evidence for a type needs at least one other type to compare with"
        raise ValueError(msg)
    listed: dict[str, Counter[str]] = {name: Counter() for name in sorted(n_cells)}
    for genes, label in zip(cells, labels, strict=True):
        listed[label].update(dict.fromkeys(genes, 1))
    genes = sorted({gene for counts in listed.values() for gene in counts})
    share = {name: {gene: counts[gene] / n_cells[name] for gene in genes} for name, counts in listed.items()}
    total = {gene: sum(share[name][gene] for name in share) for gene in genes}
    others = len(share) - 1
    return {
        name: {gene: own[gene] - (total[gene] - own[gene]) / others for gene in genes} for name, own in share.items()
    }


def best_markers(genes: Sequence[str], evidence: Mapping[str, float], n_genes: int) -> tuple[str, ...]:
    """Choose the genes of a cell that speak most for one type."""
    return tuple(sorted(genes, key=lambda gene: -evidence.get(gene, 0.0))[:n_genes])


def write_trace(puzzle: Puzzle, evidence: Evidence, n_genes: int = 3) -> str:
    """Write the reasoning for a puzzle with a known answer."""
    if n_genes < 1:
        msg = f"n_genes must be at least 1, got {n_genes}"
        raise ValueError(msg)
    if puzzle.answer is None:
        msg = "the puzzle has no answer; a trace argues for the true types"
        raise ValueError(msg)
    if unknown := [name for name in puzzle.answer if name not in evidence]:
        msg = f"no evidence for the types {unknown}; the training cells have {sorted(evidence)}"
        raise ValueError(msg)
    left = list(puzzle.candidates)
    lines = []
    for number, (genes, name) in enumerate(zip(puzzle.cells, puzzle.answer, strict=True), start=1):
        cited = ", ".join(best_markers(genes, evidence[name], n_genes))
        options = f" ({', '.join(left)})" if number > 1 else ""
        lines.append(f"Cell {number}: {cited}{options} -> {name}")
        left.remove(name)
    return "\n" + "\n".join(lines) + "\n"


def add_traces(puzzles: Iterable[Puzzle], evidence: Evidence, n_genes: int = 3) -> list[Puzzle]:
    """Add the reasoning to puzzles, as ``meta["reasoning"]``."""
    return [
        replace(puzzle, meta={**puzzle.meta, REASONING_KEY: write_trace(puzzle, evidence, n_genes)})
        for puzzle in puzzles
    ]


def read_cells(
    paths: Iterable[str | Path], n_top: int, *, type_column: str, gene_column: str, use_raw: bool = False
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Read the top genes and the types of labelled cells."""
    from recipe.cello1.data.expression.reader import CellReader, GeneLists
    from recipe.cello1.data.expression.store import Store

    lists = GeneLists(n_top=n_top, gene_column=gene_column, use_raw=use_raw)
    cells, labels = [], []
    for path in paths:
        with Store(path) as store:
            if type_column not in (columns := store.columns()):
                msg = f"--type-column {type_column}: {path} has no such column of obs; it has {', '.join(columns)}"
                raise ValueError(msg)
            types = store.labels(type_column)
            spoiled = 0
            for row, genes in CellReader(store, lists).read():
                if not (name := types.value(row)):
                    continue
                if genes is None:
                    spoiled += 1
                    continue
                cells.append(genes)
                labels.append(name)
            if spoiled:
                print(f"{path}: {spoiled} cells with NaN or infinity are left out", file=sys.stderr)
    return cells, labels


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", required=True, help="labelled training cells: h5ad files or zarr stores")
    parser.add_argument("--data", required=True, help="puzzles with answers: JSON or JSONL")
    parser.add_argument(
        "--out", required=True, help="the puzzles with traces: JSON or JSONL, for recipe.cello1.cold_start.sft"
    )
    parser.add_argument("--type-column", default="cell_type", help="column of obs with the types (default %(default)s)")
    parser.add_argument(
        "--gene-column", default="feature_name", help="column of var with the symbols, or index (default %(default)s)"
    )
    parser.add_argument("--use-raw", action="store_true", help="read raw instead of X")
    parser.add_argument("--n-genes", type=int, default=3, help="genes to cite for each cell (default %(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    data = load_puzzles(args.data, require_gold=True)
    puzzles = data.puzzles
    # Longer lists than the puzzles': how common a gene is elsewhere shows beyond the end of the list.
    n_top = 3 * max((len(genes) for puzzle in puzzles for genes in puzzle.cells), default=1)
    columns = {"type_column": args.type_column, "gene_column": args.gene_column, "use_raw": args.use_raw}
    evidence = marker_evidence(*read_cells(args.cells, n_top, **columns))
    write_puzzles(args.out, add_traces(puzzles, evidence, args.n_genes), data.variant)
    print(f"{len(puzzles)} puzzles with traces, evidence for {len(evidence)} types: {args.out}", file=sys.stderr)
