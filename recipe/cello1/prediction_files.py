"""Where predictions are kept while they are made: one JSONL file, or the published folder of one JSON per item.

Both can be killed at any moment: what is there is whole, and the next run goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from recipe.cello1.files import append_jsonl, atomic_write, dumps, read_items, write_items
from recipe.cello1.records import check_prediction, read_predictions

Record = Mapping[str, Any]
Key = tuple[int, int]  # index of the item, number of the sample

# A file made with other values of these is of another run.
_RUN_KEYS = ("engine", "model", "fingerprint", "sampling", "prompt_layout")


class PredictionFiles(Protocol):
    """A place for predictions."""

    def resume(self, items: Sequence[Record], samples: int, run: Record) -> set[Key]:
        """Check that what is there is of this run, take failures out of it, and say what it holds.

        Parameters
        ----------
        items
            The items of the data set.
        samples
            Samples wanted of each.
        run
            The settings of the run.

        Returns
        -------
        Index and sample of each prediction that is there.

        Raises
        ------
        ValueError
            If something there is of another run or data set.
        """
        ...

    def add(self, record: Record) -> None:
        """Keep a record; it is on the disk when this returns.

        Parameters
        ----------
        record
            A prediction or error record.
        """
        ...

    def finish(self) -> None:
        """Put everything in order, so that it does not depend on the order in which it was made."""
        ...


def prediction_files(out: str | Path, samples: int = 1) -> PredictionFiles:
    """Choose by the name: ``.jsonl`` is a file, a name without suffix a folder.

    Parameters
    ----------
    out
        Path of the file or folder.
    samples
        Samples of each item. A folder has room for one.

    Returns
    -------
    The place.

    Raises
    ------
    ValueError
        If the name fits neither, or several samples are to go into a folder.
    """
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


def _kept(
    records: Sequence[tuple[str, Record]], items: Sequence[Record], samples: int, run: Record
) -> dict[Key, Record]:
    """Return the predictions among the records, having checked that all are of this run."""
    kept: dict[Key, Record] = {}
    for where, record in records:
        answered = check_prediction(record, where)
        if differ := [key for key in _RUN_KEYS if record.get(key) != run[key]]:
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
        if answered and isinstance(sample, int) and sample < samples:
            kept[index, sample] = record
    return kept


class _JsonlFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self, items: Sequence[Record], samples: int, run: Record) -> set[Key]:
        if not self.path.exists():
            return set()
        records = read_items(self.path, drop_partial_tail=True)
        named = [(f"{self.path}, record {number}", record) for number, record in enumerate(records, start=1)]
        kept = _kept(named, items, samples, run)
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

    def resume(self, items: Sequence[Record], samples: int, run: Record) -> set[Key]:
        if not self.path.is_dir() or not any(file.suffix == ".json" for file in self.path.iterdir()):
            return set()
        # Failures stay until they are replaced: other shards may be writing beside this one.
        named = [(f"{self.path / str(record['index'])}.json", record) for record in read_predictions(self.path)]
        return set(_kept(named, items, samples, run))

    def add(self, record: Record) -> None:
        atomic_write(self.path / f"{record['index']}.json", dumps(record, 4) + "\n")

    def finish(self) -> None:
        """Do nothing: the names are the order."""
