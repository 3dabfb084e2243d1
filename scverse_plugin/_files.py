"""Files of the user: read, and looked at before anything is asked, so that what is asked can be kept."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.formats.atomic import check_place, replacing
from recipe.cello1.formats.machine import limited_memory
from recipe.cello1.formats.stores import (
    BadFileError,
    chunk_notes,
    close_store,
    column_notes,
    is_zarr,
    open_store,
    remedy_of,
    spelt_out,
)
from recipe.cello1.task.text import visible

H5AD, ZARR = ".h5ad", ".zarr"


def user_cache() -> Path:
    """Return ``CELLO1_CACHE``, or the folder where this platform keeps what a program can do without."""
    if own := os.environ.get("CELLO1_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cello1"


def check_output(path: Path, name: str = "output") -> None:
    """Check where an annotated object is to go."""
    if path.suffix not in (H5AD, ZARR):
        raise ValueError(f"{name}: {path} must end in {H5AD} or {ZARR}")
    if store := next((folder for folder in path.absolute().parents if is_zarr(folder)), None):
        raise ValueError(f"{name}: {path} would lie in the zarr store {store}; choose a place outside of it")
    if path.suffix == H5AD:
        check_place(path, name)
        return
    if importlib.util.find_spec("zarr") is None:
        raise ValueError(f"{name}: {path} needs the package zarr, which is not installed: pip install zarr")
    if path.is_dir() and any(path.iterdir()) and not is_zarr(path):
        raise ValueError(f"{name}: {path} is a folder of other files, not a zarr store; choose another name")
    if path.is_file():
        raise ValueError(f"{name}: {path} is a file, a zarr store is a folder; remove it or choose another name")
    check_place(path / "zarr.json", name)


def check_storable(adata: AnnData, path: Path) -> None:
    """Check that an object can be stored: write it, without its large matrices, into memory."""
    try:
        if path.suffix == ZARR:
            import zarr

            _write_parts(adata, zarr.group(store=zarr.storage.MemoryStore()))
        else:
            with h5py.File(f"{uuid.uuid4().hex}", "w", driver="core", backing_store=False) as file:
                _write_parts(adata, file)
    except Exception as error:
        msg = f"input: what it holds cannot be written again ({one_line(error)}); rename or remove this part first"
        raise ValueError(msg) from error


def _write_parts(adata: AnnData, group: Any) -> None:
    parts: dict[str, Any] = {"obs": adata.obs, "var": adata.var, "uns": dict(adata.uns)}
    if adata.raw is not None:
        parts |= {"raw.var": adata.raw.var, "raw.varm": dict(adata.raw.varm)}
    some = adata[:1, :1]
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        parts[name] = dict(getattr(some, name))
    for name, part in parts.items():
        try:
            ad.io.write_elem(group, name.replace(".", "_"), part)
        except Exception as error:
            raise ValueError(f"{name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the first line that an error says, without what a terminal would obey."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return visible(lines[0]) if lines else type(error).__name__


def check_input(path: Path) -> None:
    """Check that there is something to read."""
    if not path.exists():
        raise FileNotFoundError(f"input: {path} does not exist; correct the path")


def read_object(path: Path) -> AnnData:
    """Read an h5ad file or a zarr store: opened once to be checked, and to be looked into where anndata does not."""
    check_input(path)
    try:
        root = open_store(path)
    except BadFileError as error:
        raise ValueError(f"input: {path}: {error}") from None
    try:
        with limited_memory():
            adata = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
            _look_into(adata, root, zarr=path.is_dir())
            return adata
    except Exception as error:
        remedy = remedy_of(error) or "if it is whole, write it again with anndata"
        msg = f"input: {path} cannot be read as an AnnData object ({type(error).__name__}: {one_line(error)}); {remedy}"
        raise ValueError(msg) from error
    finally:
        close_store(root)


def _look_into(adata: AnnData, root: Any, *, zarr: bool) -> None:
    """Name what anndata leaves as numbers of an enumeration, and say which chunks of a zarr store are missing."""
    for table, frame in (("obs", adata.obs), ("var", adata.var)):
        for name in frame.columns:
            _spell_out(frame, name, root[table])
    notes = []
    for place in ("X", "raw/X", *(f"layers/{name}" for name in adata.layers)):
        if place in root and not hasattr(root[place], "keys"):
            notes += chunk_notes(root[place], place, "zeros")
    texts = adata.obs.select_dtypes(["category", "object", "string"]) if zarr else pd.DataFrame()
    for name, column in texts.items():  # numbers are no groups, and often all 0
        if f"obs/{name}" not in root:
            continue
        first = column.cat.categories[:1] if isinstance(column.dtype, pd.CategoricalDtype) else ()
        notes += column_notes(root[f"obs/{name}"], f"obs/{name}", *first)
    for note in notes:
        logg.warning(note)


def _spell_out(frame: pd.DataFrame, name: str, table: Any) -> None:
    fields = getattr(table, "dtype", None)  # a table of anndata before 0.7 is one array
    if name not in (table if fields is None else fields.names):
        return
    dtype = fields[name] if fields is not None else getattr(table[name], "dtype", None)
    values = frame[name].to_numpy()
    if dtype is not None and (found := spelt_out(values, dtype)) is not values:
        frame[name] = pd.Categorical(found)


def write_object(adata: AnnData, path: Path) -> None:
    """Write an object whole or not at all."""
    if path.suffix != ZARR:
        with replacing(path) as temporary:
            adata.write_h5ad(temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    new, old = (path.with_name(f".{path.name}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        adata.write_zarr(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if not path.exists() and old.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
