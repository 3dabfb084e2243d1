"""The metrics of a training run, as :mod:`recipe.cello1.launch.watch` has verl write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

REWARD = "critic/score/mean"  # verl's name for the mean reward of a step
WINDOW = 5  # steps at either end of the training that are compared


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Join the metrics of all attempts at a run."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the line a killed run was writing
            try:
                steps.setdefault(index(entry["step"]), {}).update(entry["data"])
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"metrics: {path}, line {number}: no step with its data; give verl's metrics"
                ) from None
    return [{"step": step, **steps[step]} for step in sorted(steps)]


def first_and_last(
    steps: Sequence[Mapping[str, Any]], metric: str = REWARD, window: int = WINDOW
) -> tuple[float, float, int] | None:
    """Average a metric over the first and over the last steps."""
    values = [float(step[metric]) for step in steps if isinstance(step.get(metric), int | float)]
    if not values:
        return None
    window = max(1, min(window, len(values) // 2))
    return sum(values[:window]) / window, sum(values[-window:]) / window, window
