"""Answers kept while they are made: a JSONL file with several writers, or the published folder of one JSON per item.

Both can be killed at any moment: what is there is whole, and the next run goes on from it. In memory are only the keys
of the records and where they begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import append_jsonl, atomic_write, dumps, held, read_json, read_lines, replacing

Record = Mapping[str, Any]
# Checks a record that is there (the text says where it stands), and returns its key, or None if it is to be made again.
ReadKey = Callable[[Any, str], Hashable | None]


class Journal:
    """A JSONL file of records that are found by a key."""

    def __init__(self, path: str | Path, read_key: ReadKey) -> None:
        self.path = Path(path)
        self._begins: dict[Hashable, int] = {}
        self._lines = 0
        if self.path.exists():
            for number, start, record in read_lines(self.path, drop_partial_tail=True):
                key = read_key(record, f"{self.path}, line {number}")
                self._lines += 1
                if key is not None:
                    self._begins[key] = start

    @staticmethod
    def held(path: str | Path, shard: tuple[int, int] = (0, 1)) -> AbstractContextManager[None]:
        """Keep other runs out, other shards, too."""
        return held(path, remedy="give each shard a file of its own")

    @property
    def size(self) -> int:
        """How many records there are."""
        return len(self._begins)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._begins

    def __getitem__(self, key: Hashable) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self._begins[key])
            return json.loads(file.readline())

    def add(self, key: Hashable, record: Record) -> None:
        """Keep a record; it is on the disk when this returns."""
        self._begins[key] = append_jsonl(self.path, record)
        self._lines += 1

    def tidy(self, *, order: bool = False) -> None:
        """Leave out what is to be made again and what a killed writer has left; put the rest in order of the keys."""
        if not self.path.exists():
            return
        begins = [start for _, start in sorted(self._begins.items())] if order else list(self._begins.values())
        with open(self.path, "rb") as file:
            file.seek(-1 if (whole := file.seek(0, 2)) else 0, 2)
            if len(begins) == self._lines and begins == sorted(begins) and (not whole or file.read(1) == b"\n"):
                return
            keys = sorted(self._begins) if order else list(self._begins)  # type: ignore[type-var]
            with replacing(self.path) as temporary, open(temporary, "xb") as copy:
                for key, start in zip(keys, begins, strict=True):
                    file.seek(start)
                    self._begins[key] = copy.tell()
                    copy.write(file.readline())
        self._lines = len(keys)


class FolderJournal:
    """The published folder of ``<index>.json``, one for each item; shards write to it side by side."""

    def __init__(self, path: str | Path, read_key: ReadKey) -> None:
        self.path = Path(path)
        self._keys = set()
        for _, file in item_files(self.path) if self.path.is_dir() else ():
            self._keys.add(read_key(read_json(file), str(file)))
        # Failures stay until they are replaced: other shards may be writing beside this one.
        self._keys.discard(None)

    @staticmethod
    def held(path: str | Path, shard: tuple[int, int] = (0, 1)) -> AbstractContextManager[None]:
        """Keep other runs of a shard out; other shards may write, too."""
        return held(Path(path) / f"shard {shard[0]} of {shard[1]}", remedy="give each shard a number of its own")

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def add(self, key: Hashable, record: Record) -> None:
        """Keep a record; it is on the disk when this returns."""
        atomic_write(self.path / f"{record['index']}.json", dumps(record, 4) + "\n")

    def tidy(self, *, order: bool = False) -> None:
        """Do nothing: the names are the order."""


def item_files(folder: Path) -> list[tuple[int, Path]]:
    """List the files of the published layout with their indices, in order."""
    files = [file for file in folder.iterdir() if file.suffix == ".json"]
    if strange := sorted(file.name for file in files if not file.stem.isdecimal()):
        raise ValueError(f"{folder}: {strange[0]!r} is not named after an item (<index>.json); move it elsewhere")
    return sorted((int(file.stem), file) for file in files)
