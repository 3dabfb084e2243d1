"""Write reasoning traces from marker genes.

``python -m recipe.cello1 traces markers --cells train.h5ad --data puzzles.json --out sft.json``

The evidence comes from labelled training cells only: of h5ad files, or those of training puzzles. A trace has one line
for each cell: the genes of the cell that speak most for its type, and the type::

    Cell 1: GNLY, NKG7, CD7 -> CD56+ NK
    Cell 2: LYZ, CST3, AIF1 -> CD14+ Monocyte
    Cell 3: CD74, CD79A, HLA-DRA -> CD19+ B

``--cite top`` names the first genes of the cell instead: copied as they stand they are easier to learn than a choice
among them, and a small model takes fewer of them from another cell. What is left of the candidates is not written
down: a model that reads it there learns to rule out instead of to recognise, and one wrong type makes others wrong.

With ``--teacher markers`` the traces are those of a teacher who does not see the answer: the matching with the highest
sum of marker scores, of the cells of other donors where puzzle files, or ``--donor-column``, name them. Puzzles that it
gets wrong are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment

from recipe.cello1.formats.atomic import check_place
from recipe.cello1.formats.items import REASONING_KEY
from recipe.cello1.formats.puzzle_files import PUZZLE_SUFFIXES, load_puzzles, write_puzzles
from recipe.cello1.task.puzzle import Puzzle, labelled_cells
from recipe.cello1.task.text import canonical_id
from recipe.cello1.task.trace import trace_line

MarkerEvidence = Mapping[str, Mapping[str, float]]
Cited = Literal["markers", "top"]


def marker_evidence(cells: Sequence[Sequence[str]], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measure how much each gene speaks for each type."""
    # The share of the type's cells that list the gene, minus the mean of that share over the other types: 1 for a gene
    # that all cells of this type list and no others. Every type weighs the same, however many cells it has.
    if len(cells) != len(labels):
        raise ValueError(f"labels has {len(labels)} entries for {len(cells)} cells; give one for each cell")
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


def write_trace(puzzle: Puzzle, evidence: MarkerEvidence, n_genes: int = 3, cite: Cited = "markers") -> str:
    """Write the reasoning for a puzzle with a known answer."""
    if n_genes < 1:
        raise ValueError(f"n_genes must be at least 1, got {n_genes}")
    if puzzle.answer is None:
        raise ValueError("the puzzle has no answer; a trace argues for the true types")
    if unknown := [name for name in puzzle.answer if name not in evidence]:
        raise ValueError(f"no evidence for the types {unknown}; the training cells have {sorted(evidence)}")
    lines = []
    for number, (genes, name) in enumerate(zip(puzzle.cells, puzzle.answer, strict=True), start=1):
        named = genes[:n_genes] if cite == "top" else best_markers(genes, evidence[name], n_genes)
        lines.append(trace_line(number, named, name))
    return "\n" + "\n".join(lines) + "\n"


def add_traces(
    puzzles: Iterable[Puzzle], evidence: MarkerEvidence, n_genes: int = 3, cite: Cited = "markers"
) -> list[Puzzle]:
    """Add the reasoning to puzzles, as ``meta["reasoning"]``."""
    return [
        replace(puzzle, meta={**puzzle.meta, REASONING_KEY: write_trace(puzzle, evidence, n_genes, cite)})
        for puzzle in puzzles
    ]


def marker_answer(puzzle: Puzzle, evidence: MarkerEvidence) -> tuple[str, ...]:
    """Solve a puzzle by its markers: the matching with the highest sum of scores."""
    known = [evidence.get(name, {}) for name in puzzle.candidates]
    scores = np.array([[sum(own.get(gene, 0.0) for gene in genes) for own in known] for genes in puzzle.cells])
    return tuple(puzzle.candidates[j] for j in linear_sum_assignment(scores, maximize=True)[1].tolist())


def teach(
    puzzles: Iterable[Puzzle],
    evidence_of: Callable[[Puzzle], MarkerEvidence],
    n_genes: int = 3,
    cite: Cited = "markers",
) -> list[Puzzle]:
    """Keep the puzzles that a teacher without the answer gets right, with its reasoning."""
    kept = []
    for puzzle in puzzles:
        evidence = evidence_of(puzzle)
        if evidence.keys() >= {*(puzzle.answer or ())} and marker_answer(puzzle, evidence) == puzzle.answer:
            kept += add_traces([puzzle], evidence, n_genes, cite)
    return kept


def read_cells(
    paths: Iterable[str | Path],
    n_top: int,
    *,
    type_column: str,
    gene_column: str,
    donor_column: str | None = None,
    use_raw: bool = False,
) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """Read the top genes, the types and the donors of labelled cells."""
    from recipe.cello1.data.expression.reader import CellReader, GeneLists
    from recipe.cello1.data.expression.store import Store

    lists = GeneLists(n_top=n_top, gene_column=gene_column, use_raw=use_raw)
    cells: list[tuple[str, ...]] = []
    labels: list[str] = []
    donors: list[str] = []
    for path in map(Path, paths):
        if path.suffix in PUZZLE_SUFFIXES:
            for found, name, donor in labelled_cells(load_puzzles(path, require_gold=True).puzzles):
                cells.append(found)
                labels.append(name)
                donors.append(donor)
            continue
        with Store(path) as store:
            for name, column in (("type_column", type_column), ("donor_column", donor_column)):
                if column is not None and column not in (columns := store.columns()):
                    raise ValueError(f"{name}: {path} has no column {column!r} of obs; it has {', '.join(columns)}")
            types = store.labels(type_column)
            owners = store.labels(donor_column, canonical_id) if donor_column else None
            spoiled = 0
            for row, genes in CellReader(store, lists).read():
                if not (name := types.value(row)):
                    continue
                if genes is None:
                    spoiled += 1
                    continue
                cells.append(genes)
                labels.append(name)
                donors.append(owners.value(row) or "" if owners else "")
            if spoiled:
                print(f"{path}: {spoiled} cells with NaN or infinity are left out", file=sys.stderr)
    return cells, labels, donors


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--cells",
        nargs="+",
        required=True,
        help="labelled training cells: h5ad files, zarr stores, or training puzzles",
    )
    parser.add_argument("--data", required=True, help="puzzles with answers: JSON or JSONL")
    parser.add_argument(
        "--out", required=True, help="the puzzles with traces: JSON or JSONL, for recipe.cello1.cold_start.sft"
    )
    parser.add_argument("--type-column", default="cell_type", help="column of obs with the types (default %(default)s)")
    parser.add_argument(
        "--gene-column", default="feature_name", help="column of var with the symbols, or index (default %(default)s)"
    )
    parser.add_argument(
        "--teacher",
        default="gold",
        choices=("gold", "markers"),
        help="who answers: gold knows the answer, markers does not, and only puzzles it gets right are kept",
    )
    parser.add_argument(
        "--donor-column",
        help="with --teacher markers and h5ad files: column of obs with the donors; a puzzle's own is left out",
    )
    parser.add_argument("--use-raw", action="store_true", help="read raw instead of X")
    parser.add_argument("--n-genes", type=int, default=3, help="genes to cite for each cell (default %(default)s)")
    parser.add_argument(
        "--cite",
        default="markers",
        choices=get_args(Cited),
        help="markers: the genes that speak most for the type | top: the first of the cell's list",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_place(args.out)
    if args.donor_column and args.teacher == "gold":
        raise ValueError("donor_column needs teacher='markers'")
    data = load_puzzles(args.data, require_gold=True)
    puzzles = data.puzzles
    # Longer lists than the puzzles': how common a gene is elsewhere shows beyond the end of the list.
    n_top = 3 * max((len(genes) for puzzle in puzzles for genes in puzzle.cells), default=1)
    columns = {name: getattr(args, name) for name in ("type_column", "gene_column", "donor_column", "use_raw")}
    cells, labels, donors = read_cells(args.cells, n_top, **columns)

    @cache
    def evidence_without(donor: str) -> MarkerEvidence:
        rows = [i for i, other in enumerate(donors) if not donor or other != donor]
        return marker_evidence([cells[i] for i in rows], [labels[i] for i in rows])

    def evidence_of(puzzle: Puzzle) -> MarkerEvidence:
        return evidence_without(canonical_id(puzzle.meta.get("donor_id")))

    if args.teacher == "markers":
        traced = teach(puzzles, evidence_of, args.n_genes, args.cite)
    else:
        traced = add_traces(puzzles, evidence_without(""), args.n_genes, args.cite)
    if not traced:
        msg = "the teacher gets no puzzle right; give cells with the types of the puzzles, or teacher='gold'"
        raise ValueError(msg)
    write_puzzles(args.out, traced, data.variant)
    print(
        f"{len(traced)} of {len(puzzles)} puzzles with traces, from {len(set(labels))} types: {args.out}",
        file=sys.stderr,
    )
