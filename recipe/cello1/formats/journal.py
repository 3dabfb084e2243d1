"""Where predictions are kept while they are made: one JSONL file, or the published folder of one JSON per item.

Both can be killed at any moment: what is there is whole, and the next run goes on from it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from recipe.cello1.formats.atomic import append_jsonl, atomic_write, dumps, read_items, write_items
from recipe.cello1.formats.predictions import RUN_KEYS, check_prediction, read_predictions

Record = Mapping[str, Any]
Key = tuple[int, int]  # index of the item, number of the sample


class PredictionFiles(Protocol):
    """A place for predictions."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out where they would disturb this one."""
        ...

    def resume(self, items: Sequence[Record], run: Record) -> set[Key]:
        """Check that what is there is of this run, take failures out of it, and say what it holds."""
        ...

    def add(self, record: Record) -> None:
        """Keep a record; it is on the disk when this returns."""
        ...

    def finish(self) -> None:
        """Put everything in order, so that it does not depend on the order in which it was made."""
        ...


def prediction_files(out: str | Path, samples: int = 1) -> PredictionFiles:
    """Choose by the name: ``.jsonl`` is a file, a name without suffix a folder."""
    out = Path(out)
    if out.suffix == ".jsonl" and not out.is_dir():
        return _JsonlFile(out)
    # The suffix of a folder may be a part of a model's name (Qwen2.5-7B).
    if out.suffix == ".json" or out.is_file():
        msg = f"out: {out} must end in .jsonl, or be a folder for one JSON per item"
        raise ValueError(msg)
    if samples > 1:
        msg = f"out: a folder holds one prediction for each item, and {samples} samples are wanted; give a .jsonl file"
        raise ValueError(msg)
    return _Folder(out)


def _kept(records: Sequence[tuple[str, Record]], items: Sequence[Record], run: Record) -> dict[Key, Record]:
    """Return the predictions among the records, having checked that all are of this run."""
    kept: dict[Key, Record] = {}
    for where, record in records:
        answered = check_prediction(record, where)
        if differ := [key for key in RUN_KEYS if record.get(key) != run[key]]:
            key = differ[0]
            msg = (
                f"{where}: made with {key} {record.get(key)!r}, this run has {run[key]!r}; "
                "give another out, or remove it to start anew"
            )
            raise ValueError(msg)
        index, sample = record.get("index"), record.get("sample")
        if not (isinstance(index, int) and 0 <= index < len(items)) or any(
            record.get(name) != value for name, value in items[index].items()
        ):
            msg = f"{where}: its item {index} is not the one of this data set; give another out, or remove it"
            raise ValueError(msg)
        if not isinstance(sample, int):
            msg = f"{where}: its sample must be an integer, got {sample!r}; give another out, or remove it"
            raise ValueError(msg)
        if answered:  # also samples that this run does not ask for: an answer is never thrown away
            kept[index, sample] = record
    return kept


class _JsonlFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self) -> Iterator[None]:
        # A file beside it, as the file itself is replaced. The system lets go of the lock of a process that dies.
        lock = self.path.with_name(f".{self.path.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not lock.exists() or os.fstat(file.fileno()).st_ino != lock.stat().st_ino:
                    raise BlockingIOError  # of a run that has just ended: its successor is under way
            except BlockingIOError:
                msg = f"out: another run is writing to {self.path}; give each shard a file of its own, or wait"
                raise ValueError(msg) from None
            except OSError:  # a file system without locks
                pass
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def resume(self, items: Sequence[Record], run: Record) -> set[Key]:
        if not self.path.exists():
            return set()
        records = read_items(self.path, drop_partial_tail=True)
        named = [(f"{self.path}, record {number}", record) for number, record in enumerate(records, start=1)]
        kept = _kept(named, items, run)
        # A killed writer may leave half a line.
        if len(kept) != len(records) or not self.path.read_bytes().endswith(b"\n"):
            write_items(self.path, kept.values())
        return set(kept)

    def add(self, record: Record) -> None:
        append_jsonl(self.path, record)

    def finish(self) -> None:
        if not self.path.exists():
            return
        records = read_items(self.path)
        ordered = sorted(records, key=lambda record: (record["index"], record["sample"]))
        if ordered != records:
            write_items(self.path, ordered)


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self) -> Iterator[None]:
        yield  # shards write to it side by side

    def resume(self, items: Sequence[Record], run: Record) -> set[Key]:
        if not self.path.is_dir() or not any(file.suffix == ".json" for file in self.path.iterdir()):
            return set()
        # Failures stay until they are replaced: other shards may be writing beside this one.
        named = [(f"{self.path / str(record['index'])}.json", record) for record in read_predictions(self.path)]
        return set(_kept(named, items, run))

    def add(self, record: Record) -> None:
        atomic_write(self.path / f"{record['index']}.json", dumps(record, 4) + "\n")

    def finish(self) -> None:
        """Do nothing: the names are the order."""
