"""Make train and test sets of puzzles from expression files or published puzzles.

``python -m recipe.cello1 prepare INPUT --out DIR`` reads every .h5ad file and .zarr store below the folder INPUT
and writes

- ``train/train_data.json``, ``test/test_data.json``: puzzles in the CellPuzzles form; beside them a file for each input
- ``rl/train.parquet``, ``rl/test.parquet``: the same for verl
- ``leak_audit.json``: what train and test share
- ``manifest.json``, last: versions, settings, counts, notes, what became of each file, hashes

The same seed gives the same bytes, whatever the number of workers. Started again with the same DIR, a run goes on where
it was stopped. Exit code 1: something could not be used (it is listed, with a remedy; --skip-bad makes it 0), or
train and test share something and --fail-on-leak is given.

Values are taken for counts or log-normalised expression; scaled or CLR values without a sign cannot be told from these.
A file with the content of another, cells that another data set (is_primary_data) or an input before has, pooled donors
and names that are no gene symbols are left out, with a note; the tissue of a cell culture, which names its type, stays
out of the context.

``python -m recipe.cello1 prepare --from-hub ncbi/CellPuzzles --out DIR`` does it for a published data set, and
``prepare train.json test.json --out DIR`` for local files in that form (JSON, JSONL, parquet).

``python -m recipe.cello1 prepare audit TRAIN TEST`` says what any two files share.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipe.cello1.data.build import MANIFEST, RL, DataSet, Source, build
from recipe.cello1.data.copies import repeated_cells, same_content, without_repeated_puzzles
from recipe.cello1.data.expression.store import SUFFIXES as EXPRESSION_SUFFIXES
from recipe.cello1.data.extract import FileResult, Job
from recipe.cello1.data.options import (
    RECORDS,
    check,
    check_for_puzzles,
    make_parser,
    plan_of,
    settings_of,
)
from recipe.cello1.data.published import OWN_FILES, Imported, read_hub, read_puzzle_file, split_in_name
from recipe.cello1.data.resume import FOLDER, REST, drop_part, load_part, part_puzzles, save_part
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.data.workers import cpu_count, default_workers, run_jobs
from recipe.cello1.formats.atomic import check_place, held
from recipe.cello1.formats.puzzle_files import PUZZLE_SUFFIXES
from recipe.cello1.task.prompt import Variant
from recipe.cello1.task.text import in_options

_PACKED = ("gz", "bz2", "xz", "zst", "zip")
# What users of such files have beside them, and what to do.
_UNREAD = {
    **{f"{kind}.{packed}": "unpack it" for kind in (".h5ad", ".json", ".jsonl", ".parquet") for packed in _PACKED},
    **{f".zarr.{packed}": "unpack it" for packed in ("zip", "tar", "tar.gz", "tgz")},
    ".h5mu": "write one of its modalities as h5ad: mudata['NAME'].write('NAME.h5ad')",
    **{kind: "convert it to h5ad" for kind in (".loom", ".h5seurat", ".h5", ".hdf5", ".rds", ".rdata")},
    **{
        f".h5ad.{part}": "fetch it again, it is half there"
        for part in ("part", "crdownload", "download", "aria2", "tmp")
    },
    ".ndjson": "rename it to .jsonl",
}
_LONGEST_NAME = 200  # bytes: what is written has up to 255, with a side and, while it is written, more
_SHOWN = 20  # items that cannot be read are printed up to this number


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    return make_parser(__doc__ or "")


AFTER_INTERRUPT = "; files that were read are kept: run the same command again to resume"


# ------------------------------------------------------------------------------------------------------------- work


def run(args: argparse.Namespace) -> str | None:
    """Run the command."""
    check(args)
    settings = settings_of(args)
    check_place(args.out / MANIFEST)
    with held(args.out / MANIFEST, "out"):
        _check_links(args.out, (FOLDER, REST, RECORDS, RL, "test", "train", *(["val"] if args.val_size else [])))
        return _run(args, settings)


def _check_links(out: Path, names: Sequence[str]) -> None:
    """Refuse links that lead out of what is written to: files of the same names there are not ours to replace."""
    todo = [out / name for name in names]
    while todo:
        place = todo.pop()
        if place.is_symlink() and not place.resolve().is_relative_to(out.resolve()) and place.is_dir():
            raise ValueError(f"out: {place} is a link to {place.resolve()}, where nothing is overwritten; remove it")
        if place.is_dir() and not place.is_symlink():
            todo += [Path(entry.path) for entry in os.scandir(place) if entry.is_dir()]


def _run(args: argparse.Namespace, settings: PuzzleSettings) -> str | None:
    bad: list[FileResult] = []
    if args.from_hub:
        check_for_puzzles(args, build_parser())
        read = read_hub(args.from_hub, settings.variant)
    else:
        inputs = _find_inputs(args.inputs)
        if inputs.expression:
            return _prepare_expression(args, settings, inputs)
        check_for_puzzles(args, build_parser())
        read, bad = [_read_if_possible(path, settings.variant) for path in inputs.puzzles], inputs.bad
    if not args.keep_duplicates:
        read, notes = without_repeated_puzzles(read)
        for note in notes:
            _say(f"note  {note}")
    sources, failures = _imported(read)
    failures += [f"{result.name}: {result.reason}; {result.remedy}" for result in bad]
    given = args.from_hub or {"train", "test"} <= {source.split for source in sources}
    split = args.split or ("given" if given else "donor")
    about = {"from_hub": args.from_hub} if args.from_hub else {}
    for failure in failures[:_SHOWN]:
        _say(f"bad   {failure}")
    if len(failures) > _SHOWN:
        _say(f"bad   and {len(failures) - _SHOWN:,} more")
    found = build(sources, args.out, settings, plan_of(args, split), {**about, "failures": failures})
    return _finish(args, found, bool(failures))


def _read_if_possible(path: Path, variant: Variant) -> Imported:
    """Read a file of puzzles; one that cannot be read has none, and says why."""
    try:
        return read_puzzle_file(path, variant)
    except (ValueError, OSError) as error:
        failure = f"{path.name}: it cannot be used ({error}); write it again, or leave it out"
        return Imported(path.name, split_in_name(path.name), (), (failure,))


def _imported(found: Sequence[Imported]) -> tuple[list[Source], list[str]]:
    failures = [text for part in found for text in part.failures]
    sources = [Source(part.name, partial(_same, part.puzzles), part.split, files=False) for part in found]
    return sources, failures


def _same(value: Any) -> Any:
    return value


def _prepare_expression(args: argparse.Namespace, settings: PuzzleSettings, inputs: _Found) -> str | None:
    if args.split == "given":
        msg = "split='given' is for puzzle files whose names say train and test; choose another for expression files"
        raise ValueError(msg)
    files = _usable_files(inputs)
    # Neither negative nor NaN, scaled or CLR values without centring would look like expression.
    print("note  values are taken for expression (counts or log-normalised): 0 is absent, more is more expressed")
    workers = args.workers or default_workers(len(files))
    # The machines of a cluster may have fewer processors than this one, and then a task would wait for ever.
    threads = args.threads or (1 if args.ray_address else max(1, cpu_count() // workers))
    jobs = [_job(path, name, settings, threads, args) for path, name in files]
    # Records that do not hold are written below, when it is known which cells they have.
    results = _process(jobs, args, workers, records=settings.keep_duplicates)
    if not settings.keep_duplicates:
        jobs, results = _without_repeats(jobs, results, args, workers)
    good = [result for result in results if not result.reason and not result.copy_of]
    sources = [
        Source(job.name, partial(part_puzzles, args.out, job))
        for job, result in zip(jobs, results, strict=True)
        if not result.reason and not result.copy_of
    ]
    results = [*results, *inputs.bad]
    _report_files(results)
    about = {"inputs": [_about(result) for result in results]}
    records = [f"{RECORDS}/{result.name}.json" for result in good if args.raw and result.n_records]
    found = build(sources, args.out, settings, plan_of(args, args.split or "donor"), about, records)
    return _finish(args, found, any(result.reason for result in results))


def _job(path: Path, name: str, settings: PuzzleSettings, threads: int, args: argparse.Namespace) -> Job:
    # Whole paths, since the processes of a cluster have working directories of their own; but not resolved: a link lies
    # in the folder that the user put it in.
    whole = os.path.abspath(path)
    records = os.path.abspath(args.out / RECORDS / f"{name}.json") if args.raw else None
    return Job(whole, name, os.path.basename(os.path.dirname(whole)), settings, threads, records)


def _process(jobs: Sequence[Job], args: argparse.Namespace, workers: int, *, records: bool = True) -> list[FileResult]:
    """Work on the files that are not done yet; returns the results in the order of the jobs."""
    results: dict[str, FileResult] = {}
    if not args.fresh:
        loaded = ((job.name, load_part(args.out, job, records=records)) for job in jobs)
        results = {name: found for name, found in loaded if found is not None}
    left = [job for job in jobs if job.name not in results]
    for job in left:
        drop_part(args.out, job)
    if results:
        print(f"{len(results)} of {len(jobs)} files were done before", file=sys.stderr)
    for job, result in run_jobs(
        left,
        workers=workers,
        ray_address=args.ray_address if left else None,
        progress=not args.quiet,
        done=len(results),
    ):
        results[job.name] = save_part(args.out, job, result)
    return [results[job.name] for job in jobs]


def _without_repeats(
    jobs: Sequence[Job], results: Sequence[FileResult], args: argparse.Namespace, workers: int
) -> tuple[list[Job], list[FileResult]]:
    """Do files again that have cells of another one, without these, and take those without others for copies."""
    good = [job for job, result in zip(jobs, results, strict=True) if not result.reason]
    again, copies, notes = repeated_cells(args.out, good, progress=not args.quiet)
    of = {job.name: job for job in (*jobs, *again)}
    settled = {job.name for job in again} | {copy.name for copy in copies}
    again += [job for job in good if job.records and job.name not in settled and load_part(args.out, job) is None]
    found = {result.name: result for result in (*results, *_process(again, args, workers), *copies)}
    for name, more in notes.items():
        found[name] = replace(found[name], notes=(*found[name].notes, *more))
    for copy in copies:
        if (records := of[copy.name].records) is not None:
            Path(records).unlink(missing_ok=True)
    return [of[job.name] for job in jobs], [found[job.name] for job in jobs]


def _about(result: FileResult) -> dict[str, Any]:
    if result.copy_of:
        notes = {"notes": list(result.notes)} if result.notes else {}
        return {"name": result.name, "status": "copy", "copy_of": result.copy_of, **notes}
    about: dict[str, Any] = {"name": result.name, "status": "bad" if result.reason else "used", **result.fingerprint}
    if result.reason:
        return {**about, "reason": result.reason, "remedy": result.remedy}
    counts = {"cells": result.n_cells, "cells_drawn_from": result.n_pool, "cell_records": result.n_records}
    return {**about, **counts, "notes": list(result.notes)}


@dataclass(frozen=True, slots=True)
class _Found:
    """What lies below the inputs."""

    # Expression files with their names, and puzzle files
    expression: list[tuple[Path, str]] = field(default_factory=list)
    puzzles: list[Path] = field(default_factory=list)
    # What is there and cannot be used
    bad: list[FileResult] = field(default_factory=list)

    def look_into(self, folder: Path) -> None:
        """Find the expression files below a folder, in the order of their names, or the puzzle files in it."""
        expression: list[tuple[Path, str]] = []
        puzzles = _Found()
        todo, seen = [folder], set()
        while todo:
            inside = todo.pop(0)
            if inside.resolve() in seen:
                continue
            seen.add(inside.resolve())
            name = inside.relative_to(folder).as_posix()
            try:
                entries = [(path, path.is_dir()) for path in sorted(inside.iterdir()) if not path.name.startswith(".")]
            except OSError as error:
                self.add_bad(name, f"the folder cannot be read ({error})", "grant yourself permission to read it")
                continue
            for path, is_folder in entries:
                name = path.relative_to(folder).as_posix()
                if _is_expression(path):
                    if path.resolve() not in seen:
                        seen.add(path.resolve())
                        expression.append((path, path.relative_to(folder).with_suffix("").as_posix()))
                elif kind := next((kind for kind in _UNREAD if name.lower().endswith(kind)), ""):
                    of_puzzles = kind.startswith((*PUZZLE_SUFFIXES, ".ndjson"))
                    if not of_puzzles or inside == folder:
                        (puzzles if of_puzzles else self).add_bad(name, f"{kind} is not read", _UNREAD[kind])
                elif is_folder:
                    todo.append(path)
                elif inside == folder and path.suffix.lower() in PUZZLE_SUFFIXES and path.name not in OWN_FILES:
                    puzzles.puzzles.append(path)
        self.expression.extend(sorted(expression, key=lambda entry: entry[1]))
        if not expression:
            self.puzzles.extend(puzzles.puzzles)
            self.bad.extend(puzzles.bad)

    def add_bad(self, name: str, reason: str, remedy: str) -> None:
        """List something as bad."""
        shown = name.encode(errors="backslashreplace").decode()
        self.bad.append(FileResult(shown, reason=reason, remedy=remedy))


def _find_inputs(inputs: Sequence[str]) -> _Found:
    """Find what the inputs are: expression files or puzzle files."""
    found = _Found()
    for text in inputs:
        path = Path(text)
        if _is_expression(path) and path.exists():
            found.expression.append((path, path.stem))
        elif path.suffix.lower() in PUZZLE_SUFFIXES and path.is_file():
            found.puzzles.append(path)
        elif path.is_dir():
            found.look_into(path)
        else:
            kinds = " ".join((*EXPRESSION_SUFFIXES, *PUZZLE_SUFFIXES))
            hint = next((f"; {remedy}" for kind, remedy in _UNREAD.items() if text.lower().endswith(kind)), "")
            msg = f"INPUT {text} does not exist, or is none of {kinds}; give such files, or a folder of them{hint}"
            raise FileNotFoundError(msg)
    if not found.expression and not found.puzzles:
        shown = "".join(f"; {result.name}: {result.reason}, {result.remedy}" for result in found.bad[:3])
        msg = f"INPUT {' '.join(inputs)}: no .h5ad files, .zarr stores or puzzle files are there{shown}"
        raise FileNotFoundError(msg)
    if found.expression and found.puzzles:
        raise ValueError(f"INPUT has both expression files ({found.expression[0][0]}) and puzzle files; give one kind")
    return found


def _usable_files(found: _Found) -> list[tuple[Path, str]]:
    """Keep the first file of each name and of each content, the others are listed; so are names that are no use."""
    first: dict[str, Path] = {}
    of_size: dict[int, list[tuple[str, Path]]] = {}
    for path, name in found.expression:
        if name.encode(errors="replace").decode() != name:
            found.add_bad(name, "its name, or that of a folder it lies in, is not UTF-8", "rename it")
        elif len(Path(name).name.encode()) > _LONGEST_NAME:
            found.add_bad(
                name, f"its name has more than {_LONGEST_NAME} bytes, which leaves no room for a suffix", "rename it"
            )
        elif (other := first.setdefault(name, path)) is not path:
            if same_content(path, other):
                found.bad.append(FileResult(name + path.suffix, copy_of=name))
                continue
            reason = f"{other} and {path} would both be called {name!r}, and the first is used"
            found.add_bad(name + path.suffix, reason, "rename one of them, or leave it out")
        else:
            size = path.stat().st_size if path.is_file() else -1
            others = of_size.setdefault(size, [])
            if same := next((known for known, kept in others if same_content(path, kept)), ""):
                found.bad.append(FileResult(name, copy_of=same))
                del first[name]
            else:
                others.append((name, path))
    return [(path, name) for name, path in first.items()]


def _is_expression(path: Path) -> bool:
    return path.suffix.lower() in EXPRESSION_SUFFIXES


# ---------------------------------------------------------------------------------------------------------- summary


def _say(line: str) -> None:
    print(in_options(line, build_parser()))


def _report_files(results: Sequence[FileResult]) -> None:
    for result in results:
        for note in result.notes:
            _say(f"note  {result.name}: {note}")
        if result.copy_of and not result.notes:
            _say(f"note  {result.name}: same content as {result.copy_of}, so it is used once")
    for result in results:
        if result.reason:
            _say(f"bad   {result.name}: {result.reason}; {result.remedy}")
    n_bad, n_copies = sum(bool(result.reason) for result in results), sum(bool(r.copy_of) for r in results)
    copies = f", {n_copies} copies" if n_copies else ""
    print(f"{len(results)} files: {len(results) - n_bad - n_copies} used, {n_bad} bad{copies}")


def _finish(args: argparse.Namespace, found: DataSet, any_bad: bool) -> str | None:
    """Say what was made; returns what stands in the way of success."""
    for note in found.notes:
        _say(f"note  {note}")
    for name, result in found.audits.items():
        print(f"\nleak audit {name}")
        print("\n".join(result.lines()))
    counts = ", ".join(f"{count:,} {side}" for side, count in found.counts.items())
    print(f"\npuzzles: {counts}: {args.out}")
    problems = []
    if args.fail_on_leak and not found.audits:
        problems.append("fail_on_leak=True needs a train and a test side to compare; add a test side")
    if args.fail_on_leak and any(result.leaks for result in found.audits.values()):
        problems.append("train and test share something (see above, fail_on_leak=True); choose another split=")
    if any_bad and not args.skip_bad:
        problems.append("some input could not be used (see above); pass skip_bad=True to accept that")
    return "; ".join(problems) or None
