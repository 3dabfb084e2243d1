"""How fast cells and puzzles are made, against merely reading the file, and how much memory that takes.

``python benchmarks/bench_data.py`` makes its own CELLxGENE-like files (30,000 genes, about 2,000 non-zeros a cell, 20
types, 8 donors; log-normalised float32 in CSR form, chunked as anndata has it) in a temporary folder, which takes up to
10 GB and is removed, and prints one Markdown table:

- top 50 genes of every cell of a file, against reading X in row chunks with h5py;
- the 8 x 40 puzzles of a file of ten times the cells, against reading X as a whole with h5py;
- peak memory of a process that makes the puzzles, or lists the genes of every cell, of the first file and of one of
  fifty times the cells;
- time and peak memory for the first file's cells stored column by column (CSC) as 64-bit integers, the form that takes
  most memory.

Each time is the median of several runs; the two sides of a ratio take turns, so that a busy machine slows both. It
takes some five minutes on two cores; ``--cells 2000`` is a quick try, whose figures mean little.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
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
import scipy.sparse as sp
from anndata.io import write_elem
from rows import Row, finish, machine, markdown, software
from tqdm import tqdm

from recipe.cello1.data import vectors
from recipe.cello1.data.expression.reader import CellReader
from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.extract import Job, process_file
from recipe.cello1.data.settings import PuzzleSettings

N_GENES = 30_000
NONZEROS = 2_000
N_TYPES = 20
N_DONORS = 8
BASE_CELLS = 2_000  # different cells; longer files repeat them, which costs a reader the same
READ_ROWS = 1_000
N_PUZZLES = 320
PACKAGES = ("cello1", "numpy", "numba", "h5py", "anndata", "isal")
DISK = 500_000  # bytes on disk for each of --cells, at most: 11 times as many cells uncompressed, 61 times compressed


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


def as_csc(source: Path, path: Path) -> Path:
    """Write a file's cells column by column, as integers."""
    if path.exists():
        return path
    temporary = path.with_suffix(".tmp")
    with h5py.File(source) as file, h5py.File(temporary, "w") as target:
        group = file["X"]
        parts = (np.ceil(group["data"][:]).astype(np.int64), group["indices"][:], group["indptr"][:])
        matrix = sp.csr_matrix(parts, shape=tuple(group.attrs["shape"])).tocsc()
        target.attrs.update(file.attrs)
        write_elem(target, "X", matrix, dataset_kwargs={"compression": "gzip"})
        for name in ("obs", "var"):
            file.copy(name, target)
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
        for _ in CellReader(store, PuzzleSettings(), threads).read():
            pass


def make_puzzles(path: Path, threads: int) -> None:
    """Make the puzzles of a file."""
    result = process_file(Job(str(path), "bench", "", PuzzleSettings(), threads))
    if result.reason or len(result.puzzles) != N_PUZZLES:
        msg = f"expected {N_PUZZLES} puzzles, got {len(result.puzzles)} ({result.reason})"
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


def peak_memory(path: Path, threads: int, what: str) -> float:
    """Work on a file in a process of its own; returns its peak in MiB."""
    with tempfile.TemporaryDirectory(dir=path.parent) as out:
        command = [sys.executable, __file__, "--measure", what, "--threads", str(threads), str(path), out]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.split()[-1])


def peak_of_this_process() -> float:
    """Return its peak in MiB, without that of the process that started it, which ``getrusage`` counts in on Linux."""
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(match.group(1)) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(what: str, path: str, out: str, threads: int) -> int:
    """Make a data set of a file, or list the genes of all its cells; prints the peak memory of this process in MiB."""
    if what == "cells":
        extract_all(Path(path), threads)
    else:
        from recipe.cello1.data import prepare as prepare_data

        # Split by puzzle: the files repeat their cells under other donors.
        arguments = [path, "--out", out, "--quiet", "--workers", "1", "--threads", str(threads), "--split", "puzzle"]
        if status := prepare_data.main(arguments):
            return status
    print(peak_of_this_process())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("``", ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=20_000, help="cells of the first file (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times each is measured (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (%(default)s)")
    parser.add_argument("--folder", type=Path, help="make the files here and keep them (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--measure", choices=("cells", "puzzles"), help=argparse.SUPPRESS)
    parser.add_argument("own", nargs="*", help=argparse.SUPPRESS)  # file and folder of --measure
    return parser


def main() -> int:
    """Run the benchmark."""
    parser = build_parser()
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, *args.own, args.threads)
    if args.cells < BASE_CELLS or args.cells % BASE_CELLS:
        parser.error(f"--cells must be a multiple of {BASE_CELLS:,}, got {args.cells:,}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        rows = run(args.folder, args, keep=True)
    else:
        with tempfile.TemporaryDirectory(prefix="bench_data_") as temporary:
            rows = run(Path(temporary), args, keep=False)
    print(
        f"{software(PACKAGES)}  \n{machine()}, {args.threads} threads, {vectors.inflate.__name__}\n\n{markdown(rows)}"
    )
    return finish(rows, args.json)


def run(folder: Path, args: argparse.Namespace, keep: bool) -> list[Row]:
    """Make the files and measure; returns the rows of the table."""
    if (free := shutil.disk_usage(folder).free) < DISK * args.cells:
        msg = (
            f"{folder} has {free / 1e9:.1f} GB free, {DISK * args.cells / 1e9:.1f} GB are needed; name another --folder"
        )
        raise SystemExit(msg)
    few, many, most = args.cells, 10 * args.cells, 50 * args.cells
    rows = []

    def file(n_cells: int, compression: str | None) -> Path:
        return make_file(folder / f"{n_cells}_{compression or 'uncompressed'}.h5ad", n_cells, compression)

    def done(path: Path) -> None:
        if not keep:
            path.unlink()

    for compression, wanted in (("gzip", 0.9), (None, 0.5)):
        path = file(few, compression)
        extract_all(path, args.threads)  # compiles
        read, ours = alternate(
            args.repeats, lambda path=path: read_with_h5py(path), lambda path=path: extract_all(path, args.threads)
        )
        what = f"top 50 genes of {few:,} cells, {compression or 'uncompressed'}"
        speeds = f"{few / ours:,.0f} cells/s", f"{few / read:,.0f} cells/s (h5py reads X)"
        rows.append(Row(what, *speeds, f"{read / ours:.2f}", f">= {wanted}", read / ours >= wanted))
        if compression is None:
            done(path)
    for compression in ("gzip", None):
        path = file(many, compression)
        read, ours = alternate(
            args.repeats, lambda path=path: read_with_h5py(path), lambda path=path: make_puzzles(path, args.threads)
        )
        what = f"{N_PUZZLES} puzzles of {many:,} cells, {compression or 'uncompressed'}"
        # On an uncompressed file reading takes next to nothing, so that the bound is for the form CELLxGENE has.
        bound = ("< 10%", ours / read < 0.1) if compression else ("", None)
        rows.append(Row(what, f"{ours:.2f} s", f"{read:.2f} s (h5py reads X)", f"{ours / read:.1%}", *bound))
        done(path)
    for n_cells in (few, most):
        path = file(n_cells, "gzip")
        for what in ("puzzles", "cells"):
            name = f"{N_PUZZLES} puzzles" if what == "puzzles" else "top 50 genes"
            peak = peak_memory(path, args.threads, what)
            text = f"peak memory, {name} of {n_cells:,} cells, gzip"
            rows.append(Row(text, f"{peak:,.0f} MiB", "", "", "< 1,024 MiB", peak < 1024))
        if n_cells == few:
            rows += csc_rows(as_csc(path, folder / f"{few}_csc.h5ad"), args, done)
        done(path)
    return rows


def csc_rows(path: Path, args: argparse.Namespace, done: Callable[[Path], None]) -> list[Row]:
    """Measure puzzles of a file in CSC form, which has to be read as a whole, and the memory that takes."""
    make_puzzles(path, args.threads)  # compiles
    read, ours = alternate(args.repeats, lambda: read_with_h5py(path), lambda: make_puzzles(path, args.threads))
    name = f"{args.cells:,} cells, CSC of integers, gzip"
    ratio = f"{100 * ours / read:.1f}%"
    rows = [Row(f"{N_PUZZLES} puzzles of {name}", f"{ours:.2f} s", f"{read:.2f} s (h5py reads X)", ratio)]
    for what, text in (("puzzles", f"{N_PUZZLES} puzzles"), ("cells", "top 50 genes")):
        peak = peak_memory(path, args.threads, what)
        rows.append(Row(f"peak memory, {text} of {name}", f"{peak:,.0f} MiB", "", "", "< 1,024 MiB", peak < 1024))
    done(path)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
