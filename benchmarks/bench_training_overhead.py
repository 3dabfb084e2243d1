"""What our own parts cost in a training step: reward, dataset and logging.

``python benchmarks/bench_training_overhead.py [--metrics OUTPUT/metrics]`` prints one Markdown table

- ``run_single`` of the reward manager on a response of 500 words, with its tokens decoded; with shaped terms, too
  (``bench_scoring.py`` measures the scoring in it);
- one row of the dataset; a permuted row, too;
- the means over the metrics of a step;
- writing the metrics of a step with verl's file and tensorboard loggers, which the launchers switch on;

and for each ``--batch PROMPTSxRESPONSES`` the sum for one step: that many rows, that many times the responses scored,
the means and the writing. The parts are added up as if one after the other; in training the reward runs while others
still generate, so the sum is an upper bound. With ``--metrics``, the folder of a run, it says what share of that run's
median ``timing_s/step`` the sum is (the bound is 2%); compare only the batch that the run had.

Each figure is the median of many repetitions, in microseconds of wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from bench_scoring import N_WORDS, make_puzzles, make_response
from rows import Row, finish, lacking, machine, median_us, not_run, software
from tqdm import tqdm

from recipe.cello1.formats.atomic import atomic_write
from recipe.cello1.rl.run_metrics import read_metrics
from recipe.cello1.task.answer import join_types
from recipe.cello1.task.prompt import render_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer

SHARE = 0.02  # of a step
PACKAGES = ("cello1", "verl", "torch", "transformers", "datasets", "numpy")
N_METRICS = 120  # of a step, where no run says how many: what verl logs, and the reward's
SHAPING = {"overlong": {"buffer": 600}, "reasoning": {"min_words": 100}, "candidates": {"credit": 0.1}}


def build_tokenizer(puzzles: Sequence[Puzzle], path: str | None) -> Any:
    """Load a tokenizer, or make the one of the embedded default for these puzzles."""
    if path:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    from recipe.cello1.cold_start.tiny_model import build_tokenizer

    return build_tokenizer(puzzles)


def measure_reward(tokenizer: Any, puzzle: Puzzle, repeats: int, shaping: dict[str, Any] | None) -> tuple[float, int]:
    """Time ``run_single``; returns microseconds and the tokens of the response."""
    import torch
    from omegaconf import OmegaConf

    from recipe.cello1.rl.reward_manager import PuzzleRewardManager
    from verl import DataProto

    ids = tokenizer(make_response(puzzle), add_special_tokens=False)["input_ids"]
    config = OmegaConf.create(
        {
            "cello1": {"reward": "dense", "shaping": shaping},
            "reward": {"custom_reward_function": {"path": None}},
            "data": {"max_response_length": 3000},
        }
    )
    data = DataProto.from_dict(
        tensors={"responses": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)},
        non_tensors={
            "reward_model": np.array([{"ground_truth": " | ".join(puzzle.answer or ())}], dtype=object),
            "extra_info": np.array([{"question": render_user(puzzle)}], dtype=object),
        },
    )

    async def run() -> float:
        manager = PuzzleRewardManager(config, tokenizer)
        result = await manager.run_single(data)
        if result["reward_extra_info"]["score"] != 1.0:
            msg = f"the response scores {result}; the tokenizer does not give back the text"
            raise RuntimeError(msg)
        times = []
        for _ in range(repeats):
            start = time.perf_counter_ns()
            await manager.run_single(data)
            times.append((time.perf_counter_ns() - start) / 1000)
        return statistics.median(times)

    return asyncio.run(run()), len(ids)


def measure_dataset(tokenizer: Any, puzzles: Sequence[Puzzle], repeats: int, folder: Path) -> tuple[float, float]:
    """Time one row of the dataset, as written and permuted, in microseconds."""
    from omegaconf import OmegaConf

    from recipe.cello1.formats.rl_parquet import write_rl_parquet
    from recipe.cello1.rl.dataset import PuzzleDataset

    path = folder / "train.parquet"
    write_rl_parquet(path, puzzles, "train")
    found = []
    for passes in (None, 2):
        config = OmegaConf.create(
            {
                "max_prompt_length": 100_000,
                "filter_overlong_prompts": True,
                "filter_overlong_prompts_workers": 1,
                "cache_dir": str(folder / "cache"),
                "seed": 1,
                "augmented_epochs": passes,
            }
        )
        rows = PuzzleDataset(str(path), tokenizer, config)
        items = iter(range(len(rows) - len(puzzles), len(rows)))  # the last pass
        found.append(median_us(lambda rows=rows, items=items: rows[next(items)], min(repeats, len(puzzles) - 1)))
    return found[0], found[1]


def measure_writers(metrics: Mapping[str, Any], repeats: int, folder: Path) -> float:
    """Time the writing of a step's metrics with verl's own loggers, in microseconds."""
    from verl.utils.tracking import Tracking

    places = {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "TENSORBOARD_DIR": str(folder / "tensorboard")}
    before = {name: os.environ.get(name) for name in places}
    os.environ.update(places)
    try:
        with redirect_stdout(sys.stderr):
            loggers = Tracking("cello1", "benchmark", ["file", "tensorboard"])
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    found = median_us(lambda: loggers.log(dict(metrics), step=1), repeats)
    loggers.finish()
    return found


def step_seconds(folder: Path) -> tuple[float, int]:
    """Return the median time of a step of a run, and how many steps it is the median of."""
    times = [entry["timing_s/step"] for entry in read_metrics(folder) if "timing_s/step" in entry]
    if not times:
        msg = f"--metrics: {folder} holds no step with timing_s/step; give the metrics folder of a training run"
        raise ValueError(msg)
    return statistics.median(times), len(times)


def batch(text: str) -> tuple[int, int]:
    """Read ``PROMPTSxRESPONSES``."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not PROMPTSxRESPONSES, 64x5 for example")
    return int(match.group(1)), int(match.group(2))


def run(args: argparse.Namespace) -> tuple[str, list[Row]]:
    """Measure; returns the Markdown, and the rows for :mod:`run_all`."""
    from recipe.cello1.rl.replay_buffer import mean_metrics

    step = step_seconds(args.metrics) if args.metrics else None
    puzzles = make_puzzles(args.repeats + 1)
    puzzle = puzzles[1]
    response = make_response(puzzle)
    tokenizer = build_tokenizer(puzzles[:60], args.tokenizer)
    rows: list[tuple[str, float, str]] = []
    results: list[Row] = []
    bar = tqdm(total=5 + len(args.batch), desc="measuring", unit="part", leave=False)

    gold = join_types(puzzle.answer or ())
    plain, n_tokens = measure_reward(tokenizer, puzzle, args.repeats, None)
    rows.append((f"reward manager, `run_single` on {N_WORDS} words", plain, f"{n_tokens} tokens"))
    bar.update()
    shaped, _ = measure_reward(tokenizer, puzzle, args.repeats, SHAPING)
    rows.append(("the same with all shaped terms (off by default)", shaped, f"{n_tokens} tokens"))
    bar.update()
    with tempfile.TemporaryDirectory() as folder:
        row, permuted = measure_dataset(tokenizer, puzzles, args.repeats, Path(folder))
    rows.append(("dataset, one row", row, f"{min(p.n_cells for p in puzzles)}-{max(p.n_cells for p in puzzles)} cells"))
    rows.append(("the same, permuted (off by default)", permuted, "prompt length checked"))
    bar.update(2)
    steps = read_metrics(args.metrics) if args.metrics else []
    metrics = steps[-1] if steps else {f"part/metric_{i}": i / N_METRICS for i in range(N_METRICS)}
    with tempfile.TemporaryDirectory() as folder:
        writing = measure_writers(metrics, args.repeats, Path(folder))
    rows.append(("metrics of a step to file and tensorboard", writing, f"{len(metrics)} metrics"))
    bar.update()

    for prompts, responses in args.batch:
        info = {**score_answer(response, gold).metrics(), "acc": 1.0}
        infos = [dict(info) for _ in range(prompts * responses)]
        means = median_us(lambda infos=infos: mean_metrics(infos), args.repeats)
        rows.append((f"means over {len(infos)} responses", means, f"{len(info)} metrics"))
        total = prompts * row + prompts * responses * plain + means + writing
        what, seconds = f"step of {prompts} prompts x {responses} responses", total / 1e6
        note = f"{seconds:.3f} s"
        if step:
            share, reference = seconds / step[0], f"{step[0]:.1f} s (median of {step[1]} steps)"
            note += f"; {share:.2%} of a step of {reference}"
            bound = f"< {SHARE:.0%}", share < SHARE
            results.append(Row(f"our parts in a {what}", f"{seconds:.3f} s", reference, f"{share:.2%}", *bound))
        else:
            results.append(Row(f"our parts in a {what}", f"{seconds:.3f} s", "no run's metrics given"))
        rows.append((f"**{what}**", total, note))
        bar.update()
    bar.close()

    lines = [f"{software(PACKAGES)}  ", f"{machine()}  ", f"medians of {args.repeats}", ""]
    lines += ["| part | us | |", "| :-- | --: | :-- |"]
    lines += [f"| {name} | {cost:,.1f} | {note} |" for name, cost, note in rows]
    parts = [Row(name, f"{cost:,.1f} us") for name, cost, _ in rows if not name.startswith("**")]
    return "\n".join(lines), [*parts, *results]


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--metrics", type=Path, help="metrics folder of a training run, for the share of a step")
    parser.add_argument(
        "--batch",
        type=batch,
        nargs="+",
        default=[(24, 8), (64, 5)],
        metavar="PROMPTSxRESPONSES",
        help="batch of a step (default: 24x8 of the embedded default, 64x5 as published)",
    )
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of a tokenizer (default: the one of the embedded default)"
    )
    parser.add_argument("--repeats", type=int, default=300, help="times each part is measured (default %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = build_parser().parse_args(argv)
    if why := lacking("verl", "torch", "transformers", "datasets"):
        print(f"bench_training_overhead: not run: {why}", file=sys.stderr)
        return finish([not_run("our parts in a step", why)], args.json)
    try:
        if args.repeats < 2:
            msg = f"--repeats must be at least 2, got {args.repeats}"
            raise ValueError(msg)
        table, rows = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table)
    if args.out:
        atomic_write(args.out, table + "\n")
    return finish(rows, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
