"""Which genes of a cell are listed: those with the largest values, the largest first.

Tie rule: equal values are listed in gene order, the order of the columns. Genes that a cell does not express (value 0)
are never listed. A symbol that stands for several columns counts once, with its largest value.
:func:`recipe.cello1.cells.top_genes` gives the same for a matrix in memory; this one is for blocks of millions.
"""

from __future__ import annotations

import numba
import numpy as np
import scipy.sparse as sp

from recipe.cello1.data.gene_filters import GeneTable
from recipe.cello1.data.matrix import Block
from recipe.cello1.data.store import BadFileError

_UNORDERED, _NEGATIVE, _NOT_FINITE, _NO_COLUMN = 1, 2, 3, 4


def top_symbols(
    block: Block, genes: GeneTable, n_top: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """List the top symbols of each row.

    Parameters
    ----------
    block
        The rows.
    genes
        Which symbol each column stands for.
    n_top
        How many to list at most.
    weights
        float64, one positive factor for each column, by which values are multiplied first. ``None``: as they are.

    Returns
    -------
    int32 (rows x ``n_top``): positions in ``genes.names``, filled up with -1; and int64: how many symbols each row
    expresses, ``n_top`` standing for that many or more.

    Raises
    ------
    BadFileError
        If a value is NaN, infinite or negative.
    """
    n_rows = len(block.rows)
    out = np.full((n_rows, n_top), -1, dtype=np.int32)
    counts = np.zeros(n_rows, dtype=np.int64)
    factors = np.empty(0) if weights is None else weights
    tables = (genes.symbol, genes.repeated, genes.has_repeats, factors, n_top, out, counts)
    if block.indices is None:
        row, status = _select_dense(block.values, *tables)
    else:
        row, status = _select_sparse(block.indptr, block.indices, block.values, *tables)
        if status == _UNORDERED:
            fixed = _in_order(block, len(genes.symbol))
            row, status = _select_sparse(fixed.indptr, fixed.indices, fixed.values, *tables)
    if status:
        _refuse(status, int(block.rows[row]))
    return out, counts


def _refuse(status: int, row: int) -> None:
    if status == _NEGATIVE:
        raise BadFileError(
            f"its matrix holds a negative value in row {row}, as scaled data do",
            "take counts or log-normalised values with --layer or --use-raw",
        )
    if status == _NOT_FINITE:
        raise BadFileError(
            f"its matrix holds NaN or infinity in row {row}",
            "remove these cells, or take other values with --layer or --use-raw",
        )
    raise BadFileError(
        f"its sparse matrix names a gene that it does not have in row {row}",
        "the file is damaged: fetch or write it again",
    )


def _in_order(block: Block, n_columns: int) -> Block:
    """Sort each row by column and add up values stored for the same place, as scipy does."""
    matrix = sp.csr_array((block.values, block.indices, block.indptr), shape=(len(block.rows), n_columns), copy=True)
    matrix.sum_duplicates()
    return Block(block.rows, matrix.data, matrix.indices, matrix.indptr.astype(np.int64))


def column_sums(block: Block, n_columns: int) -> np.ndarray:
    """Add up each column.

    Parameters
    ----------
    block
        The rows.
    n_columns
        Number of columns.

    Returns
    -------
    float64, one sum for each column.

    Raises
    ------
    BadFileError
        If a value is NaN or infinite.
    """
    if block.indices is None:
        sums = block.values.sum(axis=0, dtype=np.float64)
    else:
        if len(block.indices) and not 0 <= int(block.indices.min()) <= int(block.indices.max()) < n_columns:
            _refuse(_NO_COLUMN, int(block.rows[0]))
        sums = np.zeros(n_columns)
        _add_columns(block.indices, block.values, sums)
    if not np.isfinite(sums).all():
        _refuse(_NOT_FINITE, int(block.rows[0]))
    return sums


# ---------------------------------------------------------------------------------------------------- compiled code
# A heap of the best values so far, the worst of them at the root: of equal values the later column is the worse.


def _compiled(**options):
    """Compile, and keep the result on disk where there is a place for it."""

    def decorate(function):
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # a read-only installation without a home
            return numba.njit(nogil=True, **options)(function)

    return decorate


@_compiled()
def _add_columns(indices, values, sums):  # pragma: no cover - compiled
    for i in range(len(indices)):
        sums[indices[i]] += values[i]


@_compiled()
def _sink(value, column, symbol, size, at):  # pragma: no cover - compiled
    """Move an entry that may be too good for its place away from the root."""
    v, c, s = value[at], column[at], symbol[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            value[right] < value[child] or (value[right] == value[child] and column[right] > column[child])
        ):
            child = right
        if not (value[child] < v or (value[child] == v and column[child] > c)):
            break
        value[at], column[at], symbol[at] = value[child], column[child], symbol[child]
        at = child
    value[at], column[at], symbol[at] = v, c, s


@_compiled()
def _offer(value, column, symbol, size, v, c, s, may_repeat):  # pragma: no cover - compiled
    """Take an entry into the heap if it belongs there; columns come in ascending order. Returns the new size."""
    limit = len(value)
    if size == limit and v <= value[0]:
        return size
    if may_repeat:
        for at in range(size):
            if symbol[at] == s:
                if v > value[at]:
                    value[at], column[at] = v, c
                    _sink(value, column, symbol, size, at)
                return size
    if size == limit:
        value[0], column[0], symbol[0] = v, c, s
        _sink(value, column, symbol, size, 0)
        return size
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if not (v < value[parent] or (v == value[parent] and c > column[parent])):
            break
        value[at], column[at], symbol[at] = value[parent], column[parent], symbol[parent]
        at = parent
    value[at], column[at], symbol[at] = v, c, s
    return size + 1


@_compiled()
def _drain(value, column, symbol, size, out):  # pragma: no cover - compiled
    """Write the symbols of the heap, the best first."""
    while size > 0:
        size -= 1
        out[size] = symbol[0]
        value[0], column[0], symbol[0] = value[size], column[size], symbol[size]
        _sink(value, column, symbol, size, 0)


@_compiled()
def _select_sparse(
    indptr, indices, values, symbols, repeated, has_repeats, weights, n_top, out, counts
):  # pragma: no cover - compiled
    value, column, symbol = np.empty(n_top), np.empty(n_top, np.int64), np.empty(n_top, np.int32)
    n_columns = len(symbols)
    weighted = len(weights) > 0
    for row in range(len(indptr) - 1):
        size = 0
        last = -1
        for i in range(indptr[row], indptr[row + 1]):
            c = np.int64(indices[i])
            if c <= last:
                if c < 0:
                    return row, _NO_COLUMN
                return row, _UNORDERED
            last = c
            if c >= n_columns:
                return row, _NO_COLUMN
            v = np.float64(values[i])
            if not v > 0.0:
                if v == 0.0:
                    continue
                if v < 0.0:
                    return row, _NEGATIVE
                return row, _NOT_FINITE
            if v == np.inf:
                return row, _NOT_FINITE
            if weighted:
                v *= weights[c]
            if size == n_top and v <= value[0]:
                continue
            s = symbols[c]
            if s < 0:
                continue
            size = _offer(value, column, symbol, size, v, c, s, has_repeats and repeated[s])
        counts[row] = size
        _drain(value, column, symbol, size, out[row])
    return 0, 0


@_compiled()
def _select_dense(values, symbols, repeated, has_repeats, weights, n_top, out, counts):  # pragma: no cover - compiled
    value, column, symbol = np.empty(n_top), np.empty(n_top, np.int64), np.empty(n_top, np.int32)
    weighted = len(weights) > 0
    for row in range(values.shape[0]):
        size = 0
        for c in range(values.shape[1]):
            v = np.float64(values[row, c])
            if not v > 0.0:
                if v == 0.0:
                    continue
                if v < 0.0:
                    return row, _NEGATIVE
                return row, _NOT_FINITE
            if v == np.inf:
                return row, _NOT_FINITE
            if weighted:
                v *= weights[c]
            if size == n_top and v <= value[0]:
                continue
            s = symbols[c]
            if s < 0:
                continue
            size = _offer(value, column, symbol, size, v, c, s, has_repeats and repeated[s])
        counts[row] = size
        _drain(value, column, symbol, size, out[row])
    return 0, 0
