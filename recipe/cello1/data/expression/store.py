"""One expression file, h5ad or zarr: its tables, read column by column, and where its matrix lies.

Nothing is read that was not asked for, so that a file of any size can be opened. The layout is that of AnnData on disk
(https://anndata.readthedocs.io/en/latest/fileformat-prose.html).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import h5py
import numpy as np

from recipe.cello1.formats.machine import limited_memory
from recipe.cello1.formats.stores import BadFileError, close_store, column_notes, open_store, reading, spelt_out
from recipe.cello1.task.gene_names import are_row_numbers
from recipe.cello1.task.labels import Labels, make_labels
from recipe.cello1.task.text import clean_value

SUFFIXES = (".h5ad", ".zarr")
INDEX = "index"  # as a column name: the index of the table, unless a column has that name
_NAME_BLOCK = 100_000


class Store:
    """An opened file; a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file: BinaryIO | None = None  # the same file for raw chunks
        self.notes: list[str] = []  # what is to be said of what was read
        self.name_hashes = np.empty(0, np.uint64)  # of all cells, once cell ids were read
        self._structured: dict[str, Any] = {}  # tables of anndata before 0.7
        self._limit = ExitStack()
        self.root = open_store(self.path)
        if not self.path.is_dir():
            self.file = open(self.path, "rb", buffering=0)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        with reading("the index of obs"):
            self.n_obs = int(self._index("obs").shape[0])
        if self.n_obs == 0:
            raise BadFileError("it has no cells", "leave it out")

    def __enter__(self) -> Store:
        self._limit.enter_context(limited_memory())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._limit.close()
        close_store(self.root)
        if self.file is not None:
            self.file.close()

    def _table(self, table: str) -> Any:
        """Return a table: a group of columns, or, as anndata before 0.7 wrote it, an array of records."""
        if table not in self._structured:
            found = self.root["raw.var" if table == "raw/var" and table not in self.root else table]
            if not hasattr(found, "keys") and not found.dtype.names:
                raise BadFileError(f"its table {table!r} has no columns", "write it with anndata, as h5ad or zarr")
            self._structured[table] = found if hasattr(found, "keys") else np.asarray(found[:])
        return self._structured[table]

    def _index_name(self, table: str) -> str:
        group = self._table(table)
        return group.dtype.names[0] if isinstance(group, np.ndarray) else str(group.attrs.get("_index", "_index"))

    def _index(self, table: str) -> Any:
        index = self._table(table)[self._index_name(table)]
        # Text that may be missing is stored as values and mask; in an index none is.
        return index["values"] if hasattr(index, "keys") else index

    def columns(self, table: str = "obs") -> tuple[str, ...]:
        """Return the names of a table's columns, without the index."""
        group = self._table(table)
        hidden = {self._index_name(table), "__categories"}
        names = group.dtype.names if isinstance(group, np.ndarray) else group
        return tuple(name for name in names if name not in hidden)

    def labels(self, column: str, clean: Callable[[Any], str] = clean_value) -> Labels:
        """Read a column of ``obs``."""
        return make_labels(self._read("obs", column), clean)

    def cell_ids(self, rows: np.ndarray) -> tuple[list[str], int]:
        """Read the names of some cells."""
        import pandas as pd

        found: list[str] = []
        hashes = [np.empty(0, np.uint64)]  # of all names, which themselves may not fit into memory
        with reading("the index of obs"):
            index = self._index("obs")
            for start in range(0, self.n_obs, _NAME_BLOCK):
                names = np.asarray(index[start : start + _NAME_BLOCK], dtype=object)
                hashes.append(pd.util.hash_array(names, categorize=False))
                inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + _NAME_BLOCK)] - start
                found += _texts(names[inside])
        self.name_hashes = np.concatenate(hashes)
        known = pd.Index(self.name_hashes)
        if known.is_unique:
            return found, 0
        n_repeated = known[known.duplicated()].nunique()
        return [f"{name}#{row}" for name, row in zip(found, rows.tolist(), strict=True)], n_repeated

    def gene_names(self, column: str, *, raw: bool = False) -> list[Any]:
        """Read the gene names."""
        table = "raw/var" if raw else "var"
        if raw:
            self.matrix(use_raw=True)
        if raw and (own := self._ids(table)) and len(own) == len(others := self._ids("var")):
            if are_row_numbers(own) or (self._lacks(table, column) and own == others):
                table = "var"
                self.notes.append("raw has no gene names of its own: those of var are used, column by column")
        if self._lacks(table, column):
            raise BadFileError(
                f"{table} has no column {column!r} with the gene symbols",
                f"name the right one with gene_column=, it has {[*self.columns(table), INDEX]}",
            )
        return self._names(table, column)

    def other_names(self, *, raw: bool = False) -> Iterator[tuple[str, list[Any]]]:
        """Read every column that may hold gene names."""
        table = "raw/var" if raw else "var"
        yield from ((name, self._names(table, name)) for name in (*self.columns(table), INDEX))

    def _ids(self, table: str) -> list[Any]:
        with reading(f"the index of {table}"):
            return _texts(self._index(table)[:])

    def _names(self, table: str, column: str) -> list[Any]:
        values = self._read(table, column)
        return _texts(values) if isinstance(values, np.ndarray) else list(values)

    def _lacks(self, table: str, column: str) -> bool:
        return column not in (INDEX, self._index_name(table), *self.columns(table))

    def _read(self, table: str, column: str) -> Any:
        if self._lacks(table, column):
            raise KeyError(column)
        with reading(f"the column {column!r} of {table}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata tells of old formats, which are read all the same
            group = self._table(table)
            element = group[column] if column in self.columns(table) else self._index(table)
            if isinstance(group, np.ndarray):
                names = self.root.get(f"uns/{column}_categories") if element.dtype.kind in "iu" else None
                if names is None:
                    return spelt_out(element, element.dtype)
                return _categorical(element, np.atleast_1d(names[()]))
            if hasattr(element, "keys") and "codes" in element:  # without ``ordered``, which other writers leave out
                names = _values(element["categories"])
                self.notes += column_notes(element, f"{table}/{column}", *_texts(names[:1]))
                return _categorical(_values(element["codes"]), names)
            legacy = element.attrs.get("categories")
            if legacy is not None and not hasattr(element, "keys"):  # anndata 0.7: codes that point at their names
                names = self.root[legacy] if isinstance(legacy, h5py.Reference) else group[str(legacy)]
                return _categorical(element[:], _values(names))
            self.notes += column_notes(element, f"{table}/{column}")
            values = _values(element, plain=False)
            if hasattr(element, "dtype"):
                values = spelt_out(values, element.dtype)
        return values.array if hasattr(values, "array") and not isinstance(values, np.ndarray) else values

    def _raw(self, name: str) -> Any:
        """Return a part of raw, under its name of today or that of anndata before 0.7."""
        found = [self.root[key] for key in (f"raw/{name}", f"raw.{name}") if key in self.root]
        return found[0] if found else None

    def matrix(self, *, layer: str | None = None, use_raw: bool = False) -> Any:
        """Find the expression matrix."""
        if layer is not None and use_raw:
            raise ValueError(f"layer={layer!r} and use_raw=True exclude each other; choose one")
        layers = sorted(self.root["layers"]) if "layers" in self.root else []
        if use_raw:
            if (found := self._raw("X")) is None:
                raise BadFileError("it has no raw", "leave use_raw=True out")
            return found
        if layer is not None:
            if layer not in layers:
                raise BadFileError(f"it has no layer {layer!r}", f"choose another layer=, it has {layers}")
            return self.root["layers"][layer]
        if "X" not in self.root:
            raise BadFileError("it has no X", f"choose a layer=, it has {layers}, or use_raw=True")
        return self.root["X"]


def _texts(values: Any) -> list[Any]:
    return [
        value.decode() if isinstance(value, bytes) else value for value in np.asarray(values, dtype=object).tolist()
    ]


def _values(element: Any, *, plain: bool = True) -> Any:
    from anndata.io import read_elem

    return element[:] if plain and not hasattr(element, "keys") else read_elem(element)


def _categorical(codes: Any, names: Any) -> Any:
    import pandas as pd

    # As text only what may be bytes: numbers keep their type.
    numbers = getattr(getattr(names, "dtype", None), "kind", "O") in "biuf"
    return pd.Categorical.from_codes(np.asarray(codes), names if numbers else _texts(names))
