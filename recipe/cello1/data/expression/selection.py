"""Which genes of a cell are listed: those with the largest values, the largest first.

Tie rule: equal values are listed in gene order, the order of the columns. Genes that a cell does not express (value 0)
are never listed. A symbol that stands for several columns counts once, with its largest value.
:func:`recipe.cello1.task.genes.top_genes` gives the same for a matrix in memory; this one is for blocks of millions.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from recipe.cello1.data.expression.compiled import compiled
from recipe.cello1.data.expression.matrix import Block, refuse_negative
from recipe.cello1.formats.stores import DAMAGED, BadFileError
from recipe.cello1.task.gene_names import GeneTable

_UNORDERED, _NEGATIVE, _NOT_FINITE, _NO_COLUMN = 1, 2, 3, 4
SPOILED = -1
_FEW = 256  # entries that are faster compared each with each than sorted


def top_symbols(
    block: Block, genes: GeneTable, n_top: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """List the top symbols of each row."""
    n_rows = len(block.rows)
    out = np.full((n_rows, n_top), -1, dtype=np.int32)
    counts = np.zeros(n_rows, dtype=np.int64)
    factors = np.empty(0) if weights is None else weights
    # float64 holds every count exactly; float32 is as exact for float32, and twice as fast.
    exact = np.float32 if block.values.dtype == np.float32 and weights is None else np.float64
    scores = np.empty(len(genes.symbol), dtype=exact)
    all_used = bool((genes.symbol >= 0).all())
    tables = (genes.symbol, genes.repeated, all_used, factors, scores, out, counts)
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
        f"its sparse matrix has a gene index outside its shape in row {row} or near it",
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
    """Add up each column over the cells whose values are all finite."""
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
def _count_larger(values, larger):  # pragma: no cover - compiled
    """Count for each entry how many are larger."""
    larger[:] = 0
    for v in values:
        for i in range(len(values)):
            larger[i] += v > values[i]


@compiled
def _nth_largest(values, n, larger):  # pragma: no cover - compiled
    if len(values) > _FEW:
        return np.sort(values)[len(values) - n]
    _count_larger(values, larger)
    found = values.dtype.type(np.inf)
    for i in range(len(values)):
        found = values[i] if larger[i] < n and values[i] < found else found
    return found


@compiled
def _lower_bound(scores, n_top, best, larger):  # pragma: no cover - compiled
    """Find a score that at least ``n_top`` entries reach, so that the others need no look."""
    groups = len(best)
    turns = len(scores) // groups
    if turns < 2:
        return scores.dtype.type(0)
    best[:] = scores[:groups]
    for turn in range(1, turns):
        dealt = scores[turn * groups : (turn + 1) * groups]
        for group in range(groups):
            best[group] = dealt[group] if dealt[group] > best[group] else best[group]
    return _nth_largest(best, n_top, larger[:groups])


@compiled
def _pick(scores, least, picked):  # pragma: no cover - compiled
    """List the entries that reach a score, in their order; returns how many."""
    n_picked = 0
    for i in range(len(scores)):  # no branch: the processor could not foretell it
        picked[n_picked] = i
        n_picked += scores[i] >= least
    return n_picked


@compiled
def _pick_few(scores, least, wanted, picked):  # pragma: no cover - compiled
    """Do the same, but of those that just reach the score leave out the last, as far as the others suffice."""
    ties = wanted
    for i in range(len(scores)):
        ties -= scores[i] > least
    n_picked, start = 0, 0
    if ties > 0:
        for i in range(len(scores)):
            picked[n_picked] = i
            n_picked += scores[i] >= least
            ties -= scores[i] == least
            start = i + 1
            if ties == 0:
                break
    rest = scores[start:]
    for i in range(len(rest)):
        picked[n_picked] = start + i
        n_picked += rest[i] > least
    return n_picked


@compiled
def _among(symbol, found):  # pragma: no cover - compiled
    for other in found:
        if other == symbol:
            return True
    return False


@compiled
def _best_of(scores, least, wanted, columns, dense, symbols, repeated, room, found):  # pragma: no cover - compiled
    """Write the best symbols among the entries that reach a score, best first; returns how many."""
    _, larger, taken, picked, order = room
    n_picked = _pick(scores, least, picked)
    if n_picked > 2 * wanted:
        n_picked = _pick_few(scores, least, wanted, picked)
    chosen = scores[picked[:n_picked]]
    if n_picked <= _FEW:
        _count_larger(chosen, larger[:n_picked])
        taken[:n_picked] = 0
        for i in range(n_picked):  # equal ones in their order
            place = larger[i]
            order[place + taken[place]] = picked[i]
            taken[place] += 1
    else:
        order[:n_picked] = picked[np.argsort(-chosen, kind="mergesort")]
    size = 0
    for i in order[:n_picked]:
        if size == len(found) or scores[i] == 0:
            break
        symbol = symbols[i if dense else np.int64(columns[i])]
        if not (repeated[symbol] and _among(symbol, found[:size])):
            found[size] = symbol
            size += 1
    return size


@compiled
def _top_of_row(scores, columns, dense, symbols, repeated, room, found):  # pragma: no cover - compiled
    """Write the best symbols of one row, best first; returns how many."""
    best, larger, _, _, _ = room
    n_top = len(found)
    least = _lower_bound(scores, n_top, best, larger)
    size = _best_of(scores, least, n_top, columns, dense, symbols, repeated, room, found)
    if size < n_top and least > 0:
        # Several of the entries stood for one symbol, so that they were too few.
        found[:] = -1
        size = _best_of(scores, least * 0, len(scores), columns, dense, symbols, repeated, room, found)
    return size


@compiled
def _room(n_scores, n_top, like):  # pragma: no cover - compiled
    """Make what the selection works in: largest of each group, two counts, picked entries, these in order."""
    n_groups = (n_top + n_top // 2) // 16 * 16 + 16  # a multiple of what the processor compares at once
    larger, taken = np.empty(max(_FEW, n_groups), np.int16), np.empty(_FEW, np.int16)
    return np.empty(n_groups, like.dtype), larger, taken, np.empty(n_scores + 1, np.int32), np.empty(n_scores, np.int32)


@compiled
def _weigh(scores, columns, dense, weights):  # pragma: no cover - compiled
    for i in range(len(scores)):
        scores[i] *= weights[i if dense else np.int64(columns[i])]


@compiled
def _leave_out(scores, columns, dense, symbols):  # pragma: no cover - compiled
    """Set the scores of genes that are left out to 0."""
    for i in range(len(scores)):
        scores[i] = scores[i] if symbols[i if dense else np.int64(columns[i])] >= 0 else 0


@compiled
def _select_sparse(
    indptr, indices, values, symbols, repeated, all_used, weights, scores, out, counts
):  # pragma: no cover - compiled
    room = _room(len(scores), out.shape[1], scores)
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
        if not all_used:
            _leave_out(own, columns, False, symbols)
        counts[row] = _top_of_row(own, columns, False, symbols, repeated, room, out[row])
    return 0, 0


@compiled
def _select_dense(values, symbols, repeated, all_used, weights, scores, out, counts):  # pragma: no cover - compiled
    room = _room(len(scores), out.shape[1], scores)
    none = np.empty(0, np.int32)
    for row in range(values.shape[0]):
        if not _convert(values[row], scores):
            if _fault(values[row]) == _NEGATIVE:
                return row, _NEGATIVE
            counts[row] = SPOILED
            continue
        if len(weights) > 0:
            _weigh(scores, none, True, weights)
        if not all_used:
            _leave_out(scores, none, True, symbols)
        counts[row] = _top_of_row(scores, none, True, symbols, repeated, room, out[row])
    return 0, 0
