"""Files that a killed process leaves whole: JSON and JSONL, written at once, item by item or line by line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from recipe.cello1.task.text import shown

_CHUNK = 1 << 20  # characters read at a time


def dumps(value: Any, indent: int | None = None) -> str:
    """Encode as JSON that always can be written as UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON: {error}") from error
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
    raise TypeError(f"{type(value).__name__} is not JSON")


def _is_jsonl(path: Path) -> bool:
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(f"{path}: the name must end in .json or .jsonl")
    return path.suffix.lower() == ".jsonl"


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    with _json_of(str(path)):
        return loads(Path(path).read_bytes())


def loads(text: str | bytes) -> Any:
    """Decode JSON in which no key stands twice in an object: of two values json keeps the last one without a word."""
    twice: list[str] = []
    found = json.loads(text, object_pairs_hook=partial(_object, twice))
    _check_keys(twice)
    return found


def _object(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice += [key for key in found if keys.count(key) > 1][:1]
    return found


def _check_keys(twice: list[str]) -> None:
    if twice:
        raise ValueError(f"the key {shown(twice[0])} stands twice in one object; remove the wrong one")


@contextmanager
def _json_of(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, too deep
        raise ValueError(f"{what} is not valid JSON: {error}") from None


def read_items(path: str | Path, *, drop_partial_tail: bool = False) -> list[Any]:
    """Read a ``.json`` list or the lines of a ``.jsonl`` file."""
    return list(iter_items(path, drop_partial_tail=drop_partial_tail))


def iter_items(path: str | Path, *, drop_partial_tail: bool = False, keep_going: bool = False) -> Iterator[Any]:
    """Read item by item, one in memory; with ``keep_going`` an item that cannot be read gives its error instead."""
    path = Path(path)
    if not _is_jsonl(path):
        yield from _list_items(path, keep_going)
        return
    for _, _, item in read_lines(path, drop_partial_tail=drop_partial_tail, keep_going=keep_going):
        yield item


def read_lines(
    path: str | Path, *, drop_partial_tail: bool = False, keep_going: bool = False
) -> Iterator[tuple[int, int, Any]]:
    """Read a ``.jsonl`` file line by line, each with its number and where in the file it begins."""
    at = 0
    with open(path, "rb") as file:  # only "\n" ends a line: text may hold U+2028 and the like
        for number, line in enumerate(file, start=1):
            start, at = at, at + len(line)
            if not line.strip() or (drop_partial_tail and not line.endswith(b"\n")):
                continue
            try:
                with _json_of(f"{path}, line {number}"):
                    item = loads(line)
            except ValueError as error:
                if not keep_going:
                    raise
                item = error
            yield number, start, item


def _list_items(path: Path, keep_going: bool) -> Iterator[Any]:
    for number, (item, twice) in enumerate(_decoded(path)):
        try:
            with _json_of(f"{path}, item {number}"):
                _check_keys(twice)
        except ValueError as error:
            if not keep_going:
                raise
            item = error
        yield item


def _decoded(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """Decode the items of a list one by one, each with the keys that stand twice in it."""
    twice: list[str] = []
    decode = json.JSONDecoder(object_pairs_hook=partial(_object, twice)).raw_decode
    skip = re.compile(r"[ \t\n\r]*").match
    with open(path, "rb") as binary:
        encoding = json.detect_encoding(binary.read(4))
    with (
        suppress(ValueError, RecursionError),
        open(path, encoding=encoding, errors="surrogatepass", newline="") as file,
    ):
        text, more, size, wanted = "", "", _CHUNK, "["
        while more := file.read(size):
            text, at = text + more, 0
            while (at := skip(text, at).end()) < len(text) and wanted:  # type: ignore[union-attr]
                mark = text[at]
                if wanted == "item" or (wanted == "first" and mark != "]"):
                    twice.clear()  # of an item that was there in part only
                    try:
                        item, end = decode(text, at)
                    except ValueError:
                        break
                    if text[(end := skip(text, end).end()) : end + 1] not in (",", "]"):  # type: ignore[union-attr]
                        break  # a number may go on
                    yield item, twice
                    at, wanted = end, ","
                elif mark == "]" and wanted in ("first", ","):
                    at, wanted = at + 1, "end"
                elif mark == wanted:
                    at, wanted = at + 1, "first" if mark == "[" else "item"
                else:
                    wanted = ""
            text, size = text[at:], _CHUNK if at else 2 * size  # an item may be longer than what has been read
        if wanted == "end" and not text:
            return
    found = read_json(path)  # says what is wrong
    raise ValueError(f"{path} must hold a list of items, got {type(found).__name__}")


def write_items(path: str | Path, items: Iterable[Any]) -> None:
    """Write a ``.json`` list or ``.jsonl``, whole or not at all."""
    with JsonListWriter(path, None if _is_jsonl(Path(path)) else 2) as writer:
        for item in items:
            writer.write(item)


def append_jsonl(path: str | Path, record: Any) -> int:
    """Append one line to a ``.jsonl`` file, push it to the disk, and say where it begins."""
    path = Path(path)
    if not _is_jsonl(path):
        raise ValueError(f"{path}: only .jsonl files can be appended to")
    line = (dumps(record) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(open_no_link(path, os.O_RDWR | os.O_CREAT | os.O_APPEND))
            alone = _lock(file, fcntl.LOCK_EX)
            if _is_still(file, path):
                break  # else it was replaced while we waited
            stack.close()
        if tail := _unfinished_tail(file):
            # Whoever has written half a line was killed, as we hold the lock; without locks it may be at work yet.
            if alone and not _is_json(tail):
                os.ftruncate(file.fileno(), file.seek(0, os.SEEK_END) - len(tail))
            else:
                line = b"\n" + line
        start = file.seek(0, os.SEEK_END) + line.startswith(b"\n")
        file.write(line)
        file.flush()
        _lock(file, fcntl.LOCK_UN)
        os.fsync(file.fileno())
    return start


def open_no_link(path: Path, flags: int) -> BinaryIO:
    """Open a file to write, but never what a link points to."""
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError:
        if not path.is_symlink():
            raise
        raise ValueError(f"{path} is a symbolic link; give the file itself") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{path} is no plain file; remove it")
    return os.fdopen(number, "rb+")


def _lock(file: IO[Any], kind: int) -> bool:
    """Lock a file, or let go of it; ``False`` where the file system has no locks."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_still(file: IO[Any], path: Path) -> bool:
    """Tell whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def held(path: str | Path, name: str = "out", remedy: str = "give each run a place of its own") -> Iterator[None]:
    """Keep other runs out of a file or folder. The system lets go of the lock of a process that dies."""
    path = Path(path)
    # A file beside it, as a file itself may be replaced.
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = open_no_link(lock, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"{name}: {lock} cannot be written ({error.strerror}); remove it, or {remedy}") from None
    with opened as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is_still(file, lock)  # else of a run that has just ended: its successor is under way
        except BlockingIOError:
            free = False
        if not free:
            raise ValueError(f"{name}: another run is writing to {path}; {remedy}, or wait")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


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


def check_place(path: str | Path, name: str = "out") -> None:
    """Check that a file can be written, in folders that may have to be made, before what it is to hold is worked on."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a folder; name a file in it")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            raise ValueError(f"{name}: {path} cannot be written, {folder} is a file; choose another place")
        # With a name as long as that of the file is while it is written.
        tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.{24 * '0'}", suffix=".tmp").close()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written ({error.strerror}); choose another place") from None


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Have a file written whole or not at all: under another name, which becomes its own once it is on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # as `replacing` names them


class JsonListWriter:
    """Writes a ``.json`` list (or ``.jsonl``) item by item, whole or not at all; a context manager."""

    def __init__(self, path: str | Path, indent: int | None = 2) -> None:
        self.path = Path(path)
        self._indent = indent
        self.count = 0
        self._stack = ExitStack()
        self._marks = ("", "\n", "\n", "") if self.path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n", "[]\n")

    def __enter__(self) -> JsonListWriter:
        temporary = self._stack.enter_context(replacing(self.path))
        self._file = self._stack.enter_context(open(temporary, "xb"))
        return self

    def write(self, item: Any) -> None:
        """Add an item."""
        try:
            text = dumps(item, self._indent)
        except ValueError as error:
            raise ValueError(f"{self.path}: item {self.count} {error}") from error
        self._file.write((self._marks[self.count > 0] + text).encode())
        self.count += 1

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._file.write(self._marks[2 if self.count else 3].encode())
        self._stack.__exit__(*error)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the temporary files that a killed run has left."""
    for path in Path(folder).rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
