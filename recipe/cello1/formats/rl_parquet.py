"""RL data on disk: puzzles in verl's parquet schema, with the rows of ``formats.rl_rows``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.cello1.formats.atomic import replacing, sha256
from recipe.cello1.formats.machine import limited_memory
from recipe.cello1.formats.rl_rows import check_rl_row, puzzle_from_rl_row, rl_row
from recipe.cello1.task.prompt import Layout, Variant
from recipe.cello1.task.puzzle import Puzzle

REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
CHECKED = "CELLO1_CHECKED"  # environment variable: the hashes of files whose rows are all right
_PLAIN = {"Value", "List", "LargeList", "Sequence", "ClassLabel"}  # the features of datasets that are in the rows
_BATCH = 1000  # rows that lie in memory at once


def write_rl_parquet(
    path: str | Path, puzzles: Iterable[Puzzle], split: str, layout: Layout = "system", variant: Variant = "batch"
) -> int:
    """Write puzzles as RL data. The same puzzles give the same bytes."""
    rows = (rl_row(puzzle, split, index, layout, variant) for index, puzzle in enumerate(puzzles))
    batch = list(islice(rows, _BATCH))
    if not batch:
        raise ValueError(f"no puzzles to write to {path}; an RL data set needs at least one")
    schema = pa.Table.from_pylist(batch).schema
    count = 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
            batch = list(islice(rows, _BATCH))
    return count


def iter_parquet(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a parquet file one by one."""
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH)
            while True:
                with limited_memory():  # a small file may say the same long text in every row
                    rows = next((batch.to_pylist() for batch in batches), None)
                if rows is None:
                    return
                yield from rows
    except (pa.ArrowException, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "it takes more memory than is free"
        raise ValueError(f"{path} is not a readable parquet file: {reason}") from None


def n_rows(path: str | Path) -> int:
    """Count the rows of a parquet file, without reading them."""
    return pq.read_metadata(path).num_rows


def check_rl_parquet(path: str | Path) -> None:
    """Check every row of RL data, once: a file that passed is not checked again by this process or one it starts."""
    if Path(path).is_file() and sha256(path) in os.environ.get(CHECKED, "").split():
        return
    for _ in _checked(Path(path)):
        pass
    mark_checked(path)


def mark_checked(path: str | Path) -> None:
    """Remember that a file of RL data need not be checked, since it was, or since it was made of puzzles."""
    os.environ[CHECKED] = f"{os.environ.get(CHECKED, '')} {sha256(path)}".strip()


def _check_features(path: Path) -> None:
    """Refuse columns that datasets, with which verl reads the file, fills from what the rows name: files, addresses."""
    said = (pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        todo = [json.loads(said)]
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its metadata for datasets are not JSON; write it anew") from None
    while todo:
        part = todo.pop()
        if isinstance(part, dict) and isinstance(kind := part.get("_type", "Value"), str) and kind not in _PLAIN:
            raise ValueError(
                f"{path} has a column of the type {kind[:80]}, whose values may be files that rows name; leave it out"
            )
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _checked(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        msg = f"{path} does not exist; make it with `python -m recipe.cello1 prepare`, or correct the path"
        raise FileNotFoundError(msg)
    rows = iter_parquet(path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} has no rows; there is nothing to train on")
    if missing := [name for name in REQUIRED_COLUMNS if name not in first]:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has {list(first)}. "
            "Make it with `python -m recipe.cello1 prepare`"
        )
    _check_features(path)
    for index, row in enumerate(chain([first], rows)):
        try:
            if (row.get("extra_info") or {}).get("question"):
                puzzle_from_rl_row(row, index)
            else:
                check_rl_row(row, index)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        yield row
