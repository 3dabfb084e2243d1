"""The form of a trace that goes cell by cell: what is left, the evidence, the decision; taught, and read out again."""

from __future__ import annotations

from collections.abc import Sequence

from recipe.cello1.task.answer import THINK_CLOSE, THINK_OPEN

_OPEN, _SEPARATOR, _CLOSE = "(", " / ", ")"
DECISION = " ->"
SECOND_LINE = "\nCell 2:"  # where the line of the first cell has ended
FIXED = (f" {_OPEN}", _SEPARATOR, _CLOSE)  # tokens of their own in a tokenizer made for these traces


def trace_line(number: int, left: Sequence[str], evidence: Sequence[str], cell_type: str) -> str:
    """Write the line of one cell."""
    return f"{_beginning(number, left)} {', '.join(evidence)}{DECISION} {cell_type}"


def first_line(candidates: Sequence[str]) -> str:
    """Write what every trace of a puzzle begins with, up to the evidence for the first cell."""
    return f"{THINK_OPEN}\n{_beginning(1, candidates)}"


def first_decision(response: str) -> str:
    """Read what a response decides on for the first cell; empty where it does not get there."""
    line = response.partition(f"Cell 1: {_OPEN}")[2].partition("\n")[0]
    return line.rpartition(DECISION)[2].removesuffix(THINK_CLOSE).strip() if DECISION in line else ""


def _beginning(number: int, left: Sequence[str]) -> str:
    return f"Cell {number}: {_OPEN}{_SEPARATOR.join(left)}{_CLOSE}"
