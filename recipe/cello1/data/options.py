"""The options of ``python -m recipe.cello1 prepare``, and what they come to."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from recipe.cello1.data.context_table import load_context_table
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.data.split import MAX_TEST, SPLIT_MODES, DataPlan
from recipe.cello1.task.gene_names import GENE_SETS, RANKS
from recipe.cello1.task.prompt import LAYOUTS

RECORDS = "cells"  # folder of the cell records
_FOR_PUZZLES = ("seed", "variant", "context", "keep_duplicates")
_FOR_EXPRESSION = (
    *(item.name for item in fields(PuzzleSettings) if item.name not in _FOR_PUZZLES),
    *("context_table", "raw", "workers", "threads", "ray_address", "fresh"),
)
_DEFAULTS = {item.name: item.default for item in fields(PuzzleSettings) if isinstance(item.default, int | str)}


def sizes(text: str) -> tuple[int, ...]:
    """Read a list of sizes."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"invalid sizes {text!r}; use a range (8-15) or a list (8,10,12)")
        inside = range(int(first), int(last if dash else first) + 1)
        if not inside:
            raise argparse.ArgumentTypeError(f"invalid sizes {text!r}; write {last}-{first} for {part.strip()}")
        found += inside
    return tuple(found)


def make_parser(about: str) -> argparse.ArgumentParser:
    """Describe the command."""
    summary, _, rest = about.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=rest.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**{**_DEFAULTS, "per_size": None, "layout": DataPlan().layout})
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="folder of .h5ad/.zarr, such files, or puzzle files or their folder"
    )
    parser.add_argument("--from-hub", metavar="ID", help="take the puzzles of this Hub data set, e.g. ncbi/CellPuzzles")
    parser.add_argument("--out", required=True, type=Path, help="folder for the output")
    parser.add_argument("--seed", type=int, help="seed of everything drawn (default %(default)s)")

    group = parser.add_argument_group("puzzles")
    group.add_argument("--task", choices=("batch", "single"), default="batch", help="N cells a puzzle, or one")
    group.add_argument(
        "--candidates", choices=("given", "open"), default="given", help="list the types to choose from, or ask openly"
    )
    group.add_argument("--sizes", type=sizes, help="cells in a puzzle (default 8-15), e.g. 3-5 or 8,10,12")
    group.add_argument(
        "--per-size", type=int, help="puzzles of each size and file; 0: one a cell (default 40; 0 with --task single)"
    )
    group.add_argument("--max-cells", type=int, help="cells of a file to draw from, 0 for all (%(default)s)")
    group.add_argument("--top-genes", dest="n_top", type=int, help="genes listed for a cell (%(default)s)")
    group.add_argument("--min-genes", type=int, help="leave out cells that express fewer (%(default)s)")

    group = parser.add_argument_group("what is read")
    group.add_argument("--suspension", help="suspension_type of the cells, or 'any' (%(default)s)")
    group.add_argument(
        "--keep-duplicates",
        action="store_true",
        help="take cells and puzzles that are there again, too: that an input before has, or the same one, or, by "
        "is_primary_data, another data set",
    )
    for name, what in (("type", "cell type"), ("donor", "donor"), ("batch", "batch, used where a file has it")):
        group.add_argument(f"--{name}-column", help=f"column of obs: {what} (%(default)s)")
    group.add_argument("--gene-column", help="column of var with symbols, or 'index' (%(default)s)")
    group.add_argument("--layer", help="read this layer instead of X")
    group.add_argument("--use-raw", action="store_true", help="read raw instead of X")
    group.add_argument("--context-table", help="YAML with more context fields; see config/context_example.yaml")
    group.add_argument(
        "--exclude-genes",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out genes whose symbol it is found in, in any case; or the name of a set: "
        f"{', '.join(GENE_SETS)} (mitochondrial, ribosomal, MALAT1 and the like); repeatable",
    )
    group.add_argument(
        "--capitals",
        action="store_true",
        help="write symbols in capitals: mouse cells for a model of human ones (by name, not by orthology)",
    )
    group.add_argument(
        "--exclude-types",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out types it fits as a whole; repeatable",
    )
    group.add_argument(
        "--rank-by",
        choices=RANKS,
        help="list genes by expression, or by expression against the file's mean (reads the whole file)",
    )

    _add_run_options(parser)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options that leave the puzzles as they are."""
    group = parser.add_argument_group("train and test")
    group.add_argument(
        "--split",
        choices=SPLIT_MODES,
        help="what train and test never share, besides cells; dataset and tissue: no donors either, unless they link "
        "all; "
        "puzzle: only the puzzles themselves, as published; given: as the names of the puzzle files say; none: train "
        "on all, hold none out (default donor; given for --from-hub, and where file names speak of train and test)",
    )
    group.add_argument(
        "--test-donors", nargs="+", default=[], metavar="NAME", help="test on these donors (default: they are drawn)"
    )
    group.add_argument(
        "--max-test", type=int, help=f"test puzzles at most (default {MAX_TEST}, or a fifth of all where that is less)"
    )
    group.add_argument(
        "--min-test-per-size",
        dest="min_per_size",
        type=int,
        help="of each size at least (5 where there are more puzzles than --max-test, else 1)",
    )
    group.add_argument("--val-size", type=int, default=0, help="validation puzzles to take from training (0)")
    group.add_argument(
        "--drop-overlap", action="store_true", help="leave out test puzzles that share a cell with training"
    )
    group.add_argument("--fail-on-leak", action="store_true", help="exit with 1 if train and test share anything")

    group = parser.add_argument_group("output")
    group.add_argument("--layout", choices=LAYOUTS, help="prompt layout for verl (%(default)s)")
    group.add_argument(
        "--raw", action="store_true", help=f"also write {RECORDS}/ (a record for each cell) and train_raw files"
    )

    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, help="processes (default: one for each file, at most the processors)")
    group.add_argument("--threads", type=int, help="threads for each file (default: what the workers leave; on Ray 1)")
    group.add_argument(
        "--ray-address", help="work on a Ray cluster: auto, local, or ray://HOST:PORT; it must see the same folders"
    )
    group.add_argument("--skip-bad", action="store_true", help="exit with 0 even if some files could not be used")
    group.add_argument("--fresh", action="store_true", help="process every file again, even if it was done before")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def settings_of(args: argparse.Namespace) -> PuzzleSettings:
    """Return what puzzles are wanted."""
    single = args.task == "single"
    if single and args.sizes not in (None, (1,)):
        msg = f"sizes={','.join(map(str, args.sizes))} does not go with task='single', which has one cell a puzzle"
        raise ValueError(msg)
    given = {item.name: getattr(args, item.name) for item in fields(PuzzleSettings) if hasattr(args, item.name)}
    default = PuzzleSettings()
    own = {
        "variant": args.task + ("_open" if args.candidates == "open" else ""),
        "sizes": (1,) if single else args.sizes or default.sizes,
        "per_size": args.per_size if args.per_size is not None else 0 if single else default.per_size,
        "exclude_genes": tuple(args.exclude_genes),
        "exclude_types": tuple(args.exclude_types),
        "context": load_context_table(args.context_table),
    }
    return PuzzleSettings(**{**given, **own})


def plan_of(args: argparse.Namespace, split: str) -> DataPlan:
    """Return how the data set is put together."""
    given = {item.name: getattr(args, item.name) for item in fields(DataPlan)}
    return DataPlan(**{**given, "split": split, "test_donors": tuple(args.test_donors)})


def check(args: argparse.Namespace) -> None:
    """Check what does not depend on the inputs."""
    if bool(args.inputs) == bool(args.from_hub):
        raise ValueError("give either INPUT or from_hub=")
    limits = {"max_test": 1, "min_per_size": 0, "val_size": 0, "workers": 1, "threads": 1}
    for name, least in limits.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_for_puzzles(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that would do nothing, since the puzzles are made already."""
    useless = [name for name in _FOR_EXPRESSION if getattr(args, name) != parser.get_default(name)]
    if useless:
        options = ", ".join(f"{name}=" for name in useless)
        raise ValueError(
            f"{options} needs expression files: the puzzles of puzzle files are made already; leave it out"
        )
