"""Which genes of a cell are listed: those with the largest values, the largest first.

Tie rule: equal values are listed in gene order, the order of the columns. Genes that a cell does not express (value 0)
are never listed. A symbol that stands for several columns counts once, with its largest value.
:func:`recipe.cello1.cells.top_genes` gives the same for a matrix in memory; this one is for blocks of millions.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from recipe.cello1.data.compiled import compiled
from recipe.cello1.data.gene_filters import GeneTable
from recipe.cello1.data.matrix import Block, refuse_negative
from recipe.cello1.data.store import DAMAGED, BadFileError

_UNORDERED, _NEGATIVE, _NOT_FINITE, _NO_COLUMN = 1, 2, 3, 4
SPOILED = -1


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
    expresses, ``n_top`` standing for that many or more, and ``SPOILED`` for a row with NaN or infinity.

    Raises
    ------
    BadFileError
        If a value is negative.
    """
    n_rows = len(block.rows)
    out = np.full((n_rows, n_top), -1, dtype=np.int32)
    counts = np.zeros(n_rows, dtype=np.int64)
    factors = np.empty(0) if weights is None else weights
    # float64 holds every count exactly; float32 is as exact for float32, and twice as fast.
    exact = np.float32 if block.values.dtype == np.float32 and weights is None else np.float64
    scores = np.empty(len(genes.symbol), dtype=exact)
    all_used = bool((genes.symbol >= 0).all())
    tables = (genes.symbol, genes.repeated, all_used, factors, scores, n_top, out, counts)
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
        refuse_negative(row)
    raise BadFileError(
        f"its sparse matrix names a gene that it does not have in row {row} or near it",
        DAMAGED,
    )


def _in_order(block: Block, n_columns: int) -> Block:
    """Sort each row by column and add up values stored for the same place, as scipy does."""
    _check_columns(block, n_columns)
    matrix = sp.csr_array((block.values, block.indices, block.indptr), shape=(len(block.rows), n_columns), copy=True)
    matrix.sum_duplicates()
    return Block(block.rows, matrix.data, matrix.indices.astype(np.int32), matrix.indptr.astype(np.int64))


def _check_columns(block: Block, n_columns: int) -> None:
    indices = np.zeros(0) if block.indices is None else block.indices
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_columns:
        _refuse(_NO_COLUMN, int(block.rows[0]))


def column_sums(block: Block, n_columns: int) -> tuple[np.ndarray, int]:
    """Add up each column over the cells whose values are all finite.

    Parameters
    ----------
    block
        The rows.
    n_columns
        Number of columns.

    Returns
    -------
    float64, one sum for each column, and the number of these cells.

    Raises
    ------
    BadFileError
        If a value is negative.
    """
    values, spoiled = block.values, np.zeros(len(block.rows), dtype=bool)
    if not np.isfinite(values.sum(dtype=np.float64)):
        wrong = ~np.isfinite(values)
        if block.indptr is None:
            spoiled = wrong.any(axis=1)
            values = np.where(spoiled[:, None], 0, values)
        else:
            of_row = np.repeat(np.arange(len(block.rows)), np.diff(block.indptr))
            spoiled[of_row[wrong]] = True
            values = np.where(spoiled[of_row], 0, values)
    if (values < 0).any():
        refuse_negative(int(block.rows[0]))
    if block.indices is None:
        sums = values.sum(axis=0, dtype=np.float64)
    else:
        _check_columns(block, n_columns)
        sums = np.zeros(n_columns)
        _add_columns(block.indices, values, sums)
    return sums, int(len(spoiled) - spoiled.sum())


# ---------------------------------------------------------------------------------------------------- compiled code


@compiled
def _add_columns(indices, values, sums):  # pragma: no cover - compiled
    for i in range(len(indices)):
        sums[indices[i]] += values[i]


@compiled
def _unordered(columns):  # pragma: no cover - compiled
    """Whether a row's columns do not ascend."""
    bad = False
    for i in range(1, len(columns)):
        bad |= columns[i] <= columns[i - 1]
    return bad


@compiled
def _convert(values, scores):  # pragma: no cover - compiled
    """Copy a row; returns whether all of it is finite and not negative."""
    good = True
    for i in range(len(values)):
        v = scores.dtype.type(values[i])
        good &= (v >= 0) & (v < np.inf)
        scores[i] = v
    return good


@compiled
def _fault(values):  # pragma: no cover - compiled
    for v in values:
        if v < 0 and v > -np.inf:
            return _NEGATIVE
    return _NOT_FINITE


@compiled
def _kth_smallest(values, k):  # pragma: no cover - compiled
    """Return what would stand at position ``k`` if the values were sorted; changes their order (Hoare's selection)."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@compiled
def _lower_bound(scores, n_top, best):  # pragma: no cover - compiled
    """Find a score that at least ``n_top`` entries reach, so that the others need no look.

    The entries are dealt to more groups than that, and the largest of each is found. As many entries as are wanted
    reach the ``n_top``-th largest of these.
    """
    groups = len(best)
    turns = len(scores) // groups
    if turns < 2:
        return scores.dtype.type(0)
    best[:] = scores[:groups]
    for turn in range(1, turns):
        dealt = scores[turn * groups : (turn + 1) * groups]
        for group in range(groups):
            best[group] = dealt[group] if dealt[group] > best[group] else best[group]
    return _kth_smallest(best, groups - n_top)


@compiled
def _best_of(scores, least, columns, dense, symbols, repeated, picked, value, symbol):  # pragma: no cover - compiled
    """Write the best symbols among the entries that reach a score, best first; returns how many."""
    n_top = len(value)
    n_picked = 0
    for i in range(len(scores)):  # no branch: the processor could not foretell it
        picked[n_picked] = i
        n_picked += scores[i] >= least
    size = 0
    for i in picked[:n_picked]:
        v = scores[i]
        if v == 0 or (size == n_top and v <= value[n_top - 1]):
            continue
        s = symbols[i if dense else np.int64(columns[i])]
        if s < 0:
            continue
        end = size  # the place that the entry may take at the latest
        if repeated[s]:
            for at in range(size):
                if symbol[at] == s:
                    end = at
                    break
            if end < size and v <= value[end]:
                continue
        if end == size:
            if size < n_top:
                size += 1
            else:
                end = n_top - 1
        # Columns come in ascending order, so that behind its equals is the right place.
        while end > 0 and value[end - 1] < v:
            value[end], symbol[end] = value[end - 1], symbol[end - 1]
            end -= 1
        value[end], symbol[end] = v, s
    return size


@compiled
def _top_of_row(
    scores, bounds, columns, dense, symbols, repeated, best, picked, value, symbol
):  # pragma: no cover - compiled
    """Write the best symbols of one row, best first; returns how many."""
    least = _lower_bound(bounds, len(value), best)
    size = _best_of(scores, least, columns, dense, symbols, repeated, picked, value, symbol)
    if size < len(value) and least > 0:
        # Several of the entries stood for one symbol, so that they were too few.
        symbol[:] = -1
        size = _best_of(scores, least * 0, columns, dense, symbols, repeated, picked, value, symbol)
    return size


@compiled
def _weigh(scores, columns, dense, weights):  # pragma: no cover - compiled
    for i in range(len(scores)):
        scores[i] *= weights[i if dense else np.int64(columns[i])]


@compiled
def _keep_used(scores, columns, dense, symbols, bounds):  # pragma: no cover - compiled
    """Copy the scores without those of genes that are left out."""
    for i in range(len(scores)):
        bounds[i] = scores[i] if symbols[i if dense else np.int64(columns[i])] >= 0 else 0


@compiled
def _select_sparse(
    indptr, indices, values, symbols, repeated, all_used, weights, scores, n_top, out, counts
):  # pragma: no cover - compiled
    value, best = np.empty(n_top, scores.dtype), np.empty(n_top + n_top // 2 + 1, scores.dtype)
    bounds, picked = np.empty_like(scores), np.empty(len(scores) + 1, np.int32)
    for row in range(len(indptr) - 1):
        part, columns = values[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
        n = len(part)
        if n == 0:
            continue
        if _unordered(columns):
            return row, _UNORDERED
        if columns[0] < 0 or columns[n - 1] >= len(symbols):
            return row, _NO_COLUMN
        own = scores[:n]
        if not _convert(part, own):
            if _fault(part) == _NEGATIVE:
                return row, _NEGATIVE
            counts[row] = SPOILED
            continue
        if len(weights) > 0:
            _weigh(own, columns, False, weights)
        bound = own
        if not all_used:
            bound = bounds[:n]
            _keep_used(own, columns, False, symbols, bound)
        counts[row] = _top_of_row(own, bound, columns, False, symbols, repeated, best, picked, value, out[row])
    return 0, 0


@compiled
def _select_dense(
    values, symbols, repeated, all_used, weights, scores, n_top, out, counts
):  # pragma: no cover - compiled
    value, best = np.empty(n_top, scores.dtype), np.empty(n_top + n_top // 2 + 1, scores.dtype)
    bounds, picked = np.empty_like(scores), np.empty(len(scores) + 1, np.int32)
    none = np.empty(0, np.int32)
    for row in range(values.shape[0]):
        if not _convert(values[row], scores):
            if _fault(values[row]) == _NEGATIVE:
                return row, _NEGATIVE
            counts[row] = SPOILED
            continue
        if len(weights) > 0:
            _weigh(scores, none, True, weights)
        bound = scores
        if not all_used:
            bound = bounds
            _keep_used(scores, none, True, symbols, bound)
        counts[row] = _top_of_row(scores, bound, none, True, symbols, repeated, best, picked, value, out[row])
    return 0, 0
