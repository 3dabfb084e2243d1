"""Files that a killed process leaves whole: JSON and JSONL, written at once or line by line, and any other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np


def dumps(value: Any, indent: int | None = None) -> str:
    """Encode as JSON that always can be written as UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        msg = f"cannot be written as JSON: {error}"
        raise ValueError(msg) from error
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, allow_nan=False, default=_plain)
    return text


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    msg = f"{type(value).__name__} is not JSON"
    raise TypeError(msg)


def _is_jsonl(path: Path) -> bool:
    if path.suffix not in (".json", ".jsonl"):
        msg = f"{path}: the name must end in .json or .jsonl"
        raise ValueError(msg)
    return path.suffix == ".jsonl"


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        msg = f"{path} is not valid JSON: {error}"
        raise ValueError(msg) from None


def read_items(path: str | Path, *, drop_partial_tail: bool = False) -> list[Any]:
    """Read a ``.json`` list or the lines of a ``.jsonl`` file."""
    path = Path(path)
    if not _is_jsonl(path):
        items = read_json(path)
        if not isinstance(items, list):
            msg = f"{path} must hold a list of items, got {type(items).__name__}"
            raise ValueError(msg)
        return items
    # Only "\n" ends a line: text may hold U+2028 and the like.
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()
    if tail and not drop_partial_tail:
        lines.append(tail)
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except ValueError as error:
            msg = f"{path}, line {number} is not valid JSON: {error}"
            raise ValueError(msg) from None
    return items


def write_items(path: str | Path, items: Iterable[Any]) -> None:
    """Write a ``.json`` list or ``.jsonl``, atomically."""
    path = Path(path)
    items = list(items)
    lines = _is_jsonl(path)
    for index, item in enumerate(items):
        try:
            items[index] = dumps(item, None if lines else 2)
        except ValueError as error:
            msg = f"{path}: item {index} {error}"
            raise ValueError(msg) from error
    if lines:
        atomic_write(path, "".join([text + "\n" for text in items]))
    else:
        atomic_write(path, "[\n" + ",\n".join(items) + "\n]\n" if items else "[]\n")


def append_jsonl(path: str | Path, record: Any) -> None:
    """Append one line to a ``.jsonl`` file and push it to the disk."""
    path = Path(path)
    if not _is_jsonl(path):
        msg = f"{path}: only .jsonl files can be appended to"
        raise ValueError(msg)
    line = (dumps(record) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if tail := _unfinished_tail(file):
            if _is_json(tail):
                line = b"\n" + line
            else:
                file.truncate(file.seek(0, os.SEEK_END) - len(tail))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _unfinished_tail(file: BinaryIO) -> bytes:
    """Return what follows the last line break, reading backwards from the end."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        start = max(0, start - (1 << 16))
        file.seek(start)
        tail = file.read(end - start)
    return tail.rpartition(b"\n")[2]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and push it to the disk."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary, open(temporary, "xb") as file:
        if path.exists():
            os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Have a file written whole or not at all: under another name, beside its place, which it takes at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # as everything here that is written whole or not at all


class JsonListWriter:
    """Writes a ``.json`` list item by item, whole or not at all; a context manager."""

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
        """Add an item."""
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
    """Remove the temporary files that a killed run has left."""
    for path in Path(folder).rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
