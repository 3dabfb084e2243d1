"""Rows of a stored expression matrix, chosen ones or all of them, in blocks of bounded size.

A matrix in CSR form is read row by row as it lies, a dense one in bands of rows. One in CSC form has to be gone through
as a whole for any rows, and is turned into CSR piece by piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NoReturn, Protocol, TypeVar

import numpy as np

from recipe.cello1.data.expression.compiled import compiled
from recipe.cello1.data.expression.vectors import open_vector
from recipe.cello1.formats.stores import DAMAGED, BadFileError, chunk_notes, reading

BLOCK_ENTRIES = 2_000_000  # stored values in a block: 16 MB for float32 with int32 indices
PLAIN_ENTRIES = 500_000  # the same where it need not end with a chunk: so few stay in the processor's cache
DENSE_ENTRIES = 8_000_000  # values in a block of a dense matrix
DENSE_LIMIT = 16_000_000  # the same where the chunks of the file are taller than that
CSC_ENTRIES = 16_000_000  # values of a CSC matrix that are kept in one pass
CSC_STEP = 4_000_000  # values of a CSC matrix that are read at once
ROWS_AT_ONCE = 256  # chosen rows in a block
MEMORY = 400_000_000  # bytes that the blocks being read may take together: decides how many threads are used

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a matrix."""

    # int64, the number of each row in the file
    rows: np.ndarray
    # Stored values (sparse), or the rows themselves, 2-dimensional (dense). float32 where the file has that (or
    # less), else float64, so that few kinds of arrays have to be dealt with
    values: np.ndarray
    # int32, column of each value; ``None`` for dense rows
    indices: np.ndarray | None = None
    # int64, where each row begins in ``values``, and the end; ``None`` for dense rows
    indptr: np.ndarray | None = None


ReadBlock = Callable[[], Block]  # reads one block; may be called in any thread


class Matrix(Protocol):
    """A stored matrix, cells x genes."""

    shape: tuple[int, int]
    # What is to be said of it
    notes: Sequence[str] = ()

    @property
    def block_bytes(self) -> int:
        """Return how much memory a block takes while it is read, roughly."""

    def plans(self, rows: np.ndarray | None) -> Iterator[ReadBlock]:
        """Cut the rows (sorted; ``None`` for all) into blocks, each to be read by a call."""

    def stored(self) -> np.ndarray | None:
        """Return how many values are stored for each row, where that is known without reading them."""
        return None

    def column_sums(self) -> tuple[np.ndarray, int] | None:
        """Add up each column over the cells whose values are all finite, and count these cells; else blocks serve."""
        return None


def open_matrix(element: Any, file: BinaryIO | None = None) -> Matrix:
    """Open a stored matrix."""
    values = element if not hasattr(element, "keys") else element["data"] if "data" in element else None
    if values is not None and values.dtype.kind not in "buif":
        raise BadFileError(f"its matrix holds {values.dtype}, not numbers", "choose another layer= or use_raw=True")
    if not hasattr(element, "keys"):
        if len(element.shape) != 2:
            raise BadFileError(f"its matrix has the shape {tuple(element.shape)}", "write it as cells x genes")
        return DenseMatrix(element)
    attributes = element.attrs
    kind = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    kinds: dict[str, type[CsrMatrix | CscMatrix]] = {
        "csr_matrix": CsrMatrix,
        "csr": CsrMatrix,
        "csc_matrix": CscMatrix,
        "csc": CscMatrix,
    }
    if kind not in kinds or shape is None:
        raise BadFileError(f"its matrix is stored as {kind or 'something unknown'!r}", "write it as CSR, CSC or dense")
    return kinds[kind](element, (int(shape[0]), int(shape[1])), file)


def map_blocks(
    matrix: Matrix, function: Callable[[Block], T], rows: np.ndarray | None = None, threads: int = 1
) -> Iterator[T]:
    """Apply a function to the blocks of a matrix."""
    plans = matrix.plans(rows)
    threads = min(threads, MEMORY // matrix.block_bytes)
    if threads <= 1:
        for plan in plans:
            yield function(plan())
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for plan in plans:
                waiting.append(pool.submit(_read_and_apply, plan, function))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read_and_apply(plan: ReadBlock, function: Callable[[Block], T]) -> T:
    return function(plan())


# --------------------------------------------------------------------------------------------------------- matrices


def _cuts(sizes: np.ndarray, entries: int, most: int) -> Iterator[slice]:
    """Cut rows of these sizes into blocks of so many entries and rows at most, but one row at least."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, min(int(np.searchsorted(ends, before + entries, side="right")), start + most))
        yield slice(start, stop)
        start = stop


class _Sparse(Matrix):
    """What CSR and CSC share."""

    def __init__(self, group: Any, shape: tuple[int, int], file: BinaryIO | None) -> None:
        self.shape = shape
        with reading("the sparse matrix"):
            self.indptr = np.asarray(group["indptr"][:], dtype=np.int64)
            self.values = open_vector(group["data"], file)
            self.indices = open_vector(group["indices"], file)
            n_values = min(group["data"].shape[0], group["indices"].shape[0])
        self.dtype = _working_type(self.values.dtype)
        lengths = np.diff(self.indptr)
        major = shape[isinstance(self, CscMatrix)]
        if len(lengths) != major or self.indptr[0] != 0 or (lengths < 0).any() or self.indptr[-1] > n_values:
            raise BadFileError("the row pointers of its sparse matrix are wrong", DAMAGED)

    def read(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read values and indices of some ranges."""
        values = self.values.gather(starts, stops).astype(self.dtype, copy=False)
        return values, self.indices.gather(starts, stops).astype(np.int32, copy=False)


class CsrMatrix(_Sparse):
    """A matrix stored row by row."""

    block_bytes = BLOCK_ENTRIES * 16

    def stored(self) -> np.ndarray:
        """Return how many values are stored for each row."""
        return np.diff(self.indptr)

    def plans(self, rows: np.ndarray | None) -> Iterator[ReadBlock]:
        """Cut the rows into blocks."""
        entries = PLAIN_ENTRIES if self.values.plain and self.indices.plain else BLOCK_ENTRIES
        wanted = np.arange(self.shape[0]) if rows is None else rows
        for cut in _cuts(self.stored()[wanted], entries, len(wanted) if rows is None else ROWS_AT_ONCE):
            yield partial(self._block, wanted[cut])

    def _block(self, rows: np.ndarray) -> Block:
        starts, stops = self.indptr[rows], self.indptr[rows + 1]
        indptr = np.concatenate([[0], np.cumsum(stops - starts)])
        # Rows that follow each other are one range.
        new = np.flatnonzero(np.concatenate([[True], starts[1:] != stops[:-1]]))
        values, indices = self.read(starts[new], stops[np.append(new[1:] - 1, len(rows) - 1)])
        return Block(rows, values, indices, indptr)


class CscMatrix(_Sparse):
    """A matrix stored column by column: each block takes a pass over all of it, and the blocks are large for that."""

    _lengths: np.ndarray | None = None  # stored values of each row, once they have been counted

    @property
    def block_bytes(self) -> int:
        """Memory of a block: 28 bytes for a kept value (place, column and value twice) and 40 for one just read."""
        return CSC_ENTRIES * 28 + CSC_STEP * 40

    def plans(self, rows: np.ndarray | None) -> Iterator[ReadBlock]:
        """Cut the rows into blocks. Where one cannot hold all values, those of each row are counted first."""
        wanted = np.arange(self.shape[0]) if rows is None else rows
        if not len(wanted):
            return
        if self.indptr[-1] <= CSC_ENTRIES:
            yield partial(self._block, wanted)
            return
        for cut in _cuts(self._row_lengths()[wanted], CSC_ENTRIES, len(wanted)):
            yield partial(self._block, wanted[cut])

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Cut the columns into pieces that are read at once: first column, and the one after the last."""
        column = 0
        while column < self.shape[1]:
            last = int(np.searchsorted(self.indptr, self.indptr[column] + CSC_STEP, side="right")) - 1
            last = min(max(last, column + 1), self.shape[1])
            yield column, last
            column = last

    def _read_piece(self, column: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        values, indices = self.read(self.indptr[column : column + 1], self.indptr[last : last + 1])
        self._check_rows(indices)
        return values, indices

    def _row_lengths(self) -> np.ndarray:
        if self._lengths is None:
            counts = np.zeros(self.shape[0], dtype=np.int64)
            for column, last in self._pieces():
                indices = self.indices.gather(self.indptr[column : column + 1], self.indptr[last : last + 1])
                self._check_rows(indices)
                _count(indices, counts)
            self._lengths = counts
        return self._lengths

    def column_sums(self) -> tuple[np.ndarray, int]:
        """Add up each column in one pass; in two where values are not finite, as their cells show only on the way."""
        spoiled = np.zeros(self.shape[0], dtype=bool)
        sums = self._sums(spoiled)
        if spoiled.any():
            sums = self._sums(spoiled)
        return sums, int(self.shape[0] - spoiled.sum())

    def _sums(self, spoiled: np.ndarray) -> np.ndarray:
        """Add up each column without the spoiled cells, and mark those that turn out to be."""
        sums = np.zeros(self.shape[1])
        counts = np.zeros(self.shape[0], dtype=np.int64)
        for column, last in self._pieces():
            values, indices = self._read_piece(column, last)
            _count(indices, counts)
            spoiled[indices[~np.isfinite(values)]] = True
            values = np.where(spoiled[indices], 0, values)
            if len(values) and values.min() < 0:
                refuse_negative(int(indices[np.argmin(values)]))
            columns = np.repeat(np.arange(last - column), np.diff(self.indptr[column : last + 1]))
            sums[column:last] = np.bincount(columns, values, last - column)
        self._lengths = counts
        return sums

    def _block(self, rows: np.ndarray) -> Block:
        place = np.full(self.shape[0], -1, dtype=np.int32)
        place[rows] = np.arange(len(rows))
        kept: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque()
        counts = np.zeros(len(rows), dtype=np.int64)
        for column, last in self._pieces():
            values, indices = self._read_piece(column, last)
            target = place[indices]
            here = target >= 0
            columns = np.repeat(np.arange(column, last, dtype=np.int32), np.diff(self.indptr[column : last + 1]))[here]
            kept.append((target[here], columns, values[here]))
            _count(kept[-1][0], counts)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        out_values = np.empty(indptr[-1], dtype=self.dtype)
        out_indices = np.empty(indptr[-1], dtype=np.int32)
        cursor = indptr[:-1].copy()
        while kept:
            _scatter(*kept.popleft(), cursor, out_indices, out_values)
        return Block(rows, out_values, out_indices, indptr)

    def _check_rows(self, indices: np.ndarray) -> None:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.shape[0]:
            raise BadFileError("its sparse matrix has row indices outside its shape", DAMAGED)


def _working_type(dtype: np.dtype) -> np.dtype:
    """Return what values are worked with: both hold every count and every stored float exactly."""
    return np.dtype(np.float32 if dtype in (np.float16, np.float32) else np.float64)


def refuse_negative(row: int) -> NoReturn:
    """Refuse a matrix with a negative value."""
    raise BadFileError(
        f"its matrix holds a negative value in row {row} or near it, as scaled data do",
        "take counts or log-normalised values with layer= or use_raw=True",
    )


@compiled
def _count(numbers, counts):  # pragma: no cover - compiled
    for number in numbers:
        counts[number] += 1


@compiled
def _scatter(target, columns, values, cursor, out_indices, out_values):  # pragma: no cover - compiled
    for i in range(len(target)):
        position = cursor[target[i]]
        out_indices[position] = columns[i]
        out_values[position] = values[i]
        cursor[target[i]] = position + 1


class DenseMatrix(Matrix):
    """A matrix with every value stored."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = (int(array.shape[0]), int(array.shape[1]))
        chunks = getattr(array, "chunks", None)
        self._height = int(chunks[0]) if chunks else 1
        self.dtype = _working_type(array.dtype)
        self.notes: Sequence[str] = chunk_notes(array, "the matrix", "zeros")
        self._step = self._rows_of_a_block()

    @property
    def block_bytes(self) -> int:
        """Memory of a block: its values as they are stored, and as they are worked with."""
        return self._step * self.shape[1] * (self.dtype.itemsize + self._array.dtype.itemsize) + 1

    def _rows_of_a_block(self) -> int:
        n_columns = max(1, self.shape[1])
        step = max(1, min(max(DENSE_ENTRIES // n_columns, self._height), DENSE_LIMIT // n_columns))
        # No chunk is read for two blocks, if that can be.
        return step - step % self._height if step > self._height else step

    def plans(self, rows: np.ndarray | None) -> Iterator[ReadBlock]:
        """Cut the rows into blocks."""
        for start in range(0, self.shape[0], self._step):
            stop = min(start + self._step, self.shape[0])
            if rows is None:
                part = np.arange(start, stop)
            else:
                part = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
            if len(part):
                yield partial(self._block, part)

    def _block(self, rows: np.ndarray) -> Block:
        out = np.empty((len(rows), self.shape[1]), dtype=self.dtype)
        cuts = np.flatnonzero(np.diff(rows) > self._height) + 1
        with reading("the dense matrix"):
            for group in np.split(np.arange(len(rows)), cuts):
                first, last = int(rows[group[0]]), int(rows[group[-1]])
                band = self._array[first : last + 1]
                out[group] = band if len(band) == len(group) else band[rows[group] - first]
        return Block(rows, out)
