"""The main job over several seeds, in one table: what holds, and what was the luck of a seed.

``for s in 1 2 3; do SEED=$s OUTPUT=outputs/seed$s bash recipe/cello1/run_grpo.sh; done`` and then
``python benchmarks/over_seeds.py outputs/seed*/summary``. Each seed has its own puzzles, traces, weights and samples;
the donors are the same. For each model and decoding the table gives the mean over the seeds with the lowest and the
highest; below it stands, for each seed, what the last stage changed on its own puzzles, with the paired 95% interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from recipe.cello1.evaluation.intervals import Estimate
from recipe.cello1.evaluation.report import ReportTable, change, label, markdown, with_interval

METRICS = ("partial_accuracy", "exact_match", "legal", "length")


def over_seeds(found: Sequence[Mapping[str, Any]]) -> list[ReportTable]:
    """Make the tables of several ``summary.json``."""
    first = found[0]
    rows = []
    stages = {name: [each["stages"][name]["metrics"] for each in found] for name in first["stages"]}
    baselines = {name: [each["baselines"][name] for each in found] for name in first["baselines"]}
    for name, metrics in {**stages, **{label(name): each for name, each in baselines.items()}}.items():
        is_model = name in stages
        rows.append([name, *(_range(key, metrics) if is_model or key != "length" else "" for key in METRICS)])
    heads = [label(key, first["length_unit"]) for key in METRICS]
    tables = [ReportTable(f"Mean of {len(found)} seeds [lowest, highest]", ["model, decoding", *heads], rows)]
    rows = []
    for name in first["differences"]:
        for number_of, each in enumerate(found, 1):
            metrics = each["differences"][name]["metrics"]
            rows.append([name, str(number_of), *(change(key, _estimate(metrics[key])) for key in METRICS[:2])])
    if rows:
        heads = ["difference", "run", *(label(key) for key in METRICS[:2])]
        tables.append(ReportTable("Paired differences, 95% intervals over puzzles", heads, rows))
    return tables


def notes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what else was measured in each run: puzzles, reward, calibration."""
    lines = [f"{', '.join(str(each['n']) for each in found)} held-out puzzles."]
    if all(each.get("training") for each in found):
        gains = [f"{each['training']['first']:+.3f} to {each['training']['last']:+.3f}" for each in found]
        lines.append(f"Mean training reward, first to last {found[0]['training']['window']} steps: {'; '.join(gains)}.")
    if all(each.get("calibration") for each in found):
        errors = ", ".join(f"{each['calibration']['ece']:.3f}" for each in found)
        lines.append(f"Expected calibration error of the last model's read-out: {errors}.")
    return lines


def _range(key: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    values = [each[key]["mean"] for each in metrics]
    return with_interval(key, Estimate(fmean(values), min(values), max(values), len(values), "range"))


def _estimate(found: Mapping[str, Any]) -> Estimate:
    """Read an estimate back; JSON has no NaN, and one without an interval holds nulls."""
    return Estimate(**{part: math.nan if value is None else value for part, value in found.items()})


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(prog="python benchmarks/over_seeds.py", description=__doc__.splitlines()[0])
    parser.add_argument("summaries", nargs="+", type=Path, help="folders of summaries, one for each seed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(arguments)
    found = []
    for folder in args.summaries:
        if not (path := folder / "summary.json").is_file():
            print(f"error: {path} does not exist; give the folders that `cello1 summary` wrote", file=sys.stderr)
            return 1
        found.append(json.loads(path.read_bytes()))
    same = [(list(each["stages"]), list(each["differences"])) for each in found]
    if odd := [str(folder) for folder, each in zip(args.summaries, same, strict=True) if each != same[0]]:
        print(f"error: {odd[0]} has other models or decodings than {args.summaries[0]}", file=sys.stderr)
        return 1
    print("\n\n".join([*(markdown(table) for table in over_seeds(found)), *notes(found)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
