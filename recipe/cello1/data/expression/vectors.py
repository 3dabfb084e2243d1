"""Stored 1-dimensional arrays, read range by range: the values and indices of a sparse matrix.

The gzip chunks of an HDF5 file are decompressed here rather than by HDF5, which does it one at a time: several threads
can, and a chunk of which only the beginning is wanted is decompressed only so far.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import h5py
import numpy as np

from recipe.cello1.formats.stores import DAMAGED, BadFileError, reading

try:
    from isal import isal_zlib
except ImportError:
    inflate: Any = zlib
else:
    inflate = isal_zlib  # decompresses two to three times as fast; same interface

SPAN = 2_000_000  # values that are read at once to get at some of them

_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


class Vector(Protocol):
    """A stored 1-dimensional array."""

    # Type of its values
    dtype: np.dtype
    # Whether any part can be read for itself, which otherwise costs as much as the chunks it lies in
    plain: bool

    def gather(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Read the ranges, ascending and without overlap, one after the other into one array."""


def open_vector(array: Any, file: BinaryIO | None) -> Vector:
    """Choose how to read a stored vector: by its raw chunks where that is possible, else through its library."""
    if file is not None and (chunks := _chunk_table(array)) is not None:
        return RawVector(array, chunks, file)
    return SlicedVector(array)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Where the chunks of a dataset lie: address and stored size in bytes of each, and how they were filtered."""

    length: int
    address: np.ndarray
    size: np.ndarray
    deflate: bool
    shuffle: bool


def _chunk_table(dataset: h5py.Dataset) -> _Chunks | None:
    """Return the chunks of a dataset, or ``None`` where only HDF5 itself can read it (other filters, remote files)."""
    file = dataset.file
    plain = dataset.dtype.kind in "biuf" and dataset.dtype.fields is None and dataset.size > 0
    if not plain or file.driver != "sec2" or file.userblock_size or dataset.is_virtual or dataset.external:
        return None
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if offset is None:  # compact
            return None
        stored = np.array([dataset.size * dataset.dtype.itemsize])
        return _Chunks(dataset.size, np.array([offset]), stored, deflate=False, shuffle=False)
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if filters not in ([], [_DEFLATE], [_SHUFFLE, _DEFLATE]):
        return None
    length = dataset.chunks[0]
    found: list[Any] = []
    with reading("the chunk index"):
        dataset.id.chunk_iter(found.append)
    if any(chunk.filter_mask for chunk in found):  # stored without its filters
        return None
    number = np.array([chunk.chunk_offset[0] for chunk in found], dtype=np.int64) // length
    address = np.zeros(-(-dataset.size // length), dtype=np.int64)
    size = np.zeros_like(address)
    inside = number < len(address)
    address[number[inside]] = np.array([chunk.byte_offset for chunk in found], dtype=np.int64)[inside]
    size[number[inside]] = np.array([chunk.size for chunk in found], dtype=np.int64)[inside]
    if not size.all():  # one was never written
        return None
    return _Chunks(length, address, size, _DEFLATE in filters, _SHUFFLE in filters)


class RawVector:
    """A vector of an HDF5 file on disk, read by its raw chunks; any number of threads may read at the same time."""

    def __init__(self, dataset: h5py.Dataset, chunks: _Chunks, file: BinaryIO) -> None:
        self.dtype = dataset.dtype.newbyteorder("=")
        self._stored = dataset.dtype
        self.plain = not chunks.deflate
        self._chunks = chunks
        self._file = file
        # For each chunk the end of those that are read at once with it: plain ones that follow each other in the file.
        cuts = np.full(len(chunks.address) - 1, True)
        if self.plain:
            cuts = np.diff(chunks.address) != chunks.size[:-1]
        ends = np.append(np.flatnonzero(cuts) + 1, len(chunks.address))
        self._ends = ends[np.searchsorted(ends, np.arange(len(chunks.address)), side="right")]

    def gather(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Read the ranges one after the other into one array."""
        out = np.empty(int((stops - starts).sum()), dtype=self._stored)
        if self._chunks.deflate:
            self._gather_deflated(starts, stops, out)
        else:
            self._gather_plain(starts, stops, out)
        return out.astype(self.dtype, copy=False)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut a range into what is read at once: number of its first chunk, beginning and end counted from there."""
        length = self._chunks.length
        while start < stop:
            number, first = divmod(start, length)
            last = min(first + stop - start, (int(self._ends[number]) - number) * length)
            yield number, first, last
            start += last - first

    def _gather_plain(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> None:
        width = self._stored.itemsize
        view = out.data.cast("B") if len(out) else memoryview(b"")
        position = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            for number, first, last in self._pieces(start, stop):
                size = (last - first) * width
                self._read_into(view[position : position + size], int(self._chunks.address[number]) + first * width)
                position += size

    def _read_into(self, part: memoryview, address: int) -> None:
        while len(part):
            got = os.preadv(self._file.fileno(), [part], address)
            if not got:
                raise BadFileError("it ends before its matrix does", DAMAGED)
            part, address = part[got:], address + got

    def _gather_deflated(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> None:
        wanted: dict[int, list[tuple[int, int, int]]] = {}
        position = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            for number, first, last in self._pieces(start, stop):
                wanted.setdefault(number, []).append((first, last, position))
                position += last - first
        for number, parts in wanted.items():
            values = self._inflate(number, parts[-1][1])
            for first, last, position in parts:
                out[position : position + last - first] = values[first:last]

    def _inflate(self, number: int, n_values: int) -> np.ndarray:
        """Decompress the first values of a chunk."""
        chunks, width = self._chunks, self._stored.itemsize
        size = int(chunks.size[number])
        stored = os.pread(self._file.fileno(), size, int(chunks.address[number]))
        whole = chunks.length * width
        try:
            wanted = whole if chunks.shuffle else n_values * width
            stream = inflate.decompressobj()
            raw = stream.decompress(stored, wanted)
            if wanted == whole and stream.unconsumed_tail and stream.decompress(stream.unconsumed_tail, 1):
                raise BadFileError("a compressed chunk of its matrix holds more than it says", DAMAGED)
        except (zlib.error, inflate.error) as error:
            raise BadFileError(f"a compressed chunk of its matrix cannot be read ({error})", DAMAGED) from error
        if len(stored) < size or len(raw) < wanted:
            raise BadFileError("it ends before its matrix does", DAMAGED)
        if chunks.shuffle:
            raw = np.frombuffer(raw, np.uint8, whole).reshape(width, chunks.length).T.tobytes()
        return np.frombuffer(raw, self._stored, n_values)


class SlicedVector:
    """A vector read through its library: zarr, and HDF5 with filters other than gzip."""

    plain = False

    def __init__(self, array: Any) -> None:
        self._array = array
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        self._gap = array.chunks[0] if getattr(array, "chunks", None) else 1024

    def gather(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Read the ranges one after the other into one array."""
        if len(starts) == 0:
            return np.empty(0, dtype=self.dtype)
        out = np.empty(int((stops - starts).sum()), dtype=self.dtype)
        position = 0
        with reading("the matrix"):
            for group in self._groups(starts.tolist(), stops.tolist()):
                offset = group[0][0]
                span = self._array[offset : group[-1][1]]
                for start, stop in group:
                    out[position : position + stop - start] = span[start - offset : stop - offset]
                    position += stop - start
        return out

    def _groups(self, starts: list[int], stops: list[int]) -> Iterator[list[tuple[int, int]]]:
        """Put ranges that share a chunk together, as long as what lies between them is not too much to hold."""
        group: list[tuple[int, int]] = []
        for start, stop in zip(starts, stops, strict=True):
            if group and (start - group[-1][1] > self._gap or stop - group[0][0] > SPAN):
                yield group
                group = []
            group.append((start, stop))
        yield group
