"""A puzzle (N cells of one donor, candidate types, gold), and the sampler that draws puzzles from labelled cells.

Training draws one cell per cell type; annotation draws one cell per cluster: the same sampler with another label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from recipe.cello1.task.answer import check_types, text_fault

GENE_SEPARATOR = ", "  # of the genes in a prompt


@dataclass(frozen=True, slots=True)
class Puzzle:
    """N cells and their candidate types.

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
        cells = _sequence("cells", self.cells)
        object.__setattr__(self, "cells", tuple(tuple(_sequence("a cell", genes)) for genes in cells))
        object.__setattr__(self, "candidates", tuple(_sequence("candidates", self.candidates)))
        if self.answer is not None:
            object.__setattr__(self, "answer", tuple(_sequence("answer", self.answer)))
        if not isinstance(self.meta, Mapping):
            msg = f"meta must be a mapping, got {type(self.meta).__name__}"
            raise ValueError(msg)
        object.__setattr__(self, "meta", dict(self.meta))
        self._check_cells()
        check_types("candidates", self.candidates)
        self._check_answer()
        # An empty context is allowed; it is then an empty label in the prompt.
        if self.context != "" and (fault := text_fault(self.context)):
            msg = f"context {fault}: {self.context!r}; give the sentences on one line"
            raise ValueError(msg)

    def _check_cells(self) -> None:
        if not self.cells:
            msg = "cells is empty; a puzzle needs at least one cell"
            raise ValueError(msg)
        for number, genes in enumerate(self.cells, start=1):
            if not genes:
                msg = f"cell {number} has no genes; leave cells without expression out"
                raise ValueError(msg)
            for gene in genes:
                if fault := _gene_fault(gene) if isinstance(gene, str) else text_fault(gene):
                    msg = f"cell {number}: the gene {gene!r} {fault}"
                    raise ValueError(msg)

    def _check_answer(self) -> None:
        if self.answer is None:
            return
        if len(self.answer) != len(self.cells):
            msg = f"answer has {len(self.answer)} types for {len(self.cells)} cells; give one for each cell"
            raise ValueError(msg)
        check_types("answer", self.answer)
        if self.candidates:
            known = set(self.candidates)
            strangers = [name for name in self.answer if name not in known]
            if strangers:
                msg = f"answer names {strangers}, not among the candidates {list(self.candidates)}"
                raise ValueError(msg)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.cells)


@lru_cache(maxsize=1 << 17)  # data sets name the same few ten thousand genes in millions of places
def _gene_fault(gene: str) -> str:
    fault = text_fault(gene)
    if not fault and gene != gene.strip():
        fault = "has white space around it"
    if not fault and GENE_SEPARATOR in gene:
        fault = f"contains {GENE_SEPARATOR!r}, which separates the genes"
    return fault


def _sequence(name: str, values: object) -> Sequence[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        msg = f"{name} must be a sequence of str, got {type(values).__name__}: {values!r}"
        raise ValueError(msg)
    return tuple(values)
