"""Writing the files of a data set: lists that never lie in memory as a whole, and the copy to another place."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any

from recipe.cello1.files import dumps

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # as everything here that is written whole or not at all


class JsonListWriter:
    """Writes a ``.json`` list item by item, whole or not at all; a context manager.

    The bytes are those of :func:`recipe.cello1.files.write_items`, unless ``indent`` says otherwise.

    Parameters
    ----------
    path
        The file; missing folders are made. It appears when the context is left without an error.
    indent
        Indentation of the items. ``None``: one item a line, which is ten times as fast.
    """

    def __init__(self, path: str | Path, indent: int | None = 2) -> None:
        self.path = Path(path)
        self._indent = indent
        self.count = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> JsonListWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "xb")
        return self

    def write(self, item: Any) -> None:
        """Add an item.

        Parameters
        ----------
        item
            A JSON value.

        Raises
        ------
        ValueError
            If it is not.
        """
        assert self._file is not None, "use the writer as a context manager"
        try:
            text = dumps(item, self._indent)
        except ValueError as error:
            msg = f"{self.path}: item {self.count} {error}"
            raise ValueError(msg) from error
        self._file.write(((",\n" if self.count else "[\n") + text).encode())
        self.count += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is None:
                file.write(b"\n]\n" if self.count else b"[]\n")
                file.flush()
                os.fsync(file.fileno())
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the temporary files that a killed run has left.

    Parameters
    ----------
    folder
        Where to look, at any depth. No run may be writing there.
    """
    for path in Path(folder).rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def copy_out(folder: str | Path, names: Iterable[str], url: str, listed_in: str | None = None) -> list[str]:
    """Copy files to another place.

    Parameters
    ----------
    folder
        Where they are.
    names
        Their paths below it, in the order in which they are copied.
    url
        A folder in any form that fsspec knows: ``hdfs://host/data``, ``s3://bucket/data``, or a plain path.
    listed_in
        Which of them lists them all. What the one of an earlier copy lists, and is not copied now, is removed there.

    Returns
    -------
    Where each came to lie.

    Raises
    ------
    ValueError
        If the place cannot be used.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        msg = f"--copy-to {url} cannot be used ({error}); the library for this kind of storage may not be installed"
        raise ValueError(msg) from None
    names, copied = list(names), []
    earlier = _listed(system, f"{root.rstrip('/')}/{listed_in}") if listed_in else set()
    for name in names:
        target = f"{root.rstrip('/')}/{name}"
        try:
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            system.put_file(str(Path(folder) / name), target)
        except OSError as error:
            msg = f"--copy-to {url}: {name} cannot be written ({error})"
            raise ValueError(msg) from error
        copied.append(target)
    for name in sorted(earlier - set(names)):
        target = f"{root.rstrip('/')}/{name}"
        if system.exists(target):
            system.rm_file(target)
    return copied


def _listed(system: Any, path: str) -> set[str]:
    """Return the files that a manifest lists: none where it is not there, or not one."""
    try:
        found = json.loads(system.cat_file(path))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in found if ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()}
