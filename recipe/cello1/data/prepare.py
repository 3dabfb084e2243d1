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

``python -m recipe.cello1 prepare --from-hub ncbi/CellPuzzles --out DIR`` does it for a published data set, and
``prepare_data train.json test.json --out DIR`` for local files in that form (JSON, JSONL, parquet).

``python -m recipe.cello1 prepare audit TRAIN TEST`` says what any two files share.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipe.cello1.data.build import DataSet, Source, build
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
from recipe.cello1.data.resume import drop_part, load_part, part_puzzles, save_part
from recipe.cello1.data.settings import Settings
from recipe.cello1.data.workers import cpu_count, default_workers, run_jobs
from recipe.cello1.formats.puzzle_files import SUFFIXES as PUZZLE_SUFFIXES
from recipe.cello1.task.prompt import Variant

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
    if args.from_hub:
        check_for_puzzles(args, build_parser())
        sources, failures = _imported(read_hub(args.from_hub, settings.variant))
        default_split, about = "given", {"from_hub": args.from_hub}
    else:
        expression, puzzles = _find_inputs(args.inputs)
        if expression:
            return _prepare_expression(args, settings, expression)
        check_for_puzzles(args, build_parser())
        sources, failures = _imported([_read_if_possible(path, settings.variant) for path in puzzles])
        named = {source.split for source in sources}
        default_split, about = "given" if {"train", "test"} <= named else "donor", {}
    split = args.split or default_split
    for failure in failures[:_SHOWN]:
        print(f"bad   {failure}")
    if len(failures) > _SHOWN:
        print(f"bad   and {len(failures) - _SHOWN:,} more")
    found = build(sources, args.out, settings, plan_of(args, split), {**about, "failures": failures})
    return _finish(args, found, bool(failures))


def _read_if_possible(path: Path, variant: Variant) -> Imported:
    """Read a file of puzzles; one that cannot be read has none, and says why."""
    try:
        return read_puzzle_file(path, variant)
    except (ValueError, OSError) as error:
        failure = f"{path.name}: it cannot be used ({error}); write it anew, or leave it out"
        return Imported(path.name, split_in_name(path.name), (), (failure,))


def _imported(found: Sequence[Imported]) -> tuple[list[Source], list[str]]:
    failures = [text for part in found for text in part.failures]
    sources = [Source(part.name, partial(_same, part.puzzles), part.split, files=False) for part in found]
    return sources, failures


def _same(value: Any) -> Any:
    return value


def _prepare_expression(args: argparse.Namespace, settings: Settings, files: Sequence[tuple[Path, str]]) -> str | None:
    if args.split == "given":
        msg = "--split given is for puzzle files whose names say train and test; choose another for expression files"
        raise ValueError(msg)
    files, badly_named = _with_good_names(files)
    workers = args.workers or default_workers(len(files))
    # The machines of a cluster may have fewer processors than this one, and then a task would wait for ever.
    threads = args.threads or (1 if args.ray_address else max(1, cpu_count() // workers))
    jobs = [_job(path, name, settings, threads, args) for path, name in files]
    results = [*_process(jobs, args, workers), *badly_named]
    bad = [result for result in results if result.reason]
    good = [result for result in results if not result.reason]
    _report_files(results)
    sources = [Source(result.name, partial(part_puzzles, args.out, result.name)) for result in good]
    about = {"inputs": [_about(result) for result in results]}
    records = [f"{RECORDS}/{result.name}.json" for result in good if args.raw and result.n_records]
    found = build(sources, args.out, settings, plan_of(args, args.split or "donor"), about, records)
    return _finish(args, found, bool(bad))


def _job(path: Path, name: str, settings: Settings, threads: int, args: argparse.Namespace) -> Job:
    # Whole paths, since the processes of a cluster have working directories of their own; but not resolved: a link lies
    # in the folder that the user put it in.
    whole = os.path.abspath(path)
    records = os.path.abspath(args.out / RECORDS / f"{name}.json") if args.raw else None
    return Job(whole, name, os.path.basename(os.path.dirname(whole)), settings, threads, records)


def _process(jobs: Sequence[Job], args: argparse.Namespace, workers: int) -> list[FileResult]:
    """Work on the files that are not done yet; returns the results in the order of the jobs."""
    results: dict[str, FileResult] = {}
    if not args.fresh:
        results = {job.name: found for job in jobs if (found := load_part(args.out, job)) is not None}
    left = [job for job in jobs if job.name not in results]
    for job in left:
        drop_part(args.out, job.name)
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


def _about(result: FileResult) -> dict[str, Any]:
    about: dict[str, Any] = {"name": result.name, "status": "bad" if result.reason else "used", **result.fingerprint}
    if result.reason:
        return {**about, "reason": result.reason, "remedy": result.remedy}
    counts = {"cells": result.n_cells, "cells_drawn_from": result.n_pool, "cell_records": result.n_records}
    return {**about, **counts, "notes": list(result.notes)}


def _find_inputs(inputs: Sequence[str]) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Find what the inputs are: expression files with their names, or puzzle files."""
    expression: list[tuple[Path, str]] = []
    puzzles: list[Path] = []
    for text in inputs:
        path = Path(text)
        if _is_expression(path) and path.exists():
            expression.append((path, path.stem))
        elif path.suffix in PUZZLE_SUFFIXES and path.is_file():
            puzzles.append(path)
        elif path.is_dir():
            inside = _walk(path)
            expression += inside
            if not inside:
                puzzles += sorted(
                    file for file in path.iterdir() if file.suffix in PUZZLE_SUFFIXES and file.name not in OWN_FILES
                )
        else:
            known = " ".join((*EXPRESSION_SUFFIXES, *PUZZLE_SUFFIXES))
            msg = f"INPUT {text} does not exist, or is none of {known}; give a file of these kinds or a folder of them"
            raise FileNotFoundError(msg)
    if not expression and not puzzles:
        msg = f"INPUT {' '.join(inputs)}: no .h5ad files, .zarr stores or puzzle files are there"
        raise FileNotFoundError(msg)
    if expression and puzzles:
        msg = f"INPUT has expression files ({expression[0][0]}) and puzzle files ({puzzles[0]}); give one kind"
        raise ValueError(msg)
    return expression, puzzles


def _with_good_names(files: Sequence[tuple[Path, str]]) -> tuple[list[tuple[Path, str]], list[FileResult]]:
    """Keep the first file of each name; the others are bad, and so are names that cannot be written."""
    first: dict[str, Path] = {}
    bad = []
    for path, name in files:
        shown = name.encode(errors="backslashreplace").decode()
        if shown != name:
            reason = "its name, or that of a folder it lies in, is not UTF-8"
            bad.append(FileResult(shown, reason=reason, remedy="rename it"))
        elif (other := first.setdefault(name, path)) is not path:
            reason = f"{other} and {path} would both be called {name!r}, and the first is taken"
            bad.append(FileResult(name + path.suffix, reason=reason, remedy="rename one of them, or leave it out"))
    return [(path, name) for name, path in first.items()], bad


def _walk(folder: Path) -> list[tuple[Path, str]]:
    """Find the expression files below a folder, in the order of their names; a .zarr folder is one of them."""
    found = []
    todo = [folder]
    seen = set()
    while todo:
        inside = todo.pop(0)
        if inside.resolve() in seen:
            continue
        seen.add(inside.resolve())
        for path in sorted(inside.iterdir()):
            if path.name.startswith("."):
                continue
            if _is_expression(path):
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    found.append((path, path.relative_to(folder).with_suffix("").as_posix()))
            elif path.is_dir():
                todo.append(path)
    return sorted(found, key=lambda entry: entry[1])


def _is_expression(path: Path) -> bool:
    return path.suffix.lower() in EXPRESSION_SUFFIXES


# ---------------------------------------------------------------------------------------------------------- summary


def _report_files(results: Sequence[FileResult]) -> None:
    for result in results:
        for note in result.notes:
            print(f"note  {result.name}: {note}")
    for result in results:
        if result.reason:
            print(f"bad   {result.name}: {result.reason}; {result.remedy}")
    n_bad = sum(bool(result.reason) for result in results)
    print(f"{len(results)} files: {len(results) - n_bad} used, {n_bad} bad")


def _finish(args: argparse.Namespace, found: DataSet, any_bad: bool) -> str | None:
    """Say what was made; returns what stands in the way of success."""
    for note in found.notes:
        print(f"note  {note}")
    for name, result in found.audits.items():
        print(f"\nleak audit {name}")
        print("\n".join(result.lines()))
    counts = ", ".join(f"{count:,} {side}" for side, count in found.counts.items())
    print(f"\npuzzles: {counts}: {args.out}")
    problems = []
    if args.fail_on_leak and not found.audits:
        problems.append("--fail-on-leak: there are no two sides to compare; give a test side, too")
    if args.fail_on_leak and any(result.leaks for result in found.audits.values()):
        problems.append("two sides share something, see above (--fail-on-leak); choose another --split")
    if any_bad and not args.skip_bad:
        problems.append("not everything could be used, see above; --skip-bad accepts that")
    return "; ".join(problems) or None
