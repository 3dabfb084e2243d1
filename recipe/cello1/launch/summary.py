"""Compare models on held-out puzzles, before and after training.

``python -m recipe.cello1 summary --data test.json --metrics OUTPUT/metrics --out OUTPUT/summary "before=A" "after=B"``

Writes ``summary.md``, ``summary.json`` and ``training.png``, and prints the table. What has been predicted is kept, so
that a second call only reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.engines.protocol import EngineError, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.evaluate import evaluate
from recipe.cello1.evaluation.report import METRICS, Table, print_table, terminal, with_interval
from recipe.cello1.formats.atomic import atomic_write, dumps, replacing
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.model_folder import model_fingerprint
from recipe.cello1.formats.predictions import read_predictions
from recipe.cello1.formats.puzzle_files import PuzzleFile, load_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.rl.run_metrics import REWARD, WINDOW, first_and_last, read_metrics
from recipe.cello1.task.puzzle import Puzzle

ROWS = {name: label for name, label in METRICS.items() if name != "cell_accuracy_micro"} | {"length": "mean length"}
CURVES = {
    REWARD: "mean reward",
    "training/reward/cell_accuracy": "cell accuracy",
    "training/reward/format_valid": "format validity",
    "training/reward/unique": "no type twice",
}
MAX_TOKENS = 2048  # of a response, where nothing else is said


def evaluate_model(model: str, data: PuzzleFile, stem: Path, max_tokens: int, **options: Any) -> dict[str, Any]:
    """Answer the puzzles greedily and score the answers."""
    items = [puzzle_to_item(puzzle, data.variant) for puzzle in data.puzzles]
    made_from = dumps([model_fingerprint(model) or model, items, data.layout, max_tokens, sorted(options.items())])
    key = hashlib.sha256(made_from.encode()).hexdigest()[:8]
    result, predictions = (stem.with_name(f"{stem.name}-{key}.{suffix}") for suffix in ("json", "jsonl"))
    if result.exists():
        return json.loads(result.read_text())
    with start_engine("vllm", model, **options) as engine:
        done = predict(
            engine,
            data.puzzles,
            predictions,
            sampling=Sampling(max_tokens=max_tokens),
            layout=data.layout,
            variant=data.variant,
        )
    if done.failed:
        msg = f"{done.failed} of {done.total} puzzles got no answer from {model}: {dict(done.errors)}; run again"
        raise EngineError(msg)
    evaluation = evaluate(read_predictions(predictions), data.puzzles)
    atomic_write(result, dumps(evaluation, indent=1))
    return evaluation


def read_limits(config: str | Path) -> dict[str, int]:
    """Read how long prompts and responses may be in a training."""
    from omegaconf import OmegaConf

    settings = OmegaConf.load(config)
    keys = {"max_tokens": "data.max_response_length", "max_model_len": "actor_rollout_ref.rollout.max_model_len"}
    limits = {name: OmegaConf.select(settings, key) for name, key in keys.items()}
    if limits["max_tokens"] is None:
        msg = f"--config: {config} has no {keys['max_tokens']}; give the composed configuration of a training"
        raise ValueError(msg)
    return {name: value for name, value in limits.items() if value is not None}


def training_gain(steps: Sequence[Mapping[str, Any]], window: int = WINDOW) -> dict[str, float] | None:
    """Compare the mean training reward of the first and the last steps."""
    if not (means := first_and_last(steps, window=window)):
        return None
    first, last, window = means
    n_steps = sum(REWARD in step for step in steps)
    return {"steps": n_steps, "window": window, "first": first, "last": last, "gain": last - first}


def chance(puzzles: Sequence[Puzzle]) -> float:
    """Return the cell accuracy of a random legal answer: the mean of 1/N."""
    return float(np.mean([1 / puzzle.n_cells for puzzle in puzzles]))


def plot(steps: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw reward and accuracy over the training steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in CURVES.items():
        points = [(step["step"], step[key]) for step in steps if key in step]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=2 if key == REWARD else 1)
    axes.set(xlabel="training step", ylabel="mean over the step's responses", title="Training")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def as_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Lay the evaluations out as a table."""
    unit = next(iter(evaluations.values()))["length_unit"]
    names = {**ROWS, "length": f"{ROWS['length']} ({unit})"}
    return [
        [names[key], *(with_interval(key, evaluation["metrics"][key]) for evaluation in evaluations.values())]
        for key in ROWS
    ]


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _stage(text: str) -> tuple[str, str]:
    name, mark, model = text.partition("=")
    if not (name and mark and model):
        msg = f"{text!r} must be NAME=MODEL"
        raise argparse.ArgumentTypeError(msg)
    return name, model


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="+", type=_stage, metavar="NAME=MODEL", help="models in the order of the table")
    parser.add_argument("--data", required=True, help="held-out puzzles: JSON, JSONL or RL parquet")
    parser.add_argument("--metrics", required=True, help="folder with the metrics of the training")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--config", help="composed configuration of the training, whose limits of length hold here too")
    parser.add_argument("--max-tokens", type=int, help=f"longest response (without --config {MAX_TOKENS})")
    parser.add_argument("--max-model-len", type=int, help="longest prompt and response together, in tokens")
    parser.add_argument("--limit", type=int, help="only the first LIMIT puzzles")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    limits = read_limits(args.config) if args.config else {"max_tokens": MAX_TOKENS}
    given = {name: getattr(args, name) for name in ("max_tokens", "max_model_len")}
    limits |= {name: value for name, value in given.items() if value is not None}
    data = load_puzzles(args.data)
    data = replace(data, puzzles=data.puzzles[: args.limit])
    puzzles = data.puzzles
    args.out.mkdir(parents=True, exist_ok=True)
    evaluations = {}
    for name, model in args.stages:
        stem = args.out / re.sub(r"\W+", "-", name.lower())
        evaluations[name] = evaluate_model(model, data, stem, **limits)
    steps = read_metrics(args.metrics)

    gain = training_gain(steps)
    heading = ["", *evaluations]
    rows = as_rows(evaluations)
    note = (
        f"{len(puzzles)} held-out puzzles, greedy, 95% intervals. "
        f"A random legal answer has a cell accuracy of {chance(puzzles):.3f}."
    )
    if gain:
        plot(steps, args.out / "training.png")
        note += (
            f"\nMean training reward: {gain['first']:+.3f} over the first {gain['window']} of {gain['steps']} steps, "
            f"{gain['last']:+.3f} over the last {gain['window']} (gain {gain['gain']:+.3f})."
        )
    report = {"n": len(puzzles), "chance": chance(puzzles), "training": gain, "stages": evaluations}
    atomic_write(args.out / "summary.json", dumps(report, indent=1))
    atomic_write(args.out / "summary.md", f"{_markdown(heading, rows)}\n\n{note}\n")

    console = terminal()
    print_table(console, Table("Held-out puzzles", heading, rows))
    console.print(note, soft_wrap=True)
    console.print(f"model:    {args.stages[-1][1]}\nresults:  {args.out}", soft_wrap=True)
    command = [
        "python",
        "-m",
        "recipe.cello1",
        "predict",
        "--model",
        args.stages[-1][1],
        "--data",
        args.data,
    ]
    command += ["--samples", "8", "--temperature", "1", "--out", "samples.jsonl"]
    console.print(f"next:     {shlex.join(command)}", soft_wrap=True)
