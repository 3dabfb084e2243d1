"""Compare models on held-out puzzles, before and after training.

``cello1 summary --data TEST --metrics OUTPUT/metrics --out OUTPUT/summary "before=A" "after SFT=B" "after GRPO=C"``

Writes ``summary.md``, ``summary.json`` and ``training.png``, and prints the table. What has been predicted is kept, so
that a second call only reads.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.cello1.engines.protocol import EngineError, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.baseline import read_baseline
from recipe.cello1.evaluation.evaluate import evaluate
from recipe.cello1.evaluation.report import LABELS, label, markdown, metric_table, print_table, terminal
from recipe.cello1.evaluation.results import plain
from recipe.cello1.evaluation.scores import baseline_scores, chance, difference, reference, score_predictions, summarise
from recipe.cello1.formats.atomic import atomic_write, dumps, replacing
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.model_folder import model_fingerprint
from recipe.cello1.formats.predictions import iter_predictions
from recipe.cello1.formats.puzzle_files import PuzzleFile, iter_rows, load_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.rl.run_metrics import REWARD, WINDOW, first_and_last, read_metrics
from recipe.cello1.task.prompt import Layout, check_layout

DECODINGS = ("greedy", "constrained")
CURVES = {REWARD: "mean reward"} | {
    f"training/reward/{name}": LABELS[name] for name in ("partial_accuracy", "exact_match", "legal")
}
MAX_TOKENS = 2048  # of a response, where nothing else is said


def answer_puzzles(
    model: str, data: PuzzleFile, stem: Path, decodings: Sequence[str], max_tokens: int, **options: Any
) -> dict[str, Path]:
    """Answer the puzzles in each way of decoding, unless that is done; return the files of predictions."""
    items = [puzzle_to_item(puzzle, data.variant) for puzzle in data.puzzles]
    made_from = [model_fingerprint(model) or model, items, data.layout, max_tokens, sorted(options.items())]
    paths = {}
    for decoding in decodings:
        key = hashlib.sha256(dumps([*made_from, decoding]).encode()).hexdigest()[:8]
        paths[decoding] = stem.with_name(f"{stem.name}-{decoding}-{key}.jsonl")
    todo = {how: path for how, path in paths.items() if not path.with_suffix(".json").exists()}
    if not todo:
        return paths
    if "constrained" in todo:
        options["constrained"] = True
    with start_engine("vllm", model, **options) as engine:
        for decoding, path in todo.items():
            done = predict(
                engine,
                data.puzzles,
                path,
                sampling=Sampling(max_tokens=max_tokens),
                layout=data.layout,
                variant=data.variant,
                decode="constrained" if decoding == "constrained" else "free",
            )
            if done.failed:
                worst = dict(done.errors)
                msg = f"{done.failed} of {done.total} puzzles got no answer from {model}: {worst}; run again"
                raise EngineError(msg)
            atomic_write(path.with_suffix(".json"), dumps(plain(evaluate(iter_predictions(path), data.puzzles)), 1))
    return paths


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


def trained_layout(config: str | Path) -> Layout | None:
    """Read in which layout a training asked: the one it was told, or that of its rows."""
    from omegaconf import OmegaConf

    data = OmegaConf.load(config).get("data") or {}
    if layout := data.get("prompt_layout"):
        return check_layout(layout)
    files = data.get("train_files") or []
    for row in iter_rows(files if isinstance(files, str) else files[0]) if files else ():
        return row.get("extra_info", {}).get("prompt_layout")
    return None


def training_gain(steps: Sequence[Mapping[str, Any]], window: int = WINDOW) -> dict[str, float] | None:
    """Compare the mean training reward of the first and the last steps."""
    if not (means := first_and_last(steps, window=window)):
        return None
    first, last, window = means
    n_steps = sum(REWARD in step for step in steps)
    return {"steps": n_steps, "window": window, "first": first, "last": last, "gain": last - first}


def plot(steps: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw reward and accuracy over the training steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, curve in CURVES.items():
        points = [(step["step"], step[key]) for step in steps if key in step]
        if points:
            axes.plot(*zip(*points, strict=True), label=curve, linewidth=2 if key == REWARD else 1)
    axes.set(xlabel="training step", ylabel="mean over the step's responses", title="Training")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


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
    parser.add_argument("--decode", default="greedy", help="ways of decoding, separated by commas: greedy, constrained")
    parser.add_argument("--baseline", type=Path, metavar="TRAIN", help="training puzzles of the naive Bayes baseline")
    parser.add_argument("--limit", type=int, help="only the first LIMIT puzzles")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    decodings = args.decode.split(",")
    if unknown := [name for name in decodings if name not in DECODINGS]:
        msg = f"--decode: unknown decoding {unknown[0]!r}; use {' or '.join(DECODINGS)}, or both with a comma"
        raise ValueError(msg)
    limits = read_limits(args.config) if args.config else {"max_tokens": MAX_TOKENS}
    given = {name: getattr(args, name) for name in ("max_tokens", "max_model_len")}
    limits |= {name: value for name, value in given.items() if value is not None}
    found = load_puzzles(args.data)
    layout = trained_layout(args.config) if args.config else None
    data = replace(found, puzzles=found.puzzles[: args.limit], layout=layout or found.layout)
    baseline = read_baseline(args.baseline)
    puzzles = [reference(puzzle, baseline) for puzzle in data.puzzles]
    args.out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for name, model in args.stages:
        stem = args.out / re.sub(r"\W+", "-", name.lower())
        for decoding, path in answer_puzzles(model, data, stem, decodings, **limits).items():
            scores[name, decoding] = score_predictions(iter_predictions(path), puzzles)

    def column(name: str, decoding: str) -> str:
        return name if len(decodings) == 1 else f"{name}, {decoding}"

    baselines = baseline_scores(next(iter(scores.values())))
    runs = {column(*key): found for key, found in scores.items()}
    runs |= {label(name): found for name, found in baselines.items()}
    unit = "tokens" if all(found.length_unit == "tokens" for found in runs.values()) else "words"
    metrics = {name: summarise(*found.arrays(unit)) for name, found in runs.items()}
    differences = {}
    names = [name for name, _ in args.stages]
    for decoding in decodings if len(names) > 1 else ():
        old, new = names[-2:]
        title = f"{column(new, decoding)} minus {old}"
        differences[title] = difference(scores[old, decoding], scores[new, decoding], other=old)
    table = metric_table("Held-out puzzles", metrics, differences, unit)

    steps = read_metrics(args.metrics)
    gain = training_gain(steps)
    level = chance(next(iter(scores.values())).answers)
    note = f"{len(puzzles)} held-out puzzles, {' and '.join(decodings)}, 95% intervals."
    if level is not None:
        note += f" A random legal answer has a partial accuracy of {level:.3f}."
    if gain:
        plot(steps, args.out / "training.png")
        note += (
            f"\nMean training reward: {gain['first']:+.3f} over the first {gain['window']} of {gain['steps']} steps, "
            f"{gain['last']:+.3f} over the last {gain['window']} (gain {gain['gain']:+.3f})."
        )
    report: dict[str, Any] = {"n": len(puzzles), "chance": level, "training": gain, "length_unit": unit}
    kept = {label(name) for name in baselines}
    report["stages"] = {
        name: {"n_errors": sum(found.errors.values()), "n_missing": len(found.missing), "metrics": plain(metrics[name])}
        for name, found in runs.items()
        if name not in kept
    }
    report |= {
        "baselines": {name: plain(metrics[label(name)]) for name in baselines},
        "differences": plain(differences),
    }
    atomic_write(args.out / "summary.json", dumps(report, indent=1))
    atomic_write(args.out / "summary.md", f"{markdown(table)}\n\n{note}\n")

    console = terminal()
    print_table(console, table)
    console.print(note, soft_wrap=True, highlight=False, markup=False)
    model = args.stages[-1][1]
    console.print(f"model:    {model}\nresults:  {args.out}", soft_wrap=True, highlight=False, markup=False)
    if data.layout != found.layout:  # predict asks as the rows say
        return
    command = ["python", "-m", "recipe.cello1", "predict", "--model", model, "--data", args.data]
    command += ["--samples", "8", "--temperature", "1", "--out", "samples.jsonl"]
    console.print(f"next:     {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
