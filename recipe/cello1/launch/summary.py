"""Compare models on held-out puzzles, before and after training.

``cello1 summary --data TEST --metrics OUTPUT/metrics --out OUTPUT/summary "before=A" "after SFT=B" "after GRPO=C"``

Writes ``summary.md``, ``summary.json`` and ``training.png``, and prints the table. What has been predicted is kept, so
that a second call only reads.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from recipe.cello1.engines.options import sampling_defaults
from recipe.cello1.engines.protocol import Decoding, EngineError, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.baseline import read_baseline
from recipe.cello1.evaluation.report import (
    LABELS,
    ReportTable,
    change,
    label,
    markdown,
    metric_table,
    print_table,
    terminal,
    with_interval,
)
from recipe.cello1.evaluation.results import Comparison, Metrics, plain
from recipe.cello1.evaluation.scores import baseline_scores, chance, difference, reference, score_predictions, summarise
from recipe.cello1.formats.atomic import atomic_write, dumps, replacing
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.model_folder import model_fingerprint
from recipe.cello1.formats.predictions import iter_predictions
from recipe.cello1.formats.provenance import digest
from recipe.cello1.formats.puzzle_files import PuzzleFile, iter_rows, load_puzzles
from recipe.cello1.formats.yaml_file import read_config
from recipe.cello1.inference.predict import predict
from recipe.cello1.rl.run_metrics import REWARD, WINDOW, first_and_last, read_metrics
from recipe.cello1.task.prompt import Layout, check_layout

_DECODINGS: dict[str, Decoding] = {"greedy": "free", "constrained": "constrained", "matrix": "matrix"}
_IN_ROWS = ("partial_accuracy", "exact_match", "legal", "length")
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
        asked = [*made_from, decoding, sampling_defaults(_DECODINGS[decoding], 0.0, None)]
        paths[decoding] = stem.with_name(f"{stem.name}-{decoding}-{digest(asked, 8)}.jsonl")
    todo = {how: path for how, path in paths.items() if not path.with_suffix(".done").exists()}
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
                decode=_DECODINGS[decoding],
            )
            if done.failed:
                worst = dict(done.errors)
                msg = f"{done.failed} of {done.total} puzzles got no answer from {model}: {worst}; run again"
                raise EngineError(msg)
            path.with_suffix(".done").touch()
    return paths


def read_training(config: str | Path) -> tuple[dict[str, int], Layout | None]:
    """Read how long prompts and responses may be in a training, and the layout: the one it was told, or its rows'."""
    from omegaconf import OmegaConf

    settings = read_config(config, "config")
    keys = {"max_tokens": "data.max_response_length", "max_model_len": "actor_rollout_ref.rollout.max_model_len"}
    limits = {name: OmegaConf.select(settings, key) for name, key in keys.items()}
    if limits["max_tokens"] is None:
        raise ValueError(f"config: {config} has no {keys['max_tokens']}; give the composed configuration of a training")
    data = settings.get("data") or {}
    layout = check_layout(data["prompt_layout"]) if data.get("prompt_layout") else None
    if layout is None and (files := data.get("train_files")):
        row: dict[str, Any] = next(iter(iter_rows(files if isinstance(files, str) else files[0])), {})
        layout = row.get("extra_info", {}).get("prompt_layout")
    return {name: value for name, value in limits.items() if value is not None}, layout


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


def row_table(
    metrics: Mapping[tuple[str, str], Metrics], differences: Mapping[tuple[str, str], Comparison], unit: str
) -> ReportTable:
    """Set models and ways of decoding below each other, then what the last training changed."""
    columns = ["model", "decoding", *(label(name, unit) for name in _IN_ROWS)]
    rows = [
        [*key, *(with_interval(name, found[name]) if name != "length" or found[name].mean else "" for name in _IN_ROWS)]
        for key, found in metrics.items()
    ]
    rows += [[*key, *(change(name, found.metrics[name]) for name in _IN_ROWS)] for key, found in differences.items()]
    return ReportTable("Held-out puzzles", columns, rows)


def _stage(text: str) -> tuple[str, str]:
    name, mark, model = text.partition("=")
    if not (name and mark and model):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=MODEL")
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
    parser.add_argument(
        "--decode", default="greedy", help=f"ways of decoding, separated by commas: {', '.join(_DECODINGS)}"
    )
    parser.add_argument(
        "--decode-first",
        help="ways of decoding for the first model, where it is not worth all of them (default: those of --decode)",
    )
    parser.add_argument("--baseline", type=Path, metavar="TRAIN", help="training puzzles of the naive Bayes baseline")
    parser.add_argument("--limit", type=int, help="only the first LIMIT puzzles")
    return parser


def _decodings(name: str, text: str) -> list[str]:
    """Read ways of decoding."""
    found = text.split(",")
    if unknown := [way for way in found if way not in _DECODINGS]:
        msg = f"{name}: unknown decoding {unknown[0]!r}; use {', '.join(_DECODINGS)}, several with commas between"
        raise ValueError(msg)
    return found


def _table(
    of_models: Mapping[tuple[str, str], Any],
    of_baselines: Mapping[str, Any],
    differences: Mapping[tuple[str, str], Any],
    unit: str,
    *,
    by_rows: bool,
) -> ReportTable:
    """Set models and baselines beside each other: a column each, or with several decodings a row each."""
    own = {label(name): found for name, found in of_baselines.items()}
    if by_rows:
        return row_table({**of_models, **{(name, ""): found for name, found in own.items()}}, differences, unit)
    columns = {name: found for (name, _), found in of_models.items()} | own
    changes = {title: found for (title, _), found in differences.items()}
    return metric_table("Held-out puzzles", columns, changes, unit)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    decodings = _decodings("decode", args.decode)
    of_first = _decodings("decode_first", args.decode_first) if args.decode_first else decodings
    limits, layout = read_training(args.config) if args.config else ({"max_tokens": MAX_TOKENS}, None)
    given = {name: getattr(args, name) for name in ("max_tokens", "max_model_len")}
    limits |= {name: value for name, value in given.items() if value is not None}
    found = load_puzzles(args.data)
    data = replace(found, puzzles=found.puzzles[: args.limit], layout=layout or found.layout)
    baseline = read_baseline(args.baseline)
    puzzles = [reference(puzzle, baseline) for puzzle in data.puzzles]
    args.out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for number, (name, model) in enumerate(args.stages):
        stem = args.out / re.sub(r"\W+", "-", name.lower())
        ways = decodings if number else of_first
        for decoding, path in answer_puzzles(model, data, stem, ways, **limits).items():
            scores[name, decoding] = score_predictions(iter_predictions(path), puzzles)

    baselines = baseline_scores(next(iter(scores.values())))
    unit = "tokens" if all(found.length_unit == "tokens" for found in scores.values()) else "words"
    of_models = {key: summarise(*found.arrays(unit)) for key, found in scores.items()}
    of_baselines = {name: summarise(*found.arrays(unit)) for name, found in baselines.items()}
    differences = {}
    names = [name for name, _ in args.stages]
    for decoding in decodings if len(names) > 1 else ():
        old, new = names[-2:]
        if (old, decoding) not in scores:
            continue
        differences[f"{new} minus {old}", decoding] = difference(
            scores[old, decoding], scores[new, decoding], other=old
        )
    table = _table(of_models, of_baselines, differences, unit, by_rows=len(decodings) > 1)

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
    calibrated = scores[names[-1], "matrix"].calibration("matrix") if (names[-1], "matrix") in scores else None
    if calibrated:
        note += f"\nProbabilities of {names[-1]}, matrix: expected calibration error {calibrated.ece:.3f} over cells."
    report: dict[str, Any] = {"n": len(puzzles), "chance": level, "training": gain, "length_unit": unit}
    title = ", ".join if len(decodings) > 1 else itemgetter(0)
    report["stages"] = {
        title(key): {"n_errors": sum(found.errors.values()), "n_missing": len(found.missing)}
        | {"metrics": plain(of_models[key])}
        for key, found in scores.items()
    }
    report |= {
        "baselines": plain(of_baselines),
        "differences": plain({title(key): found for key, found in differences.items()}),
        "calibration": plain(calibrated),
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
    how = ["--decode", "matrix"] if "matrix" in decodings else ["--samples", "8", "--temperature", "1"]
    command += [*how, "--out", "predictions.jsonl"]
    console.print(f"next:     {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
