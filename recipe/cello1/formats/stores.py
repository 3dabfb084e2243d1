"""Expression files, h5ad and zarr, opened to be read: by what they are, whatever their names say.

What is something else is refused by its name, and so is what takes values from outside itself: it could be any file of
this machine.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.task.text import shown

DAMAGED = "the file is damaged: fetch or write it again"
_OUTSIDE = "copy the data into the file, with anndata for example; a file from a stranger may be an attack"
# What an error text of the libraries speaks of, and what to do.
_REMEDIES = {
    r"MemoryError|[Mm]emory allocation|[Uu]nable to allocate|[Oo]ut of memory": (
        "it takes more memory than is free: use a larger machine; a small file that does may be an attack"
    ),
    r"lock file|already open|consistency flags|temporarily unavailable": (
        "another process has it open for writing: close it there (a notebook, for example) and start again; "
        "if none has, its writer was killed, and h5clear -s makes it readable"
    ),
    r"filter returned failure": "the file is damaged, or takes more memory than is free: fetch or write it again",
    r"filter|plugin": "it is compressed by a filter that HDF5 lacks: pip install hdf5plugin, or write it with gzip",
    r"[Pp]ermission denied|errno = 13\b": "grant yourself permission to read it",
    r"[Nn]o such file|errno = 2\b": "check its path",
    r"[Tt]oo many open files|errno = 24\b": "raise the limit of open files (ulimit -n), or use fewer workers=",
    r"No Zarr data type|codec not available|[Uu]nknown codec": (
        "it holds what zarr does not read here: write it again with anndata"
    ),
    r"codec can't decode": "its text is not UTF-8: write it anew as UTF-8, with anndata for example",
    r"[Ii]nput/output error|[Ss]tale file handle|errno = (5|116)\b": "check the drive it is on, and run again",
}
# Kinds of files that are not AnnData, by a group at their root.
_STRANGERS = {
    "mod": (
        "is MuData (h5mu) with the modalities {}",
        "write one of them as a file: mudata['NAME'].write('NAME.h5ad')",
    ),
    "matrix": ("is a 10x matrix with {}", "convert it: scanpy.read_10x_h5(FILE).write_h5ad('NAME.h5ad')"),
    "row_attrs": ("is a loom file with {}", "convert it: anndata.io.read_loom(FILE).write_h5ad('NAME.h5ad')"),
    "assays": ("is a Seurat file with the assays {}", "convert it to h5ad, with SeuratDisk for example"),
}
# Kinds of files that are not HDF5, by how they begin.
_BEGINNINGS = {
    rb"$": ("is empty", "fetch or write it again"),
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|PK\x03\x04": ("is packed (gzip, zip or the like)", "unpack it"),
    rb"version https://git-lfs": ("only points to the data (Git LFS)", "fetch them: git lfs pull"),
    rb"\s*<": ("is a web page or XML", "download it again: the address may want you to log in"),
}
_TOO_MANY_BYTES = 1 << 16  # beyond twice what an array has, which no compression makes of it
# The least bytes that a chunk has, by the 16 at its beginning: the length that Blosc notes, four for each text.
_SAID: dict[str, Callable[[bytes], int]] = {
    "Blosc": lambda head: int.from_bytes(head[12:], "little"),
    **dict.fromkeys(("VLenUTF8", "VLenBytes", "VLenArray"), lambda head: 4 + 4 * int.from_bytes(head[:4], "little")),
}
_ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")


class BadFileError(ValueError):
    """A file that cannot be used: ``reason`` says what is wrong, ``remedy`` what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def remedy_of(error: BaseException) -> str:
    """Return what to do about an error of a storage library; empty if its text speaks of nothing that is known."""
    text = " ".join(f"{type(error).__name__} {error}".split())
    return next((remedy for cause, remedy in _REMEDIES.items() if re.search(cause, text)), "")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what the storage libraries raise into :class:`BadFileError`, with the remedy that its cause has."""
    try:
        yield
    except BadFileError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:  # h5py and zarr raise these
        text = " ".join(str(error).split()) or type(error).__name__
        raise BadFileError(f"{what} cannot be read ({text})", remedy_of(error) or DAMAGED) from error


def open_store(path: str | Path) -> Any:
    """Open an h5ad file or a zarr store: its root group, a context manager."""
    path = Path(path)
    if path.is_dir():
        with reading("the zarr store"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr tells of what lies in the folder besides
            root = _open_zarr(path)
    elif path.exists() and not path.is_file():
        raise BadFileError("it is neither a file nor a folder", "give an h5ad file or a zarr store")
    else:
        root = _open_hdf5(path)
    try:
        with reading("the zarr store" if path.is_dir() else "the HDF5 file"):
            _check_kind(root)
            if path.is_dir():
                _check_chunks(root)
    except BaseException:
        close_store(root)
        raise
    return root


def close_store(root: Any) -> None:
    """Close what was opened; zarr keeps nothing open."""
    if hasattr(root, "close"):
        root.close()


def check_store(path: str | Path) -> None:
    """Check that an h5ad file or a zarr store may be read."""
    close_store(open_store(path))


def is_zarr(path: Path) -> bool:
    """Say whether a folder is a zarr store."""
    return any((path / name).is_file() for name in _ZARR_MARKS)


def _open_zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError:
        raise BadFileError("the package zarr is not installed", "pip install zarr, or write h5ad") from None
    if not is_zarr(path):
        raise BadFileError("it is a folder, but not a zarr store", "give an h5ad file or a zarr store")
    _check_folder(path)
    import numcodecs

    numcodecs.registry.codec_registry.pop("pickle", None)  # runs what it reads; only its recent versions refuse
    for codec, said in _SAID.items():
        _guard(getattr(numcodecs, codec), said)
    try:
        # Not by the consolidated metadata, which may tell of an earlier state.
        return zarr.open_group(str(path), mode="r", use_consolidated=False)
    except FileNotFoundError:
        return zarr.open_group(str(path), mode="r")


def _guard(codec: Any, said: Callable[[bytes], int]) -> None:
    """Refuse chunks that say to be longer than they are: numcodecs (0.16.6) lets C read on behind them, and crashes."""
    decode = codec.decode
    if hasattr(decode, "__wrapped__"):
        return

    @wraps(decode)
    def checked(self: Any, buf: Any, *others: Any, **named: Any) -> Any:
        chunk = memoryview(buf).cast("B")
        if len(chunk) < (least := said(bytes(chunk[:16]).ljust(16, b"\xff"))):
            raise ValueError(f"a chunk says that it has {least:,} bytes, and has {len(chunk):,}")
        return decode(self, buf, *others, **named)

    codec.decode = checked


def _open_hdf5(path: Path) -> Any:
    import h5py

    with reading("the HDF5 file"):
        try:
            # No chunk cache: every chunk is read once, and without it a few rows of a large chunk are read alone.
            file = h5py.File(path, "r", rdcc_nbytes=0)
        except OSError as error:
            if "signature not found" not in str(error):
                raise
            with open(path, "rb") as other:
                begins = other.read(64)
            for mark, (what, remedy) in _BEGINNINGS.items():
                if re.match(mark, begins):
                    raise BadFileError(f"it {what}", remedy) from None
            raise BadFileError("it is no HDF5 file", "give an h5ad file, or fetch or write it again") from None
        try:
            check_hdf5(file)
        except BaseException:
            file.close()
            raise
    return file


def _check_kind(root: Any) -> None:
    for name, (what, remedy) in _STRANGERS.items():
        if name in root and hasattr(root[name], "keys") and (name == "mod" or "obs" not in root):
            raise BadFileError(f"it {what.format(', '.join(root[name]))}", remedy)
    for name in ("obs", "var"):
        if name not in root:
            raise BadFileError(f"it has no table {name!r}", "write it with anndata, as h5ad or zarr")


def _check_folder(folder: Path) -> None:
    top, todo = folder.resolve(), [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                name = os.path.relpath(entry.path, folder)
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(top):
                    raise BadFileError(f"its {name} is a link to {os.readlink(entry.path)}, outside of it", _OUTSIDE)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif not entry.is_file() and not entry.is_dir():
                    raise BadFileError(
                        f"its {name} is neither a file nor a folder", "remove it, or copy the store again"
                    )


def missing_chunks(array: Any) -> int:
    """Count the chunks of an array that zarr reads as zeros or empty text, as they are not stored; HDF5 has none."""
    if not hasattr(array, "nchunks_initialized") or not array.shape:
        return 0
    if not hasattr(array.store, "root"):  # zarr 2, which lists the folder itself
        return array.nchunks - array.nchunks_initialized
    grid = [-(-size // max(1, step)) for size, step in zip(array.shape, array.shards or array.chunks, strict=True)]
    top, stored = Path(array.store.root) / array.path, 0
    for folder, _, names in os.walk(top):  # zarr would ask the file system for each chunk
        inside = "" if folder == str(top) else f"{Path(folder).relative_to(top).as_posix()}/"
        for key in (inside + name for name in names):
            at = tuple(map(int, re.findall(r"\d+", key)))
            inside_grid = len(at) == len(grid) and all(i < n for i, n in zip(at, grid, strict=True))
            stored += inside_grid and array.metadata.encode_chunk_key(at) == key
    return math.prod(grid) - stored


def chunk_notes(array: Any, where: str, counted: str) -> list[str]:
    """Say that chunks are missing which a writer may have left out, as they count as zeros or the like."""
    missing = missing_chunks(array)
    said = f"{missing:,} chunks of {where} are not stored and count as {counted}: is the store a whole copy?"
    return [said] if missing else []


def column_notes(element: Any, where: str, first: object = "") -> list[str]:
    """Say the same of a column of a table, of which all in a chunk may be of the first category."""
    if hasattr(element, "keys"):
        if "codes" not in element:
            return [note for part in element for note in column_notes(element[part], where, first)]
        names = element["categories"]
        several = (names["values"] if hasattr(names, "keys") else names).shape[0] > 1
        return chunk_notes(element["codes"], where, shown(first)) if several else []
    if element.dtype.kind == "b":  # a flag is the same in all cells of a chunk often enough
        return []
    return chunk_notes(element, where, "0" if element.dtype.kind in "iuf" else "''")


def spelt_out(values: Any, dtype: Any) -> Any:
    """Return what the numbers of an HDF5 enumeration stand for; h5py and anndata return the numbers."""
    import h5py

    if not (numbers := h5py.check_enum_dtype(dtype)):
        return values
    names = {number: name for name, number in numbers.items()}
    distinct, where = np.unique(values, return_inverse=True)
    return np.array([names.get(number) for number in distinct.tolist()], dtype=object)[where]


def _check_chunks(root: Any) -> None:
    """Check that no chunk is missing that no writer leaves out: of sparse matrices, and of names."""
    # Codes are left out by writers where all in a chunk are of the first category.
    layers = [f"layers/{name}" for name in root["layers"]] if "layers" in root else []
    needed = []
    for place in ("X", "raw/X", *layers):
        if place in root and hasattr(root[place], "keys") and "data" in root[place] and root[place]["data"].shape[0]:
            needed += [f"{place}/{part}" for part in ("data", "indices", "indptr")]
    for table in ("obs", "var", "raw/var"):
        if table not in root or not hasattr(root[table], "keys"):
            continue
        index = f"{table}/{root[table].attrs.get('_index', '_index')}"
        needed += [index + "/values" * (f"{index}/values" in root)]
        needed += [f"{table}/{name}/categories" for name in root[table] if f"{table}/{name}/codes" in root]
    for place in needed:
        if place in root and (missing := missing_chunks(root[place])):
            raise BadFileError(f"{missing:,} chunks of its {place} are missing", "copy the whole store again")


def _bytes_of_chunks(dataset: Any) -> int:
    chunk = dataset.get_create_plist().get_chunk()
    n_chunks = math.prod(-(-size // length) for size, length in zip(dataset.shape, chunk, strict=True))
    return n_chunks * math.prod(chunk) * dataset.dtype.itemsize


def check_hdf5(file: Any) -> None:
    """Check that an opened HDF5 file takes nothing from outside; loads ``hdf5plugin`` where a filter is lacking."""
    from h5py import h5d, h5g, h5l, h5o, h5z

    todo, seen, lacking = [("", file["/"].id)], set(), False
    while todo:
        where, group = todo.pop()
        for name in group:
            shown = f"{where}/{name.decode(errors='backslashreplace')}".lstrip("/")
            kind = group.links.get_info(name).type
            if kind == h5l.TYPE_SOFT:  # leads to what is looked at anyway
                continue
            if kind != h5l.TYPE_HARD:
                target = group.links.get_val(name)[0].decode(errors="backslashreplace") if kind == 64 else "elsewhere"
                raise BadFileError(f"its {shown} is an external link to {target}", _OUTSIDE)
            child = h5o.open(group, name)
            if isinstance(child, h5g.GroupID):
                if (address := h5o.get_info(child).addr) not in seen:
                    seen.add(address)
                    todo.append((shown, child))
            elif isinstance(child, h5d.DatasetID):
                properties = child.get_create_plist()
                if properties.get_layout() == h5d.VIRTUAL:
                    raise BadFileError(f"its {shown} is a virtual dataset, made of other files", _OUTSIDE)
                if properties.get_external_count():
                    outside = properties.get_external(0)[0].decode(errors="backslashreplace")
                    raise BadFileError(f"its {shown} lies in another file, {outside}", _OUTSIDE)
                filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
                if filters and child.get_storage_size() > _TOO_MANY_BYTES + 2 * _bytes_of_chunks(child):
                    # HDF5 unpacks a chunk to whatever it holds: a small file would fill any memory.
                    raise BadFileError(f"its {shown} is stored in more bytes than it has", DAMAGED)
                lacking |= not all(map(h5z.filter_avail, filters))
    if lacking:
        with suppress(ImportError):
            import hdf5plugin  # noqa: F401
