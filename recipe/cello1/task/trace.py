"""The form of a trace that goes cell by cell: the evidence, then the decision; taught, and read out again."""

from __future__ import annotations

from collections.abc import Sequence

from recipe.cello1.task.answer import THINK_CLOSE, THINK_OPEN

DECISION = " ->"
SECOND_LINE = "\nCell 2:"  # where the line of the first cell has ended
_FIRST = "\nCell 1:"


def trace_line(number: int, evidence: Sequence[str], cell_type: str) -> str:
    """Write the line of one cell."""
    return f"Cell {number}: {', '.join(evidence)}{DECISION} {cell_type}"


def first_line() -> str:
    """Write what every trace begins with, up to the evidence for the first cell."""
    return THINK_OPEN + _FIRST


def first_decision(response: str) -> str:
    """Read what a response decides on for the first cell; empty where it does not get there."""
    line = response.partition(_FIRST.lstrip())[2].partition("\n")[0]
    return line.rpartition(DECISION)[2].removesuffix(THINK_CLOSE).strip() if DECISION in line else ""
