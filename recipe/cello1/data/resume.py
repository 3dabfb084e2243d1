"""What is known of each file already: its puzzles, saved when the file is done, so that a run can be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from recipe.cello1.data.extract import FileResult, Job
from recipe.cello1.formats.atomic import atomic_write, dumps, replacing
from recipe.cello1.formats.provenance import digest
from recipe.cello1.task.puzzle import Puzzle

FOLDER, REST = ".parts", ".rest"  # of whole files, and of files without the cells that are there again
_FORMAT = 6  # raise it when the same settings give other puzzles
_NO_CELLS = np.empty((2, 0), np.uint64)


def part_path(out: Path, job: Job) -> Path:
    """Return where the part of a file lies."""
    return out / (REST if job.repeated else FOLDER) / f"{job.name}.json"


def _cells_path(out: Path, job: Job) -> Path:
    return part_path(out, job).with_suffix(".npy")


def part_key(job: Job) -> str:
    """Hash what a part depends on: the file, as far as its size and date tell, and the settings."""
    path = Path(job.path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    repeated = {name: sha256(rows.tobytes()).hexdigest() for name, rows in job.repeated.items()}
    known = [_FORMAT, job.name, job.folder, job.settings.plain(), stamps, bool(job.records), repeated]
    return digest(known)


def _stamp(job: Job) -> list[int]:
    """Return size and date of the cell records; nothing where there are none, as of a file without usable cells."""
    if not job.records or not Path(job.records).is_file():
        return []
    about = Path(job.records).stat()
    return [about.st_size, about.st_mtime_ns]


def save_part(out: Path, job: Job, result: FileResult) -> FileResult:
    """Save the result of a file that could be used; records that it no longer has are removed."""
    if job.records and not result.n_records:
        Path(job.records).unlink(missing_ok=True)
    if not result.reason:
        if not job.repeated:
            with replacing(_cells_path(out, job)) as temporary, open(temporary, "wb") as file:
                np.save(file, np.stack([part.view(np.uint64) for part in result.cells or _NO_CELLS]))
        puzzles = [asdict(puzzle) for puzzle in result.puzzles]
        head = asdict(replace(result, puzzles=(), cells=None))
        part = {"key": part_key(job), "records": _stamp(job), "result": {**head, "puzzles": puzzles}}
        atomic_write(part_path(out, job), dumps(part))
    return replace(result, puzzles=(), cells=None)


def load_part(out: Path, job: Job, *, records: bool = True) -> FileResult | None:
    """Load the result of a file, if it is there and still holds: its cell records, too, where ``records`` says so."""
    try:  # records may have been written anew since, without cells that are there again
        part = json.loads(part_path(out, job).read_bytes())
        same, found = part["key"] == part_key(job) and (not records or part["records"] == _stamp(job)), part["result"]
        found = FileResult(**{**found, "puzzles": (), "notes": tuple(found["notes"])})
        if same and not job.repeated:
            part_cells(out, job)
    # None is there, or one that is damaged or of another version: it is made again.
    except (ValueError, KeyError, TypeError, OSError, EOFError, RecursionError):
        return None
    return found if same else None


def drop_part(out: Path, job: Job) -> None:
    """Forget a part before its file is worked on again: were that killed, its cell records would be newer than it."""
    part_path(out, job).unlink(missing_ok=True)
    _cells_path(out, job).unlink(missing_ok=True)


def part_puzzles(out: Path, job: Job) -> list[Puzzle]:
    """Load the puzzles of a part."""
    part = json.loads(part_path(out, job).read_bytes())
    return [Puzzle(**found) for found in part["result"]["puzzles"]]


def part_cells(out: Path, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Load the keys and rows of the cells of a part, see ``FileResult.cells``."""
    keys, rows = np.load(_cells_path(out, job))
    return keys, rows.astype(np.int64)
