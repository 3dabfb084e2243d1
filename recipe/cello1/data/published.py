"""Puzzles that others made: from the Hub, or local JSON, JSONL and parquet in the CellPuzzles schema."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.cello1.formats.items import item_to_puzzle
from recipe.cello1.formats.puzzle_files import is_rl_row, iter_rows, puzzle_of, without_gaps
from recipe.cello1.task.prompt import VARIANTS, Variant
from recipe.cello1.task.puzzle import Puzzle

OWN_FILES = ("manifest.json", "leak_audit.json", "left_out.json")
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "reasoning": "reasoning",
}
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Imported:
    """Puzzles read from one place."""

    # The file, or the split of the Hub data set
    name: str
    # The split that its name speaks of; empty if it does not
    split: str
    # Those that could be read
    puzzles: tuple[Puzzle, ...]
    # What is wrong with the others, one line each
    failures: tuple[str, ...] = ()


def split_in_name(name: str) -> str:
    """Find the split that a file name speaks of, as the Hub does."""
    found = {SPLITS[word] for word in _WORD.findall(Path(name).stem.lower()) if word in SPLITS}
    if "reasoning" in found:
        return "reasoning"
    return found.pop() if len(found) == 1 else ""


def read_puzzle_file(path: str | Path, variant: Variant | None = "batch") -> Imported:
    """Read a file of puzzles."""
    path = Path(path)
    puzzles, failures = _convert(iter_rows(path, keep_going=True), variant)
    failures = [f"{path.name}: {text.removeprefix(f'{path}, ')}" for text in failures]
    return Imported(path.name, split_in_name(path.name), puzzles, tuple(failures))


def _convert(items: Iterable[Any], variant: Variant | None) -> tuple[tuple[Puzzle, ...], list[str]]:
    puzzles, failures = [], []
    for index, item in enumerate(items):
        if isinstance(item, ValueError):  # it could not be read
            failures.append(str(item))
            continue
        if variant is None and not is_rl_row(item):
            variant = _variant_of(item)
        try:
            puzzles.append(puzzle_of(item, index, variant))
        except ValueError as error:
            failures.append(str(error))
    return tuple(puzzles), failures


def _variant_of(item: Any) -> Variant | None:
    """Find the variant an item is written in, by trying."""
    for name in VARIANTS:
        try:
            item_to_puzzle(item, 0, name)
        except ValueError:
            continue
        return name
    return None


def read_hub(name: str, variant: Variant = "batch") -> list[Imported]:
    """Read all splits of a data set from the Hub."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    # Offline, no such data set, files of another kind or damaged ones.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"from_hub={name}: the data set cannot be loaded ({first}); check id and connection, or fetch its files "
            "elsewhere and give their folder instead"
        ) from error
    result = []
    for split, rows in found.items():
        puzzles, failures = _convert(map(without_gaps, rows), variant)
        label = split_in_name(split) or str(split)
        result.append(Imported(str(split), label, puzzles, tuple(f"{name}, {split}: {text}" for text in failures)))
    return result
