"""What ``tl.annotate`` costs besides the engine: 100,000 cells, 30 groups, in memory, backed and dask.

``python benchmarks/bench_plugin.py`` makes a synthetic sparse object (2,000 genes, about 200 non-zeros a cell) in a
temporary folder, annotates it with an engine that answers at once, each time in a process of its own, and prints one
table. Memory is the peak of the resident set while annotating, above what the process held with the object loaded. The
bounds are 2 s and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from rows import Row, finish, lacking, not_run
from tqdm import tqdm

MODES = ("memory", "backed", "dask")
SECONDS, MEGABYTES = 2.0, 500.0


class InstantEngine:
    """Answers with the candidates as they come."""

    name = model = "instant"
    fingerprint = constraint = ""

    def __init__(self) -> None:
        self.seconds = 0.0

    def generate(self, requests, sampling):  # noqa: D102
        from recipe.cello1.engines.protocol import Completion
        from recipe.cello1.task.answer import format_answer
        from recipe.cello1.task.prompt import parse_user

        for position, request in enumerate(requests):
            start = time.perf_counter()
            puzzle = parse_user(request.messages[-1]["content"])
            text = format_answer(puzzle.candidates[: puzzle.n_cells])
            self.seconds += time.perf_counter() - start
            yield position, Completion(text, "stop", 1, 1)

    def close(self) -> None:  # noqa: D102
        pass


def make(path: Path, n_cells: int, n_groups: int, n_genes: int = 2000, nonzeros: int = 200) -> None:
    """Write the object."""
    rng = np.random.default_rng(0)
    indices = rng.integers(n_genes, size=(n_cells, nonzeros), dtype=np.int32)
    indices.sort(axis=1)
    values = rng.gamma(2.0, 1.0, size=indices.size).astype(np.float32)
    matrix = sp.csr_matrix((values, indices.ravel(), np.arange(0, indices.size + 1, nonzeros)), (n_cells, n_genes))
    matrix.sum_duplicates()
    obs = pd.DataFrame(
        {
            "leiden": pd.Categorical(rng.integers(n_groups, size=n_cells).astype(str)),
            "donor_id": pd.Categorical(rng.integers(8, size=n_cells).astype(str)),
            "tissue": pd.Categorical(["blood"] * n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    AnnData(matrix, obs=obs, var=var).write_h5ad(path)


def load(path: Path, mode: str) -> AnnData:
    """Load it in one of the modes."""
    if mode == "backed":
        return read_h5ad(path, backed="r")
    adata = read_h5ad(path)
    if mode == "dask":
        import dask.array as da

        adata.X = da.from_array(adata.X, chunks=(5000, adata.n_vars), asarray=False)
    return adata


def measure(path: Path, mode: str, n_groups: int) -> dict[str, float]:
    """Annotate once in this process."""
    import scverse_plugin

    adata = load(path, mode)
    engine = InstantEngine()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    types = [f"type {i}" for i in range(n_groups)]
    scverse_plugin.tl.annotate(
        adata, types, groupby="leiden", sample_key="donor_id", engine=engine, n_candidates=n_groups, progress=False
    )
    seconds = time.perf_counter() - start - engine.seconds
    done.set()
    watcher.join()
    return {"seconds": seconds, "megabytes": (peak - before) / 1e6, "puzzles": len(adata.uns["cello1"]["traces"])}


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description="What tl.annotate costs besides the engine.")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "MODE"), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a bound is missed."""
    args = build_parser().parse_args(argv)
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.groups)))
        return 0
    modes = [mode for mode in MODES if mode != "dask" or not lacking("dask")]
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        make(path, args.cells, args.groups)
        for mode in tqdm(modes * args.repeats, desc="annotating", unit="run"):
            command = [sys.executable, __file__, "--groups", str(args.groups), "--measure", str(path), mode]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[mode].append(json.loads(found.stdout.splitlines()[-1]))
    rows = []
    print(f"| {args.cells:,} cells x {args.groups} groups | seconds | MB above the object | puzzles |")
    print("| --- | ---: | ---: | ---: |")
    for mode, found_in in runs.items():
        seconds = statistics.median(run["seconds"] for run in found_in)
        megabytes = max(run["megabytes"] for run in found_in)
        print(f"| {mode} | {seconds:.2f} | {megabytes:.0f} | {found_in[0]['puzzles']:.0f} |")
        what = f"annotate {args.cells:,} cells in {args.groups} groups, {mode}"
        rows.append(Row(f"{what}: time", f"{seconds:.2f} s", "", "", f"< {SECONDS:g} s", seconds < SECONDS))
        bound = f"< {MEGABYTES:g} MB", megabytes < MEGABYTES
        rows.append(Row(f"{what}: memory above the object", f"{megabytes:.0f} MB", "", "", *bound))
    if "dask" not in modes:
        rows.append(not_run(f"annotate {args.cells:,} cells in {args.groups} groups, dask", lacking("dask")))
        print(f"dask: {rows[-1].ours}", file=sys.stderr)
    return finish(rows, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
