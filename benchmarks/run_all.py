"""All benchmarks, one after the other, in one Markdown table.

``python benchmarks/run_all.py`` takes about half an hour on two cores and 10 GB in the temporary folder; ``--quick`` is
a try of some minutes, whose figures mean little and whose bounds do not count, and ``--only data,plugin`` runs these
alone. With ``--metrics``, the metrics folder of a training run, the table says what share of its steps our parts take.

What cannot run here, for want of a package for example, says so in its row. The exit code is 1 if a benchmark failed or
missed a bound. ``bench_gpu.sh``, ``bench_voting.py`` and ``bench_labels.py`` are not among them:
the first needs a GPU, the others a model.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rows import FAILED, ROOT, Row, finish, machine, markdown, read_rows, software

from recipe.cello1.formats.atomic import atomic_write

HERE = Path(__file__).parent
METRICS = ROOT / "outputs" / "pancreas" / "metrics"  # where the main job leaves them
EMBEDDED = ("--batch", "24x8")  # of a step of the main job
PACKAGES = (
    *("cello1", "numpy", "scipy", "numba", "h5py", "anndata", "isal", "dask"),
    *("torch", "transformers", "vllm", "verl", "datasets"),
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script and what makes it quick."""

    script: str
    quick: tuple[str, ...]


BENCHMARKS = {
    "data": Benchmark("bench_data.py", ("--cells", "2000", "--repeats", "1")),
    "scoring": Benchmark("bench_scoring.py", ("--repeats", "20")),
    "evaluation": Benchmark("bench_evaluate.py", ("--number", "2000")),
    "prediction": Benchmark("bench_predict.py", ("--n", "4", "--max-tokens", "32")),
    "plugin": Benchmark("bench_plugin.py", ("--cells", "2000", "--repeats", "1")),
    "training": Benchmark("bench_training_overhead.py", ("--repeats", "20", *EMBEDDED)),
}


def run(name: str, options: Sequence[str]) -> list[Row]:
    """Run one benchmark in a process of its own; what it prints goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / BENCHMARKS[name].script), *options, "--json", str(result)]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if result.is_file():
            return read_rows(result)
    return [Row("all of it", f"{FAILED} with exit code {code}; its own output says why", met=False)]


def names(text: str) -> list[str]:
    """Read ``data,plugin``."""
    found = text.split(",")
    if unknown := [name for name in found if name not in BENCHMARKS]:
        msg = f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}"
        raise argparse.ArgumentTypeError(msg)
    return found


def result_file() -> Path:
    """Name the file for this kind of machine, without naming the machine."""
    kind = f"{platform.system()}-{platform.machine()}-{len(os.sched_getaffinity(0))}-processors"
    return HERE / "results" / f"{kind.lower()}.md"


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("``", ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a try of some minutes")
    parser.add_argument("--only", type=names, default=list(BENCHMARKS), metavar="NAME,...", help=", ".join(BENCHMARKS))
    parser.add_argument("--metrics", type=Path, help="metrics folder of a training run (default: that of the main job)")
    parser.add_argument("--write", action="store_true", help="also write the table to benchmarks/results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks."""
    args = build_parser().parse_args(argv)
    metrics = args.metrics or (METRICS if METRICS.is_dir() else None)
    rows: list[Row] = []
    column: list[str] = []
    for name in args.only:
        print(f"\n== {name}", file=sys.stderr)
        options = list(BENCHMARKS[name].quick) if args.quick else []
        if name == "training" and metrics:
            options += [*EMBEDDED, "--metrics", str(metrics)]
        found = run(name, options)
        if args.quick:  # no bounds
            found = [row if row.failed else replace(row, wanted="", met=None) for row in found]
        rows += found
        column += [name] * len(found)
    note = "a quick try: figures that mean little" if args.quick else "medians, and ratios within one run"
    table = f"{machine()}  \n{software(PACKAGES)}  \n{note}\n\n{markdown(rows, benchmark=column)}\n"
    print(table, end="")
    if args.write:
        path = result_file()
        atomic_write(path, f"# Benchmarks\n\n<!-- made by `python benchmarks/run_all.py --write` -->\n{table}")
        print(f"written to {path}", file=sys.stderr)
    return finish(rows, None)


if __name__ == "__main__":
    raise SystemExit(main())
