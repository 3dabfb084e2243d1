"""Make training and test data: cell puzzles from expression files, or from puzzles that others made.

``python -m recipe.cello1.prepare_data INPUT --out DIR`` reads every .h5ad file and .zarr store below the folder INPUT
and writes

- ``train/train_data.json``, ``test/test_data.json``: puzzles in the CellPuzzles form; beside them a file for each input
- ``rl/train.parquet``, ``rl/test.parquet``: the same for verl
- ``leak_audit.json``: what train and test share
- ``manifest.json``, last: versions, settings, counts, notes, what became of each file, hashes

The same seed gives the same bytes, whatever the number of workers. Started again with the same DIR, a run goes on where
it was stopped.

``python -m recipe.cello1.prepare_data --from-hub ncbi/CellPuzzles --out DIR`` does it for a published data set, and
``prepare_data train.json test.json --out DIR`` for local files in that form (JSON, JSONL, parquet).

``python -m recipe.cello1.prepare_data audit TRAIN TEST`` says what any two files share.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipe.cello1.data.audit import audit
from recipe.cello1.data.build import SPLIT_MODES, DataSet, Plan, Source, build
from recipe.cello1.data.context_table import load_context_table
from recipe.cello1.data.extract import FileResult, Job
from recipe.cello1.data.gene_filters import GENE_SETS
from recipe.cello1.data.identity import fingerprint_of
from recipe.cello1.data.imports import OWN_FILES, Imported, read_hub, read_puzzle_file
from recipe.cello1.data.imports import SUFFIXES as PUZZLE_SUFFIXES
from recipe.cello1.data.outputs import copy_out
from recipe.cello1.data.parallel import cpu_count, default_workers, run_jobs
from recipe.cello1.data.parts import load_part, load_puzzles, save_part
from recipe.cello1.data.settings import RANKS, Settings
from recipe.cello1.data.store import SUFFIXES as EXPRESSION_SUFFIXES
from recipe.cello1.prompt import LAYOUTS
from recipe.cello1.records import atomic_write, dumps

RECORDS = "cells"  # folder of the cell records


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments, by default those of the process.

    Returns
    -------
    0 if all went well; 1 for an error, for files that could not be used (unless ``--skip-bad``), and for leaks with
    ``--fail-on-leak``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["audit"]:
            return _audit(_audit_parser().parse_args(arguments[1:]))
        return _prepare(_parser().parse_args(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


# -------------------------------------------------------------------------------------------------------- arguments


def _sizes(text: str) -> tuple[int, ...]:
    """Read ``8-15`` or ``8,10,12``."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            msg = f"{text!r} is no list of sizes; write 8-15, or 8,10,12"
            raise argparse.ArgumentTypeError(msg)
        found += range(int(first), int(last if dash else first) + 1)
    return tuple(found)


def _parser() -> argparse.ArgumentParser:
    default, plan = Settings(), Plan()
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m recipe.cello1.prepare_data",
        description=summary,
        epilog=rest.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="folder of .h5ad/.zarr, such files, or puzzle files or their folder"
    )
    parser.add_argument("--from-hub", metavar="ID", help="take the puzzles of this Hub data set, e.g. ncbi/CellPuzzles")
    parser.add_argument("--out", required=True, type=Path, help="folder for the output")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of everything drawn (default %(default)s)")

    group = parser.add_argument_group("puzzles")
    group.add_argument("--task", choices=("batch", "single"), default="batch", help="N cells a puzzle, or one")
    group.add_argument(
        "--candidates", choices=("given", "open"), default="given", help="list the types to choose from, or ask openly"
    )
    group.add_argument("--sizes", type=_sizes, help="cells in a puzzle (default 8-15), e.g. 3-5 or 8,10,12")
    group.add_argument(
        "--per-size", type=int, help="puzzles of each size and file; 0: one a cell (default 40; 0 with --task single)"
    )
    group.add_argument(
        "--max-cells", type=int, default=default.max_cells, help="cells of a file to draw from, 0 for all (%(default)s)"
    )
    group.add_argument("--top-genes", type=int, default=default.n_top, help="genes listed for a cell (%(default)s)")
    group.add_argument(
        "--min-genes", type=int, default=default.min_genes, help="leave out cells that express fewer (%(default)s)"
    )

    group = parser.add_argument_group("what is read")
    group.add_argument(
        "--suspension", default=default.suspension, help="suspension_type of the cells, or 'any' (%(default)s)"
    )
    for name, what in (("type", "cell type"), ("donor", "donor"), ("batch", "batch, used where a file has it")):
        option = f"{name}_column"
        group.add_argument(
            f"--{name}-column", default=getattr(default, option), help=f"column of obs: {what} (%(default)s)"
        )
    group.add_argument(
        "--gene-column", default=default.gene_column, help="column of var with symbols, or 'index' (%(default)s)"
    )
    group.add_argument("--layer", help="read this layer instead of X")
    group.add_argument("--use-raw", action="store_true", help="read raw instead of X")
    group.add_argument("--context-table", help="YAML with more context fields; see config/context_example.yaml")
    group.add_argument(
        "--exclude-genes",
        action="append",
        default=[],
        metavar="REGEX",
        help=f"leave out genes whose symbol it is found in, or one of the sets: {', '.join(GENE_SETS)}; repeatable",
    )
    group.add_argument(
        "--exclude-types", action="append", default=[], metavar="REGEX", help="leave out types it fits; repeatable"
    )
    group.add_argument(
        "--rank-by",
        choices=RANKS,
        default=default.rank_by,
        help="list genes by expression, or by expression against the file's mean (reads the whole file)",
    )

    group = parser.add_argument_group("train and test")
    group.add_argument(
        "--split",
        choices=SPLIT_MODES,
        help="what is never on both sides; puzzle: only the puzzles themselves, as published; given: as the names of "
        "the puzzle files say (default donor; given for --from-hub, and where file names speak of train and test)",
    )
    group.add_argument("--max-test", type=int, default=plan.max_test, help="test puzzles at most (%(default)s)")
    group.add_argument(
        "--min-test-per-size", type=int, default=plan.min_per_size, help="of each size at least (%(default)s)"
    )
    group.add_argument("--val-size", type=int, default=0, help="validation puzzles to take from training (0)")
    group.add_argument(
        "--drop-overlap", action="store_true", help="leave out test puzzles that share a cell with training"
    )
    group.add_argument("--fail-on-leak", action="store_true", help="exit with 1 if train and test share anything")

    group = parser.add_argument_group("output")
    group.add_argument("--layout", choices=LAYOUTS, default=plan.layout, help="prompt layout in the parquet files")
    group.add_argument(
        "--raw", action="store_true", help=f"also write {RECORDS}/ (a record for each cell) and train_raw files"
    )
    group.add_argument("--copy-to", metavar="URL", help="copy the output there through fsspec, e.g. hdfs://host/data")

    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, help="processes (default: one for each file, at most the processors)")
    group.add_argument("--threads", type=int, help="threads a file is read with (default: what the workers leave)")
    group.add_argument(
        "--ray-address", help="work on a Ray cluster: auto, local, or ray://HOST:PORT; it must see the same folders"
    )
    group.add_argument("--skip-bad", action="store_true", help="exit with 0 though files could not be used")
    group.add_argument("--fresh", action="store_true", help="do every file again, though it was done before")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    single = args.task == "single"
    if single and args.sizes not in (None, (1,)):
        msg = f"--sizes {','.join(map(str, args.sizes))} does not go with --task single, which has one cell a puzzle"
        raise ValueError(msg)
    return Settings(
        seed=args.seed,
        variant=args.task + ("_open" if args.candidates == "open" else ""),
        sizes=(1,) if single else args.sizes or Settings().sizes,
        per_size=args.per_size if args.per_size is not None else 0 if single else Settings().per_size,
        max_cells=args.max_cells,
        n_top=args.top_genes,
        min_genes=args.min_genes,
        suspension=args.suspension,
        type_column=args.type_column,
        donor_column=args.donor_column,
        batch_column=args.batch_column,
        gene_column=args.gene_column,
        layer=args.layer,
        use_raw=args.use_raw,
        exclude_genes=tuple(args.exclude_genes),
        exclude_types=tuple(args.exclude_types),
        rank_by=args.rank_by,
        context=load_context_table(args.context_table),
    )


def _check(args: argparse.Namespace) -> None:
    if bool(args.inputs) == bool(args.from_hub):
        msg = "give either INPUT or --from-hub"
        raise ValueError(msg)
    limits = {"max_test": 1, "min_test_per_size": 0, "val_size": 0, "workers": 1, "threads": 1}
    for name, least in limits.items():
        value = getattr(args, name)
        if value is not None and value < least:
            msg = f"--{name.replace('_', '-')} must be at least {least}, got {value}"
            raise ValueError(msg)


# ------------------------------------------------------------------------------------------------------------- work


def _prepare(args: argparse.Namespace) -> int:
    _check(args)
    settings = _settings(args)
    if args.from_hub:
        sources, failures = _imported(read_hub(args.from_hub, settings.variant))
        default_split, about = "given", {"from_hub": args.from_hub}
    else:
        expression, puzzles = _find_inputs(args.inputs)
        if expression:
            return _prepare_expression(args, settings, expression)
        if args.raw:
            msg = "--raw needs expression files; puzzle files have no cell records"
            raise ValueError(msg)
        sources, failures = _imported([read_puzzle_file(path, settings.variant) for path in puzzles])
        named = {source.split for source in sources}
        default_split, about = "given" if {"train", "test"} <= named else "donor", {}
    split = args.split or default_split
    found = build(sources, args.out, settings, _plan(args, split), {**about, "failures": failures})
    for failure in failures:
        print(f"bad   {failure}")
    return _finish(args, found, bool(failures))


def _plan(args: argparse.Namespace, split: str) -> Plan:
    return Plan(
        split=split,
        max_test=args.max_test,
        min_per_size=args.min_test_per_size,
        val_size=args.val_size,
        drop_overlap=args.drop_overlap,
        layout=args.layout,
        raw=args.raw,
    )


def _imported(found: Sequence[Imported]) -> tuple[list[Source], list[str]]:
    failures = [text for part in found for text in part.failures]
    sources = [Source(part.name, partial(_same, part.puzzles), part.split, files=False) for part in found]
    return sources, failures


def _same(value: Any) -> Any:
    return value


def _prepare_expression(args: argparse.Namespace, settings: Settings, files: Sequence[tuple[Path, str]]) -> int:
    if args.split == "given":
        msg = "--split given is for puzzle files whose names say train and test; choose another for expression files"
        raise ValueError(msg)
    workers = args.workers or default_workers(len(files))
    threads = args.threads or max(1, cpu_count() // workers)
    jobs = [_job(path, name, settings, threads, args) for path, name in files]
    results = _process(jobs, args, workers)
    bad = [result for result in results if result.reason]
    good = [result for result in results if not result.reason]
    _report_files(results)
    sources = [Source(result.name, partial(load_puzzles, args.out, result.name)) for result in good]
    if not sources:
        msg = "none of the files could be used"
        raise ValueError(msg)
    about = {"inputs": [_about(result) for result in results]}
    records = [f"{RECORDS}/{result.name}.json" for result in good if args.raw and result.n_records]
    found = build(sources, args.out, settings, _plan(args, args.split or "donor"), about, records)
    return _finish(args, found, bool(bad))


def _job(path: Path, name: str, settings: Settings, threads: int, args: argparse.Namespace) -> Job:
    records = str(args.out / RECORDS / f"{name}.json") if args.raw else None
    return Job(str(path), name, path.resolve().parent.name, settings, threads, records)


def _process(jobs: Sequence[Job], args: argparse.Namespace, workers: int) -> list[FileResult]:
    """Work on the files that are not done yet; returns the results in the order of the jobs."""
    results: dict[str, FileResult] = {}
    if not args.fresh:
        results = {job.name: found for job in jobs if (found := load_part(args.out, job)) is not None}
    left = [job for job in jobs if job.name not in results]
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
        if path.suffix in EXPRESSION_SUFFIXES and path.exists():
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
    names: dict[str, Path] = {}
    for path, name in expression:
        if name in names:
            msg = f"{names[name]} and {path} would both be called {name!r}; rename one of them"
            raise ValueError(msg)
        names[name] = path
    return expression, puzzles


def _walk(folder: Path) -> list[tuple[Path, str]]:
    """Find the expression files below a folder, in the order of their names; a .zarr folder is one of them."""
    found = []
    todo = [folder]
    while todo:
        for path in todo.pop().iterdir():
            if path.name.startswith("."):
                continue
            if path.suffix in EXPRESSION_SUFFIXES:
                found.append((path, path.relative_to(folder).with_suffix("").as_posix()))
            elif path.is_dir():
                todo.append(path)
    return sorted(found, key=lambda entry: entry[1])


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


def _finish(args: argparse.Namespace, found: DataSet, any_bad: bool) -> int:
    for note in found.notes:
        print(f"note  {note}")
    for name, result in found.audits.items():
        print(f"\nleak audit {name}")
        print("\n".join(result.lines()))
    counts = ", ".join(f"{count:,} {side}" for side, count in found.counts.items())
    print(f"\npuzzles: {counts}: {args.out}")
    if args.copy_to:
        copy_out(args.out, found.files, args.copy_to)
        print(f"copied to {args.copy_to}")
    status = 0
    if args.fail_on_leak and any(result.leaks for result in found.audits.values()):
        print("error: train and test share something (--fail-on-leak); choose another --split", file=sys.stderr)
        status = 1
    if any_bad and not args.skip_bad:
        print("error: not everything could be used, see above; --skip-bad accepts that", file=sys.stderr)
        status = 1
    return status


# ------------------------------------------------------------------------------------------------------------ audit


def _audit_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.cello1.prepare_data audit",
        description="Say what two puzzle files share: cells, donors, puzzles, and the same cells in another order.",
    )
    parser.add_argument("train", help="puzzle file (JSON, JSONL, or parquet, RL data too)")
    parser.add_argument("test", help="puzzle file")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--fail-on-leak", action="store_true", help="exit with 1 if they share anything")
    return parser


def _audit(args: argparse.Namespace) -> int:
    read: Callable[[str], Imported] = partial(read_puzzle_file, variant=None)
    sides = [read(args.train), read(args.test)]
    if failures := [text for side in sides for text in side.failures]:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        msg = f"{failures[0]}{more}; an audit needs every puzzle"
        raise ValueError(msg)
    result = audit(*[[fingerprint_of(puzzle) for puzzle in side.puzzles] for side in sides])
    print("\n".join(result.lines()))
    if args.out:
        atomic_write(args.out, dumps({"train": args.train, "test": args.test, **result.plain()}, 1) + "\n")
    if args.fail_on_leak and result.leaks:
        print("error: the two files share something (--fail-on-leak)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
