"""Puzzles to a data set: split, written, audited, described. Puzzles are loaded source by source, never all at once."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.data.fingerprints import donor_id, fingerprints_of, values_of
from recipe.cello1.data.leaks import Audit, audit
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.data.split import LEFT_OUT, DataPlan, decide_sides
from recipe.cello1.formats.atomic import JsonListWriter, atomic_write, dumps, remove_unfinished, sha256
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.provenance import package_versions
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.task.answer import join_types
from recipe.cello1.task.prompt import render_user
from recipe.cello1.task.puzzle import Puzzle

MANIFEST = "manifest.json"
RL = "rl"  # folder of the files for verl
AUDIT = "leak_audit.json"
_RL_SIDES = ("train", "val", "test")
_PACKAGES = ("cello1", "numpy", "scipy", "numba", "h5py", "anndata", "zarr", "pyarrow")


@dataclass(frozen=True, slots=True)
class Source:
    """Where puzzles come from."""

    # Its name: of the data set in the files for each source, and of the order
    name: str
    # Returns the puzzles, the same each time
    load: Callable[[], Sequence[Puzzle]]
    # The side that the source gives them; empty if it leaves that open
    split: str = ""
    # Whether to write files for this source alone, besides the merged ones
    files: bool = True


@dataclass(frozen=True, slots=True)
class DataSet:
    """What was built."""

    # Puzzles on each side
    counts: Mapping[str, int]
    # What the test side (and the validation side) share with the others, by ``train/test`` and so on
    audits: Mapping[str, Audit]
    # The files written, relative to the output folder, the manifest last
    files: tuple[str, ...]
    # What is worth saying of the split
    notes: tuple[str, ...] = ()


def build(
    sources: Sequence[Source],
    out: str | Path,
    settings: PuzzleSettings,
    plan: DataPlan,
    about: Mapping[str, Any] | None = None,
    more_files: Sequence[str] = (),
) -> DataSet:
    """Write a data set."""
    out = Path(out)
    head = {
        "format": 1,
        # What may decide the bytes.
        "versions": {"python": platform.python_version(), **package_versions(_PACKAGES)},
        "settings": settings.plain(),
        "plan": {name: getattr(plan, name) for name in DataPlan.__slots__},
        **(about or {}),
    }
    unfinished = _Unfinished(out, head)
    try:
        return _build(sources, out, settings, plan, head, more_files, unfinished)
    except Exception as error:
        unfinished.write(str(error))
        raise


class _Unfinished:
    """What the folder holds as long as there is no data set: a manifest that says so, and lists all files to remove."""

    def __init__(self, out: Path, head: Mapping[str, Any]) -> None:
        self._out, self._head = out, head
        self.stale = _written_before(out)
        remove_unfinished(out)

    def write(self, error: str) -> None:
        about = {**self._head, "error": error, "stale_files": sorted(self.stale)}
        atomic_write(self._out / MANIFEST, dumps(about, 1) + "\n")


def _build(
    sources: Sequence[Source],
    out: Path,
    settings: PuzzleSettings,
    plan: DataPlan,
    head: Mapping[str, Any],
    more_files: Sequence[str],
    unfinished: _Unfinished,
) -> DataSet:
    if not sources:
        raise ValueError("none of the files could be used")
    known = [fingerprints_of(source.load(), source.name) for source in sources]
    flat = [puzzle for own in known for puzzle in own]
    if not flat:
        raise ValueError("there are no puzzles; see the notes on each file")
    sides, notes = decide_sides([(source.name, source.split) for source in sources], known, settings, plan)
    files = _json_names(sources, sides, plan)
    unfinished.stale.update(files, (f"{RL}/{side}.parquet" for side in _RL_SIDES), [AUDIT], more_files)
    unfinished.write("the data set is not finished; run the same command again")

    counters: dict[str, dict[str, Counter]] = {}
    _write_json(sources, sides, out, settings, plan, counters)
    bounds = np.cumsum([0, *map(len, known)])
    of_side = {
        name: [puzzle for puzzle, side in zip(flat, np.concatenate(sides), strict=True) if side == name]
        for name in counters
    }
    for side in _RL_SIDES:
        if side in of_side:
            name = f"{RL}/{side}.parquet"
            write_rl_parquet(out / name, _of_side(sources, sides, side), side, plan.layout, settings.variant)
            files.append(name)
    audits = {
        f"{side}/{held_out}": audit(of_side[side], of_side[held_out])
        for held_out in ("test", "val")
        for side in of_side
        if held_out in of_side and side not in ("test", LEFT_OUT) and side != held_out
    }
    about_split = {"split": plan.split, "audits": {name: found.plain() for name, found in audits.items()}}
    atomic_write(out / AUDIT, dumps(about_split, 1) + "\n")
    files += [AUDIT, *more_files]

    counts = {name: len(puzzles) for name, puzzles in of_side.items()}
    manifest = {
        **head,
        "sources": [
            {"name": s.name, "puzzles": int(b - a)} for s, a, b in zip(sources, bounds, bounds[1:], strict=False)
        ],
        "splits": {side: {"puzzles": counts[side], **_plain_counts(found)} for side, found in counters.items()},
        "notes": notes,
        "leaks": {name: found.plain() for name, found in audits.items()},
        "files": {name: sha256(out / name) for name in sorted(files)},
    }
    for name in sorted(unfinished.stale - set(files)):
        (out / name).unlink(missing_ok=True)
    atomic_write(out / MANIFEST, dumps(manifest, 1) + "\n")
    return DataSet(counts, audits, (*sorted(files), MANIFEST), tuple(notes))


# Below the folder: a side's merged and single files, or one of those that are there once. The manifest may be a
# stranger's, so nothing else that it names is removed.
_WRITTEN = re.compile(
    r"leak_audit\.json|left_out\.json|rl/(train|val|test)\.parquet|cells/.+\.json|"
    r"([^/]+)/(.*[_/])?\2(_raw)?(_data)?\.json"
)


def _written_before(out: Path) -> set[str]:
    """Return the files that earlier runs wrote here, finished or not, so that none of them is left behind."""
    try:
        found = json.loads((out / MANIFEST).read_bytes())
        names = [*found.get("files", ()), *found.get("stale_files", ())]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return set()
    top = out.resolve()
    return {
        name
        for name in names
        if isinstance(name, str)
        and _WRITTEN.fullmatch(name)
        and not {"..", ".", ""} & set(name.split("/"))
        and (out / name).parent.resolve().is_relative_to(top)
        and not (out / name).is_dir()
    }


# ---------------------------------------------------------------------------------------------------------- writing


def _of_side(sources: Sequence[Source], sides: Sequence[np.ndarray], wanted: str) -> Iterator[Puzzle]:
    for source, own in zip(sources, sides, strict=True):
        if (own == wanted).any():
            for puzzle, side in zip(source.load(), own.tolist(), strict=True):
                if side == wanted:
                    yield puzzle


def merged_name(side: str) -> str:
    """Return the name of the file with all puzzles of a side."""
    return f"{LEFT_OUT}.json" if side == LEFT_OUT else f"{side}/{side}_data.json"


_RAW_MERGED = "train/train_raw_data.json"


def _sides_of(sides: Sequence[np.ndarray]) -> list[str]:
    return sorted({side for own in sides for side in own.tolist()})


def _own_names(source: Source, names: Sequence[str], plan: DataPlan) -> dict[str, str]:
    """Name the files of one source alone, by side."""
    if not source.files:
        return {}
    wanted = [side for side in names if side in _RL_SIDES] + (["train_raw"] if plan.raw else [])
    return {side: f"{side.removesuffix('_raw')}/{source.name}_{side}.json" for side in wanted}


def _json_names(sources: Sequence[Source], sides: Sequence[np.ndarray], plan: DataPlan) -> list[str]:
    """Name the merged and per-source files."""
    names = _sides_of(sides)
    merged = [merged_name(side) for side in names] + ([_RAW_MERGED] if plan.raw else [])
    return merged + [name for source in sources for name in _own_names(source, names, plan).values()]


def _write_json(
    sources: Sequence[Source],
    sides: Sequence[np.ndarray],
    out: Path,
    settings: PuzzleSettings,
    plan: DataPlan,
    counters: dict[str, dict[str, Counter]],
) -> None:
    """Write the merged and per-source files, and count what is in them."""
    names = _sides_of(sides)
    with ExitStack() as stack:
        merged = {side: stack.enter_context(JsonListWriter(out / merged_name(side))) for side in names}
        if plan.raw:
            merged["raw"] = stack.enter_context(JsonListWriter(out / _RAW_MERGED))
        for source, own in zip(sources, sides, strict=True):
            with ExitStack() as per_file:
                alone = {
                    side: per_file.enter_context(JsonListWriter(out / name))
                    for side, name in _own_names(source, names, plan).items()
                }
                for puzzle, side in zip(source.load(), own.tolist(), strict=True):
                    item = puzzle_to_item(puzzle, settings.variant)
                    merged[side].write(item)
                    if side in alone:
                        alone[side].write(item)
                    if plan.raw and side == "train":
                        raw = raw_item(puzzle, settings)
                        merged["raw"].write(raw)
                        if "train_raw" in alone:
                            alone["train_raw"].write(raw)
                    _count(counters.setdefault(side, {}), puzzle)


def raw_item(puzzle: Puzzle, settings: PuzzleSettings) -> dict[str, Any]:
    """Make the published raw form of a puzzle."""
    donor, batch = str(puzzle.meta.get("donor_id", "")), puzzle.meta.get("batch")
    return {
        "selected_cells": list(puzzle.cell_ids),
        "question": render_user(puzzle, settings.variant),
        "answer": join_types(puzzle.answer or ()),
        "group": str((donor, batch)) if batch else donor,
    }


def _count(counters: dict[str, Counter], puzzle: Puzzle) -> None:
    counters.setdefault("by_n_cells", Counter())[str(puzzle.n_cells)] += 1
    for name in ("tissue", "disease"):
        counters.setdefault(f"by_{name}", Counter()).update(values_of(puzzle.meta.get(name)) or ["not given"])
    donor = donor_id(puzzle.meta.get("donor_id")) or "not given"
    counters.setdefault("by_donor", Counter())[donor] += 1
    counters.setdefault("by_type", Counter()).update(puzzle.answer or ())


def _plain_counts(counters: Mapping[str, Counter]) -> dict[str, dict[str, int]]:
    def order(entry: tuple[str, int]) -> tuple[int, str]:
        return (int(entry[0]) if entry[0].isdecimal() else 0, entry[0])

    return {name: dict(sorted(counter.items(), key=order)) for name, counter in counters.items()}
