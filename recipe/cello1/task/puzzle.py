"""A puzzle: N cells of one donor, candidate types, gold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from recipe.cello1.task.answer import check_types, text_fault
from recipe.cello1.task.text import canonical_id, normal_form, shown

GENE_SEPARATOR = ", "  # of the genes in a prompt


@dataclass(frozen=True, slots=True)
class Puzzle:
    """N cells and their candidate types. Names of types are brought to normal form (NFC, nothing invisible in them).

    Attributes
    ----------
    cells
        For each cell its genes in descending order of expression.
    candidates
        Candidate types in the order they are shown (sorted, unless a study of position bias wants another order).
        There may be more than cells (decoys); none at all for the open-ended variants.
    answer
        Gold types in cell order; ``None`` when unknown.
    context
        Donor sentences on one line, without the ``Context:`` label.
    meta
        Anything else about the item that JSON can hold: ``donor_id``, ``dataset``, ``tissue``, ``disease``,
        ``cell_ids``, ``reasoning``... Not part of equality.

    Raises
    ------
    ValueError
        If the parts do not make a puzzle that can be written, read back and scored.
    """

    cells: tuple[tuple[str, ...], ...]
    candidates: tuple[str, ...]
    answer: tuple[str, ...] | None = None
    context: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        cells = [_sequence("a cell", genes) for genes in _sequence("cells", self.cells)]
        object.__setattr__(self, "cells", tuple(_checked_cell(n, genes) for n, genes in enumerate(cells, start=1)))
        if not isinstance(self.meta, Mapping):
            raise ValueError(f"meta must be a mapping, got {type(self.meta).__name__}")
        object.__setattr__(self, "meta", dict(self.meta))
        if not self.cells:
            raise ValueError("cells is empty; a puzzle needs at least one cell")
        object.__setattr__(self, "candidates", _checked_types("candidates", self.candidates))
        if self.answer is not None:
            self._check_answer()
        # An empty context is allowed; it is then an empty label in the prompt.
        if self.context != "" and (fault := text_fault(self.context)):
            raise ValueError(f"context {fault}: {shown(self.context)}; give the sentences on one line")

    def _check_answer(self) -> None:
        answer, known = _checked_types("answer", self.answer), set(self.candidates)
        object.__setattr__(self, "answer", answer)
        if len(answer) != len(self.cells):
            raise ValueError(f"answer has {len(answer)} types for {len(self.cells)} cells; give one for each cell")
        if known and (strangers := [name for name in answer if name not in known]):
            msg = f"answer names {shown(strangers)}, not among the candidates {shown(list(self.candidates), 400)}"
            raise ValueError(msg)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.cells)

    @property
    def cell_ids(self) -> tuple[str, ...]:
        """Ids of the cells, as ``meta`` has them; empty where that is no list of one for each cell."""
        ids: Any = self.meta.get("cell_ids")
        whole = isinstance(ids, list | tuple) and len(ids) == self.n_cells
        return tuple(map(str, ids)) if whole and all(isinstance(cell, str | int | float) for cell in ids) else ()


def _checked_cell(number: int, genes: tuple[Any, ...]) -> tuple[str, ...]:
    if not genes:
        raise ValueError(f"cell {number} has no genes; leave cells without expression out")
    found = []
    for gene in genes:
        fault, shared = _gene(gene) if isinstance(gene, str) else (text_fault(gene), "")
        if fault:
            raise ValueError(f"cell {number}: the gene {shown(gene)} {fault}")
        found.append(shared)
    return tuple(found)


# Data sets name the same few ten thousand genes in millions of places: one check and one object for each.
@lru_cache(maxsize=1 << 17)
def _gene(gene: str) -> tuple[str, str]:
    fault = text_fault(gene)
    if not fault and gene != gene.strip():
        fault = "has white space around it"
    if not fault and GENE_SEPARATOR in gene:
        fault = f"contains {GENE_SEPARATOR!r}, which separates the genes"
    return fault, gene


def _checked_types(name: str, types: object) -> tuple[str, ...]:
    found = _sequence(name, types)
    check_types(name, found)
    return tuple(map(_type, found))


@lru_cache(maxsize=1 << 14)
def _type(name: str) -> str:
    return normal_form(name)


def _sequence(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of str, got {type(values).__name__}: {shown(values)}")
    return tuple(values)


def labelled_cells(puzzles: Iterable[Puzzle]) -> list[tuple[tuple[str, ...], str, str]]:
    """Collect genes, type and donor of the cells of puzzles, each once: by ``cell_ids`` where given, else by content.

    Parameters
    ----------
    puzzles
        Puzzles with answers.

    Returns
    -------
    The cells in the order of the puzzles; the donor is empty where ``meta`` names none.

    Raises
    ------
    ValueError
        If a puzzle has no answer.
    """
    found: dict[object, tuple[tuple[str, ...], str, str]] = {}
    for number, puzzle in enumerate(puzzles):
        if puzzle.answer is None:
            raise ValueError(f"puzzle {number} has no answer; cells are taken from puzzles with known types")
        ids = puzzle.cell_ids
        for i, (genes, cell_type) in enumerate(zip(puzzle.cells, puzzle.answer, strict=True)):
            key: object = (puzzle.meta.get("dataset"), ids[i]) if ids else (genes, cell_type)
            found.setdefault(key, (genes, cell_type, canonical_id(puzzle.meta.get("donor_id"))))
    return list(found.values())
