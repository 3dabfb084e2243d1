"""What is known of each file already: its puzzles, saved when the file is done, so that a run can be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from recipe.cello1.data.extract import FileResult, Job
from recipe.cello1.formats.atomic import atomic_write, dumps
from recipe.cello1.formats.provenance import digest
from recipe.cello1.task.puzzle import Puzzle

FOLDER = ".parts"
_FORMAT = 4  # raise it when the same settings give other puzzles


def part_path(out: Path, name: str) -> Path:
    """Return where the part of a file lies."""
    return out / FOLDER / f"{name}.json"


def part_key(job: Job) -> str:
    """Hash what a part depends on: the file, as far as its size and date tell, and the settings."""
    path = Path(job.path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    known = [_FORMAT, job.name, job.folder, job.settings.plain(), stamps, bool(job.records)]
    return digest(known)


def save_part(out: Path, job: Job, result: FileResult) -> FileResult:
    """Save the result of a file that could be used."""
    if not result.reason:
        puzzles = [asdict(puzzle) for puzzle in result.puzzles]
        head = asdict(replace(result, puzzles=()))
        part = {"key": part_key(job), "result": {**head, "puzzles": puzzles}}
        atomic_write(part_path(out, job.name), dumps(part))
    return replace(result, puzzles=())


def load_part(out: Path, job: Job) -> FileResult | None:
    """Load the result of a file, if it is there and still holds."""
    path = part_path(out, job.name)
    if not path.is_file() or (job.records and not Path(job.records).is_file()):
        return None
    try:
        part = json.loads(path.read_bytes())
        same, found = part["key"] == part_key(job), part["result"]
        found = FileResult(**{**found, "puzzles": (), "notes": tuple(found["notes"])})
    except (ValueError, KeyError, TypeError, OSError, RecursionError):  # of another version: it is made again
        return None
    return found if same else None


def drop_part(out: Path, name: str) -> None:
    """Forget a part before its file is worked on again: were that killed, its cell records would be newer than it."""
    part_path(out, name).unlink(missing_ok=True)


def part_puzzles(out: Path, name: str) -> list[Puzzle]:
    """Load the puzzles of a part."""
    part = json.loads(part_path(out, name).read_bytes())
    return [Puzzle(**found) for found in part["result"]["puzzles"]]
