"""Time and memory of evaluating many predictions: ``cello1 evaluate`` in a process of its own, on made-up answers.

``python benchmarks/bench_evaluate.py`` writes 100,000 puzzles of 5, 8 and 12 cells with an answer each, right, wrong or
illegal by turns, of 50 donors and 20 tissues, and evaluates them with every report. The bounds are 60 s of wall time
and 1.5 GB of memory at most.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench_scoring import make_puzzles, make_response
from rows import ROOT, Row, finish, machine, markdown, software

from recipe.cello1.formats.atomic import dumps
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.predictions import prediction_record
from recipe.cello1.task.answer import format_answer

SECONDS, GIGABYTES = 60, 1.5
PACKAGES = ("cello1", "numpy", "scipy", "matplotlib", "jinja2")


def write_files(folder: Path, number: int) -> None:
    """Write data set and predictions; a few thousand puzzles come again and again."""
    puzzles = make_puzzles(min(number, 3000))
    responses = [
        (make_response(puzzle), format_answer(puzzle.candidates, "so"), format_answer(puzzle.candidates[:1] * 5, "so"))
        for puzzle in puzzles
    ]
    how = {"engine": "vllm", "model": "m", "sampling": {"temperature": 0.0}, "finish_reason": "stop"}
    with open(folder / "test.json", "w") as data, open(folder / "predictions.jsonl", "w") as predictions:
        for i in range(number):
            meta = {"donor_id": f"donor {i % 50}", "tissue": f"tissue {i % 20}", "dataset": f"set {i % 5}"}
            item = puzzle_to_item(replace(puzzles[i % len(puzzles)], meta=meta))
            record = prediction_record(item, responses[i % len(puzzles)][i // 3 % 3], index=i, tokens=900, **how)
            data.write((",\n" if i else "[\n") + dumps(item))
            predictions.write(dumps(record) + "\n")
        data.write("\n]\n")


def measure(number: int) -> list[Row]:
    """Evaluate in a process of its own and ask the system what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, number)
        command = [sys.executable, "-m", "recipe.cello1", "evaluate", str(folder / "predictions.jsonl")]
        for option, file in (
            ("--data", "test.json"),
            ("--out", "m.json"),
            ("--markdown", "m.md"),
            ("--html", "m.html"),
        ):
            command += [option, str(folder / file)]
        start = time.perf_counter()
        os.chdir(ROOT)
        _, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, command), 0)
        seconds, gigabytes = time.perf_counter() - start, usage.ru_maxrss / 1e6
        page = (folder / "m.html").stat().st_size / 1e6 if status == 0 else 0.0
    if status:
        return [Row(f"evaluate {number:,} answers", f"failed with status {status}", met=False)]
    what = f"evaluate {number:,} answers"
    return [
        Row(f"{what}: time", f"{seconds:,.1f} s", "", "", f"< {SECONDS} s", seconds < SECONDS),
        Row(f"{what}: processor time", f"{usage.ru_utime + usage.ru_stime:,.1f} s"),
        Row(f"{what}: memory", f"{gigabytes:.2f} GB", "", "", f"< {GIGABYTES} GB", gigabytes < GIGABYTES),
        Row(f"{what}: page", f"{page:.2f} MB"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--number", type=int, default=100_000, help="answers (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    path = args.json.resolve() if args.json else None
    rows = measure(args.number)
    print(f"{software(PACKAGES)}  \n{machine()}\n\n{markdown(rows)}")
    return finish(rows, path)


if __name__ == "__main__":
    raise SystemExit(main())
