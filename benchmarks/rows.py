"""What the benchmarks share: rows of results in one shape, and the machine and software they belong to."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the benchmarks run from a tree that is not installed

from recipe.cello1.formats.atomic import atomic_write  # noqa: E402
from recipe.cello1.formats.provenance import package_versions  # noqa: E402

FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes
    ----------
    what
        What was measured.
    ours
        The figure, with its unit, or why there is none.
    reference
        What it is compared with, measured in the same run.
    ratio
        The two in proportion.
    wanted
        The bound on the figure or the ratio.
    met
        Whether it is kept; ``None`` without a bound.
    """

    what: str
    ours: str
    reference: str = ""
    ratio: str = ""
    wanted: str = ""
    met: bool | None = None

    @property
    def failed(self) -> bool:
        """Whether there is no figure because the benchmark failed."""
        return self.ours.startswith(FAILED)


def not_run(what: str, why: str) -> Row:
    """Make the row of something that cannot be measured here."""
    return Row(what, f"not run: {why}")


def lacking(*modules: str) -> str:
    """Say which modules are not there; empty if all are."""
    absent = [name for name in modules if find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def markdown(rows: Iterable[Row], **more: Sequence[str]) -> str:
    """Write rows as a Markdown table, with further columns in front."""
    names = [field.name for field in fields(Row)]
    words = {None: "", True: "yes", False: "**no**"}
    texts = [[*astuple(row)[:-1], words[row.met]] for row in rows]
    columns = [*more.values(), *zip(*texts, strict=True)]
    lines = [[*more, *names], [*["---"] * len(more), "---", *["---:"] * 4, "---"], *zip(*columns, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finish(rows: Sequence[Row], path: Path | None) -> int:
    """Write the rows as JSON, if asked; returns the exit code: 1 if a bound is missed."""
    if path:
        atomic_write(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.met is False for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`finish` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())]


def machine() -> str:
    """Name the processor, not the host."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = match.group(1)
    return f"{name}, {len(os.sched_getaffinity(0))} logical processors, {platform.system()}"


def software(packages: Iterable[str]) -> str:
    """List the versions of Python and of packages."""
    found = {"Python": platform.python_version(), **package_versions(packages)}
    return ", ".join(f"{name} {value}" for name, value in found.items())


def median_us(function: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """Time a function: the median of ``repeats`` times of ``calls`` calls each, in microseconds a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(calls):
            function()
        times.append((time.perf_counter_ns() - start) / calls / 1000)
    return statistics.median(times)
