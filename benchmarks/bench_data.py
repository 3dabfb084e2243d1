"""How fast cells and puzzles are made, against merely reading the file, and how much memory that takes.

``python benchmarks/bench_data.py`` makes its own CELLxGENE-like files (30,000 genes, about 2,000 non-zeros a cell, 20
types, 8 donors; log-normalised float32 in CSR form, chunked as anndata has it) in a temporary folder, which takes some
7 GB, and prints

- whole file: listing the top 50 genes of every cell, against reading X in row chunks with h5py;
- puzzles: the 8 x 40 puzzles of a file, against reading it whole;
- memory: the peak of the process that makes the puzzles of a small and a large file.

Each time is the median of several; the two sides of a ratio take turns in one run, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from tqdm import tqdm

from recipe.cello1.data import matrix
from recipe.cello1.data.extract import CellReader, Job, process_file
from recipe.cello1.data.settings import Settings
from recipe.cello1.data.store import Store

N_GENES = 30_000
NONZEROS = 2_000
N_TYPES = 20
N_DONORS = 8
BASE_CELLS = 2_000  # different cells; longer files repeat them, which costs a reader the same
READ_ROWS = 1_000


def chunk_length(n_values: int) -> int:
    """Return the chunk length that h5py chooses for a vector, and so anndata."""
    with h5py.File("chunks", "w", driver="core", backing_store=False) as file:
        return file.create_dataset("a", (n_values,), "f4", maxshape=(None,), chunks=True).chunks[0]


def base_cells(total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw cells with ``total`` stored values in all: row lengths, indices, values."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(NONZEROS, 500, BASE_CELLS), 300, 5000).astype(np.int64)
    lengths += (total - lengths.sum()) // BASE_CELLS
    lengths[-1] += total - lengths.sum()
    rate = rng.gamma(0.3, 1.0, N_GENES) + 1e-6
    indices, values = [], []
    for length in tqdm(lengths.tolist(), desc="drawing cells", unit="cell", leave=False):
        # The smallest of exponential waiting times: genes without repetition, in proportion to their rates.
        chosen = np.sort(np.argpartition(rng.exponential(size=N_GENES) / rate, length)[:length])
        counts = 1 + rng.poisson(rate[chosen] * 2)
        indices.append(chosen.astype(np.int32))
        values.append(np.log1p(counts * (1e4 / counts.sum())).astype(np.float32))
    return lengths, np.concatenate(indices), np.concatenate(values)


def make_file(path: Path, n_cells: int, compression: str | None) -> Path:
    """Write a file of ``n_cells`` (a multiple of the number of different cells), tiled from ready-made chunks."""
    if path.exists():
        return path
    tiles = max(1, n_cells // BASE_CELLS)
    length = chunk_length(n_cells * NONZEROS)
    per_tile = max(1, round(BASE_CELLS * NONZEROS / length))
    lengths, indices, values = base_cells(per_tile * length)
    rng = np.random.default_rng(1)
    temporary = path.with_suffix(".tmp")
    with h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        group = file.create_group("X")
        shape = (tiles * BASE_CELLS, N_GENES)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        indptr = np.concatenate([[0], np.cumsum(np.tile(lengths, tiles))])
        group.create_dataset("indptr", data=indptr, compression=compression)
        for name, part in (("data", values), ("indices", indices)):
            size = (per_tile * length * tiles,)
            dataset = group.create_dataset(name, size, part.dtype, chunks=(length,), compression=compression)
            chunks = [part[i * length : (i + 1) * length].tobytes() for i in range(per_tile)]
            if compression == "gzip":
                chunks = [zlib.compress(chunk, 4) for chunk in chunks]  # h5py's level
            for number in tqdm(range(per_tile * tiles), desc=f"writing {path.name} {name}", unit="chunk", leave=False):
                dataset.id.write_direct_chunk((number * length,), chunks[number % per_tile])
        n = shape[0]
        columns = {
            "cell_type": [f"type {i}" for i in range(N_TYPES)],
            "donor_id": [f"donor {i}" for i in range(N_DONORS)],
            "suspension_type": ["cell"],
            "tissue": ["lung"],
            "disease": ["normal"],
            "sex": ["female", "male"],
            "development_stage": ["43-year-old stage"],
            "self_reported_ethnicity": ["unknown"],
        }
        obs = pd.DataFrame(
            {
                name: pd.Categorical.from_codes(rng.integers(len(names), size=n), names)
                for name, names in columns.items()
            },
            index=[f"{i:08d}-AAACCTGAGAAACCAT-1" for i in range(n)],
        )
        write_elem(file, "obs", obs, dataset_kwargs={"compression": compression})
        ids = [f"ENSG{i:011d}" for i in range(N_GENES)]
        # As in CELLxGENE files: a few symbols stand for two genes.
        symbols = [f"SYM{i}" for i in range(N_GENES)]
        for i in range(50):
            symbols[i + 100] = f"{symbols[i]}_{ids[i + 100]}"
        write_elem(file, "var", pd.DataFrame({"feature_name": symbols}, index=ids))
    os.replace(temporary, path)
    return path


def read_with_h5py(path: Path) -> None:
    """Read X in row chunks, and do nothing with it."""
    with h5py.File(path) as file:
        group = file["X"]
        indptr = group["indptr"][:]
        for start in range(0, len(indptr) - 1, READ_ROWS):
            first, last = int(indptr[start]), int(indptr[min(start + READ_ROWS, len(indptr) - 1)])
            group["data"][first:last]
            group["indices"][first:last]


def extract_all(path: Path, threads: int) -> None:
    """List the top genes of every cell."""
    with Store(path) as store:
        for _ in CellReader(store, Settings(), threads).read():
            pass


def make_puzzles(path: Path, threads: int) -> None:
    """Make the puzzles of a file."""
    result = process_file(Job(str(path), "bench", "", Settings(), threads))
    if result.reason or len(result.puzzles) != 320:
        msg = f"expected 320 puzzles, got {len(result.puzzles)} ({result.reason})"
        raise RuntimeError(msg)


def alternate(repeats: int, *functions: Callable[[], None]) -> list[float]:
    """Time functions in turn; returns the median of each in seconds."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def peak_memory(path: Path, threads: int, out: Path) -> float:
    """Run the whole command on a file; returns the peak of its process in MiB."""
    command = [sys.executable, __file__, "--measure", str(path), "--threads", str(threads), "--folder", str(out)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    return float(result.stdout.split()[-1])


ROOT = str(Path(__file__).parents[1])


def measure(path: str, threads: int, out: str) -> int:
    """Make a data set, and print the peak memory of this process in MiB."""
    from recipe.cello1 import prepare_data

    # Split by puzzle: the files repeat their cells under other donors.
    arguments = [path, "--out", out, "--fresh", "--quiet", "--workers", "1", "--split", "puzzle"]
    arguments += ["--threads", str(threads)]
    status = prepare_data.main(arguments)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return status


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", type=int, default=20_000, help="cells of the whole-file runs (%(default)s)")
    parser.add_argument("--medium", type=int, default=200_000, help="cells of the puzzle run (%(default)s)")
    parser.add_argument("--large", type=int, default=1_000_000, help="cells of the memory run, 0: none (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times each is measured (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (%(default)s)")
    parser.add_argument("--folder", help="where to make the files; kept there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.threads, args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = run(folder, args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def run(folder: Path, args: argparse.Namespace) -> dict[str, float | str]:
    """Make the files, measure and print."""
    figures: dict[str, float | str] = {
        "python": platform.python_version(),
        "processors": os.cpu_count() or 0,
        "threads": args.threads,
        "inflate": matrix.inflate.__name__,
    }
    print(f"{figures['processors']} processors, {args.threads} threads, gzip by {figures['inflate']}")
    for compression, name in (("gzip", "gzip"), (None, "uncompressed")):
        path = make_file(folder / f"small_{name}.h5ad", args.small, compression)
        extract_all(path, args.threads)  # compiles
        read, ours = alternate(
            args.repeats, lambda path=path: read_with_h5py(path), lambda path=path: extract_all(path, args.threads)
        )
        megabytes = args.small * NONZEROS * 8 / 1e6
        figures[f"whole_file_{name}_ratio"] = read / ours
        print(
            f"whole file, {name:12}: h5py reads {args.small / read:8,.0f} cells/s ({megabytes / read:5,.0f} MB/s), "
            f"top 50 of {args.small / ours:8,.0f} cells/s ({megabytes / ours:5,.0f} MB/s): ratio {read / ours:.2f}"
        )
    for compression, name in (("gzip", "gzip"), (None, "uncompressed")):
        path = make_file(folder / f"medium_{name}.h5ad", args.medium, compression)
        read, ours = alternate(
            args.repeats, lambda path=path: read_with_h5py(path), lambda path=path: make_puzzles(path, args.threads)
        )
        figures[f"puzzles_{name}_share"] = ours / read
        print(
            f"320 puzzles of {args.medium:,} cells, {name:12}: {ours:6.2f} s, "
            f"{100 * ours / read:.1f}% of the {read:.2f} s that h5py reads the file"
        )
        if name == "uncompressed":
            path.unlink()
    for n_cells in (args.small, args.large):
        if n_cells:
            path = make_file(folder / (f"{'small' if n_cells == args.small else 'large'}_gzip.h5ad"), n_cells, "gzip")
            figures[f"memory_{n_cells}"] = peak = peak_memory(path, args.threads, folder / "out")
            print(f"peak memory, {n_cells:9,} cells: {peak:,.0f} MiB")
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
