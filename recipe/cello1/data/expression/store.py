"""One expression file, h5ad or zarr: its tables, read column by column, and where its matrix lies.

Nothing is read that was not asked for, so that a file of any size can be opened. The layout is that of AnnData on disk
(https://anndata.readthedocs.io/en/latest/fileformat-prose.html).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import h5py
import numpy as np

from recipe.cello1.task.text import clean_value

SUFFIXES = (".h5ad", ".zarr")
INDEX = "index"  # as a column name: the index of the table
DAMAGED = "the file is damaged: fetch or write it again"
_NAME_BLOCK = 100_000


class BadFileError(ValueError):
    """A file that cannot be used."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what the storage libraries raise on damaged data into :class:`BadFileError`."""
    try:
        yield
    except BadFileError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py and zarr raise any of these
        text = " ".join(str(error).split())
        raise BadFileError(f"{what} cannot be read ({text})", DAMAGED) from error


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of text as codes, in the form of ``task.sampling.Coded``."""

    # int32, one for each row; -1 where the value is missing or says nothing
    codes: np.ndarray
    # The values, sorted
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: np.ndarray) -> Labels:
        """Return some of the rows."""
        return Labels(self.codes[rows], self.categories)

    def value(self, row: int) -> str:
        """Return the value of a row, empty if missing."""
        code = self.codes[row]
        return self.categories[code] if code >= 0 else ""


def make_labels(values: Any) -> Labels:
    """Code a column; values that say nothing (NaN, ``unknown``...) count as missing."""
    if hasattr(values, "codes") and hasattr(values, "categories"):
        codes, names = np.asarray(values.codes, dtype=np.int64), _plain(np.asarray(values.categories))
    else:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            distinct, codes = np.unique(array, return_inverse=True)
            names = _plain(distinct)
        else:
            first: dict[Any, int] = {}
            codes = np.fromiter((first.setdefault(v, len(first)) for v in array.tolist()), np.int64, len(array))
            names = list(first)
    cleaned = [clean_value(name.decode() if isinstance(name, bytes) else name) for name in names]
    ordered = tuple(sorted({name for name in cleaned if name}))
    position = {name: i for i, name in enumerate(ordered)}
    # The entry after the last serves the code -1.
    lookup = np.array([*(position.get(name, -1) for name in cleaned), -1], dtype=np.int32)
    return Labels(lookup[codes], ordered)


def _plain(values: np.ndarray) -> list[Any]:
    """Return values that are written as they were given: as a Python float, a float32 would have a double's digits."""
    return list(map(str, values)) if values.dtype.kind == "f" else values.tolist()


class Store:
    """An opened file; a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file: BinaryIO | None = None  # the same file for raw chunks
        if self.path.suffix.lower() == ".zarr":
            try:
                import zarr
            except ImportError:
                raise BadFileError("the package zarr is not installed", "pip install zarr, or write h5ad") from None
            with reading("the zarr store"):
                self.root = zarr.open_group(str(self.path), mode="r")
        else:
            with reading("the HDF5 file"):
                # No chunk cache: every chunk is read once, and without it a few rows of a large chunk are read alone.
                self.root = h5py.File(self.path, "r", rdcc_nbytes=0)
            self.file = open(self.path, "rb", buffering=0)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        for name in ("obs", "var"):
            if name not in self.root:
                raise BadFileError(f"it has no table {name!r}", "write it with anndata, as h5ad or zarr")
            if isinstance(self.root[name], h5py.Dataset):
                raise BadFileError(
                    f"its table {name!r} is in the format of anndata before 0.7", "read and write it with anndata"
                )
        with reading("the index of obs"):
            self.n_obs = int(self._index("obs").shape[0])
        if self.n_obs == 0:
            raise BadFileError("it has no cells", "leave it out")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading zarr keeps none open."""
        if self.file is not None:
            self.file.close()
            self.root.close()

    def _index(self, table: str) -> Any:
        group = self.root[table]
        index = group[str(group.attrs.get("_index", "_index"))]
        # Text that may be missing is stored as values and mask; in an index none is.
        return index["values"] if hasattr(index, "keys") else index

    def columns(self, table: str = "obs") -> tuple[str, ...]:
        """Return the names of a table's columns, without the index."""
        group = self.root[table]
        hidden = {str(group.attrs.get("_index", "_index")), "__categories"}
        return tuple(name for name in group if name not in hidden)

    def labels(self, column: str) -> Labels:
        """Read a column of ``obs``."""
        return make_labels(self._read("obs", column))

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
        known = pd.Index(np.concatenate(hashes))
        if known.is_unique:
            return found, 0
        n_repeated = known[known.duplicated()].nunique()
        return [f"{name}#{row}" for name, row in zip(found, rows.tolist(), strict=True)], n_repeated

    def gene_names(self, column: str, *, raw: bool = False) -> list[Any]:
        """Read the gene names."""
        table = "raw/var" if raw else "var"
        if raw and table not in self.root:
            raise BadFileError("it has no raw", "leave --use-raw out")
        if column != INDEX and column not in self.columns(table):
            raise BadFileError(
                f"{table} has no column {column!r} with the gene symbols",
                f"name the right one with --gene-column, it has {[*self.columns(table), INDEX]}",
            )
        values = self._read(table, column)
        return _texts(values) if isinstance(values, np.ndarray) else list(values)

    def _read(self, table: str, column: str) -> Any:
        from anndata.io import read_elem

        if column != INDEX and column not in self.columns(table):
            raise KeyError(column)
        with reading(f"the column {column!r} of {table}"), warnings.catch_warnings():
            element = self._index(table) if column == INDEX else self.root[table][column]
            warnings.simplefilter("ignore")  # anndata tells of old formats, which are read all the same
            legacy = element.attrs.get("categories")
            if legacy is not None and not hasattr(element, "keys"):  # anndata 0.7: codes that point at their names
                import pandas as pd

                codes = element[:]
                return pd.Categorical.from_codes(codes, _texts(self.root[legacy][:]))
            values = read_elem(element)
        return values.array if hasattr(values, "array") and not isinstance(values, np.ndarray) else values

    def matrix(self, *, layer: str | None = None, use_raw: bool = False) -> Any:
        """Find the expression matrix."""
        if layer is not None and use_raw:
            msg = f"layer={layer!r} and use_raw=True exclude each other; choose one"
            raise ValueError(msg)
        layers = sorted(self.root["layers"]) if "layers" in self.root else []
        if use_raw:
            if "raw/X" not in self.root:
                raise BadFileError("it has no raw", "leave --use-raw out")
            return self.root["raw/X"]
        if layer is not None:
            if layer not in layers:
                raise BadFileError(f"it has no layer {layer!r}", f"choose another --layer, it has {layers}")
            return self.root["layers"][layer]
        if "X" not in self.root:
            raise BadFileError("it has no X", f"choose a --layer, it has {layers}, or --use-raw")
        return self.root["X"]


def _texts(values: Any) -> list[Any]:
    return [
        value.decode() if isinstance(value, bytes) else value for value in np.asarray(values, dtype=object).tolist()
    ]
