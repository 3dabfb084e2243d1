"""Files of puzzles: JSON, JSONL or parquet, of puzzle items or of RL rows; what is written are JSON items."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import iter_items, write_items
from recipe.cello1.formats.items import ITEM_KEYS, item_to_puzzle, puzzle_to_item, question_of
from recipe.cello1.formats.rl_rows import puzzle_from_rl_row
from recipe.cello1.task.prompt import Layout, Variant, find_variant
from recipe.cello1.task.puzzle import Puzzle

PUZZLE_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class PuzzleFile:
    """What a file holds.

    Attributes
    ----------
    puzzles
        The puzzles.
    variant, layout
        Task variant and prompt layout: those written in the rows, else those asked for, else ``batch`` and ``system``.
    """

    puzzles: list[Puzzle]
    variant: Variant
    layout: Layout


def iter_rows(path: str | Path, *, keep_going: bool = False) -> Iterator[Any]:
    """Read the items or rows of a file one by one, unchecked.

    Parameters
    ----------
    path
        A ``.json`` list, ``.jsonl``, or ``.parquet``.
    keep_going
        Whether an entry that cannot be read is no end, unless all are so: its error, a :class:`ValueError`, comes
        in its place.

    Yields
    ------
    Each entry, at least one.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read, has another suffix, or holds nothing.
    """
    path = Path(path)
    if path.suffix.lower() not in PUZZLE_SUFFIXES:
        raise ValueError(f"{path} must end in .json, .jsonl or .parquet")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of puzzle items or RL data")
    if path.suffix.lower() == ".parquet":
        from recipe.cello1.formats.rl_parquet import iter_parquet

        rows: Iterator[Any] = map(without_gaps, iter_parquet(path))
    else:
        items = iter_items(path, keep_going=keep_going)
        rows = (without_gaps(row, ITEM_KEYS) if isinstance(row, Mapping) else row for row in items)
    row, any_read = None, False
    for row in rows:
        any_read |= not isinstance(row, ValueError)
        yield row
    if not any_read:
        raise row or ValueError(f"{path} holds no items")


def without_gaps(row: Mapping[str, Any], keys: Collection[str] | None = None) -> dict[str, Any]:
    """Leave out what a row lacks: tables have a column for every key of any row, and ``None`` there.

    Parameters
    ----------
    row
        A row of a table.
    keys
        The keys whose ``None`` says that there is nothing; by default all.

    Returns
    -------
    What it has.
    """
    return {key: value for key, value in row.items() if value is not None or (keys is not None and key not in keys)}


def is_rl_row(row: Any) -> bool:
    """Tell RL rows from puzzle items.

    Parameters
    ----------
    row
        An entry of a file.

    Returns
    -------
    Whether it is an RL row.
    """
    return isinstance(row, Mapping) and ("reward_model" in row or "data_source" in row)


def puzzle_of(row: Any, index: int = 0, variant: Variant | None = None, *, require_gold: bool = True) -> Puzzle:
    """Make the puzzle of an item or RL row.

    Parameters
    ----------
    row
        The item or row.
    index
        Its position, for messages.
    variant
        Task variant; by default the one written in an RL row, else ``"batch"``.
    require_gold
        Whether an item without gold is an error; RL rows always have it.

    Returns
    -------
    The puzzle.

    Raises
    ------
    ValueError
        If it is unusable.
    """
    if is_rl_row(row):
        return puzzle_from_rl_row(row, index, variant)
    return item_to_puzzle(row, index, variant or "batch", require_gold=require_gold)


def load_puzzles(
    path: str | Path,
    variant: Variant | None = None,
    layout: Layout | None = None,
    *,
    require_gold: bool = False,
    keep: Callable[[Puzzle], Any] = lambda puzzle: puzzle,
) -> PuzzleFile:
    """Read puzzles, with or without gold, and how they are to be asked.

    Parameters
    ----------
    path
        As for :func:`iter_rows`.
    variant, layout
        Task variant and prompt layout, if decided elsewhere. Without a variant, rows say it, or the first question.
    require_gold
        As for :func:`puzzle_of`.
    keep
        What to keep of each puzzle, where not all of it is needed.

    Returns
    -------
    Puzzles, variant and layout.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If anything in it is unusable, its rows disagree, or they contradict ``variant`` or ``layout``.
    """
    said: dict[str, dict[Any, int]] = {"variant": {}, "prompt_layout": {}}
    puzzles: list[Puzzle] = []
    try:
        for index, row in enumerate(iter_rows(path)):
            extra = row.get("extra_info") if is_rl_row(row) else None
            for key, values in said.items():
                if isinstance(extra, Mapping) and (value := extra.get(key)):
                    values.setdefault(value, index)
            own: Variant | None = next(iter(said["variant"]), variant)
            if own is None and isinstance(row, Mapping) and not is_rl_row(row):
                own = variant = find_variant(question_of(row))
            puzzles.append(keep(puzzle_of(row, index, own, require_gold=require_gold)))
        found: dict[str, Any] = {"variant": variant, "prompt_layout": layout}
        found = {key: _agreed(key, values, found[key]) for key, values in said.items()}
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    return PuzzleFile(puzzles, found["variant"] or "batch", found["prompt_layout"] or "system")


def _agreed(key: str, first: Mapping[Any, int], asked: Any) -> Any:
    """Return what the rows say (value -> the first row that says it), or ``asked`` where they are silent."""
    if len(first) > 1:
        said = " and ".join(f"{value!r} (row {index})" for value, index in first.items())
        raise ValueError(f"column 'extra_info': its rows have {key} {said}; split them into a file each")
    if asked and first and asked not in first:
        msg = f"its rows have {key} {next(iter(first))!r}, and {asked!r} is asked for; ask for what they have"
        raise ValueError(msg)
    return next(iter(first), asked)


def write_puzzles(path: str | Path, puzzles: Iterable[Puzzle], variant: Variant = "batch") -> None:
    """Write puzzles as a ``.json`` list or ``.jsonl``, atomically.

    Parameters
    ----------
    path
        Target file.
    puzzles
        What to write.
    variant
        Task variant.

    Raises
    ------
    ValueError
        If the suffix is neither, or a puzzle cannot be written.
    """
    write_items(path, [puzzle_to_item(puzzle, variant) for puzzle in puzzles])
