"""How long scoring one response of 500 words takes, in microseconds of wall time: medians of many repetitions.

``python benchmarks/bench_scoring.py`` scores a well-formed response, one with ``<`` in its reasoning, which takes the
slower path of the parser, and one that was cut. The bound for the first is 50 us.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rows import Row, finish, machine, markdown, median_us, software

from recipe.cello1.task.answer import format_answer, join_types
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer

N_WORDS = 500
N_GENES = 50
MICROSECONDS = 50
PACKAGES = ("cello1", "numpy")


def make_puzzles(number: int, sizes: Sequence[int] = (5, 8, 12)) -> list[Puzzle]:
    """Make puzzles without meaning of the usual size: 50 genes a cell."""
    rng = np.random.default_rng(0)
    genes = [f"{a}{b}{i}" for a in "ABCDEFGHIJ" for b in "KLMNOPQRST" for i in range(1, 21)]
    types = [f"{kind} cell of layer {i}" for kind in ("T", "B", "endothelial", "epithelial") for i in range(8)]
    puzzles = []
    for number_of in range(number):
        n = sizes[number_of % len(sizes)]
        cells = [[genes[i] for i in rng.choice(len(genes), N_GENES, replace=False)] for _ in range(n)]
        answer = [types[i] for i in rng.choice(len(types), n, replace=False)]
        puzzles.append(Puzzle(cells, sorted(answer), answer, "The cell is from a donor, originating from the lung."))
    return puzzles


def make_response(puzzle: Puzzle) -> str:
    """Write a right answer of 500 words, tags and separators not counted."""
    answer = puzzle.answer or ()
    words = [gene for cell in puzzle.cells for gene in (*cell, "->", "speaks", "for")]
    rest = N_WORDS - sum(len(name.split()) for name in answer)
    reasoning = " ".join((words * (rest // len(words) + 1))[:rest])
    return format_answer(answer, f"\n{reasoning}\n")


def measure(repeats: int) -> list[Row]:
    """Score the three kinds of response."""
    puzzle = make_puzzles(2)[1]
    response = make_response(puzzle)
    gold = join_types(puzzle.answer or ())
    cases = {
        "well-formed": response,
        "`<` in its reasoning": response.replace(" speaks", " <speaks", 1),
        "cut": response[: len(response) // 2],
    }
    rows = []
    for name, text in cases.items():
        cost = median_us(lambda text=text: score_answer(text, gold), repeats, 100)
        bound = (f"< {MICROSECONDS} us", cost < MICROSECONDS) if text == response else ("", None)
        rows.append(Row(f"score a response of {N_WORDS} words, {name}", f"{cost:,.1f} us", "", "", *bound))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if the bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=300, help="times each is measured (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    rows = measure(args.repeats)
    print(f"{software(PACKAGES)}  \n{machine()}\n\n{markdown(rows)}")
    return finish(rows, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
