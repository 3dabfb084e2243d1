"""The metrics of a training run, as :mod:`recipe.cello1.launch.watch` has verl write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REWARD = "critic/score/mean"  # verl's name for the mean reward of a step
WINDOW = 5  # steps at either end of the training that are compared


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Join the metrics of all attempts at a run."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line a killed run was writing
            steps.setdefault(entry["step"], {}).update(entry["data"])
    return [{"step": step, **steps[step]} for step in sorted(steps)]


def first_and_last(
    steps: Sequence[Mapping[str, Any]], metric: str = REWARD, window: int = WINDOW
) -> tuple[float, float, int] | None:
    """Average a metric over the first and over the last steps."""
    values = [float(step[metric]) for step in steps if metric in step]
    if not values:
        return None
    window = max(1, min(window, len(values) // 2))
    return sum(values[:window]) / window, sum(values[-window:]) / window, window
