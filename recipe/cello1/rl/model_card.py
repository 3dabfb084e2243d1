"""The README of an exported model: where it comes from and what was measured in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import sha256
from recipe.cello1.formats.provenance import package_versions
from recipe.cello1.rl.run_metrics import REWARD, first_and_last

# verl's metric, and how the card calls it.
_METRICS = (
    (REWARD, "reward"),
    ("training/reward/partial_accuracy", "partial accuracy"),
    ("training/reward/exact_match", "exact match"),
    ("training/reward/format_validity", "format validity"),
    ("response_length/mean", "response length (tokens)"),
)


def _source(model: str) -> str:
    """Name a model by its Hub id, or by the last parts of its path: a card is made to be shared."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _files(paths: str | Sequence[str]) -> list[str]:
    lines = []
    for path in [paths] if isinstance(paths, str) else paths:
        digest = sha256(path) if Path(path).is_file() else "not found"
        lines.append(f"| data | `{Path(path).name}`, sha256 `{digest}` |")
    return lines


def model_card(config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], step: int, difference: float) -> str:
    """Write the card."""
    base = _source(config["actor_rollout_ref"]["model"]["path"]) if config else ""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags: [single-cell, cell-type-annotation, cell-o1, verl]"]
    head += [f"base_model: {base}"] if base else []
    lines = [*head, "---", "", "# A Cell-o1 model", ""]
    lines += ["Matches cells, given as their top-expressed genes, with cell types, and gives its reasoning.", ""]
    lines += ["| | |", "| --- | --- |"]
    if config:
        lines += [f"| trained from | `{base}` |", f"| algorithm | {config['algorithm']['adv_estimator']} |"]
        lines += [f"| reward | {config['cello1']['reward']} |", f"| seed | {config['data']['seed']} |"]
        lines += [f"| prompt layout | {config['data']['prompt_layout'] or 'as written in the data'} |"]
        lines += _files(config["data"]["train_files"])
    lines += [f"| training step | {step} |"]
    software = ", ".join(f"{name} {found}" for name, found in package_versions(("cello1", "verl")).items())
    lines += [f"| software | {software} |"]
    lines += [f"| check | logits differ from those of the sharded weights by {difference:.1e} of their norm |", ""]
    rows = []
    for key, label in _METRICS:
        if means := first_and_last([entry for entry in steps if entry["step"] <= step], key):
            first, last, n = means
            rows.append(f"| {label}, {n} steps | {first:.3f} | {last:.3f} |")
    if rows:
        lines += ["| in training, mean over | at its beginning | at its end |", "| --- | --- | --- |"]
        lines += [*rows, ""]
    lines += [
        "The licence of the base model applies to these weights. Annotations are predictions, to be checked by someone",
        "who knows the tissue; the model is not made for clinical use.",
        "",
    ]
    return "\n".join(lines)
