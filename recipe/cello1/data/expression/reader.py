"""Cells of a stored matrix with their listed genes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from recipe.cello1.data.expression.matrix import Block, map_blocks, open_matrix
from recipe.cello1.data.expression.selection import SPOILED, column_sums, top_symbols
from recipe.cello1.data.expression.store import Store
from recipe.cello1.formats.stores import BadFileError
from recipe.cello1.task.gene_names import GeneNameError, gene_table, specificity

OnCells = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class GeneLists:
    """Which genes of a cell are listed, and from which matrix of the file."""

    # Genes listed for each cell, at most
    n_top: int = 50
    # Column of ``var`` with the gene symbols, or ``"index"``
    gene_column: str = "feature_name"
    # Which matrix is read
    layer: str | None = None
    use_raw: bool = False
    # Patterns of symbols to leave out, see :func:`recipe.cello1.task.gene_names.compile_patterns`
    exclude_genes: tuple[str, ...] = ()
    # One of :data:`recipe.cello1.task.gene_names.RANKS`
    rank_by: str = "expression"
    # Whether symbols are written in capitals: those of mouse genes as their human namesakes
    capitals: bool = False


class CellReader:
    """Reads the listed genes of cells."""

    def __init__(self, store: Store, lists: GeneLists, threads: int = 1, progress: OnCells | None = None) -> None:
        self.lists = lists
        self.threads = threads
        self.progress = progress or (lambda count: None)
        names = store.gene_names(lists.gene_column, raw=lists.use_raw)
        self.matrix = open_matrix(store.matrix(layer=lists.layer, use_raw=lists.use_raw), store.file)
        if self.matrix.shape != (store.n_obs, len(names)):
            raise BadFileError(
                f"its matrix is {self.matrix.shape[0]:,} x {self.matrix.shape[1]:,} for {store.n_obs:,} cells and "
                f"{len(names):,} genes",
                "write it with anndata, as cells x genes",
            )
        try:
            others = store.other_names(raw=lists.use_raw)
            self.genes = gene_table(names, lists.exclude_genes, others, capitals=lists.capitals)
        except GeneNameError as error:
            remedy = f"name the column of symbols: gene_column={error.column}" if error.column else error.remedy
            raise BadFileError(error.reason, remedy) from None
        # What is to be said of the genes and of the matrix.
        self.notes = [*store.notes, *self.matrix.notes, *self.genes.notes]
        self._names = np.array(self.genes.names, dtype=object)
        self.weights = self._specificity() if lists.rank_by == "specificity" else None

    def _specificity(self) -> np.ndarray:
        """Weigh each gene by how little it is expressed in the file."""
        n_cells, n_genes = self.matrix.shape

        def sums(block: Block) -> tuple[np.ndarray, int]:
            self.progress(len(block.rows))
            return column_sums(block, n_genes)

        if found := self.matrix.column_sums():
            total, counted = found
            self.progress(n_cells)
        else:
            total, counted = np.zeros(n_genes), 0
            for part, cells in map_blocks(self.matrix, sums, None, self.threads):
                total += part
                counted += cells
        return specificity(total, counted)

    def read(self, rows: np.ndarray | None = None) -> Iterator[tuple[int, tuple[str, ...] | None]]:
        """Read cells."""

        def top(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return block.rows, *top_symbols(block, self.genes, self.lists.n_top, self.weights)

        for found, ids, counts in map_blocks(self.matrix, top, rows, self.threads):
            self.progress(len(found))
            # The last entry of the names is never listed: ids are -1 only beyond the count.
            names = self._names[ids].tolist()
            for row, genes, count in zip(found.tolist(), names, counts.tolist(), strict=True):
                yield row, None if count == SPOILED else tuple(genes[:count])
