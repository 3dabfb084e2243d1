"""What our own parts cost in a training step: reward, dataset and logging.

``python benchmarks/bench_training_overhead.py [--metrics RUN/metrics]`` prints one Markdown table

- scoring a response of 500 words (well-formed; with ``<`` in its reasoning, which takes the slower path; malformed);
- ``run_single`` of the reward manager on the same response, with its tokens decoded; with shaped terms, too;
- one row of the dataset; a permuted row, too;
- the means over the metrics of a step;
- writing the metrics of a step with verl's file and tensorboard loggers, which the launchers switch on;

and for each ``--batch PROMPTSxRESPONSES`` the sum for one step: that many rows, that many times the responses scored,
the means and the writing. The parts are added up as if one after the other; in training the reward runs while others
still generate, so the sum is an upper bound. With ``--metrics``, the folder of a run, it says what share of that run's
median ``timing_s/step`` the sum is for the first batch, which must be the one that the run had.

The exit code is 1 if that share is more than 2%, or scoring the well-formed response takes more than 50 us.

Each figure is the median of many repetitions, in microseconds of wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipe.cello1.answer import format_answer
from recipe.cello1.files import atomic_write
from recipe.cello1.prompt import render_user
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.scoring import score_answer
from recipe.cello1.versions import package_versions
from recipe.cello1.watch import read_metrics

N_WORDS = 500
N_GENES = 50
PACKAGES = ("verl", "torch", "transformers", "datasets", "numpy")
MAX_SHARE = 0.02  # of a step
MAX_SCORE_US = 50.0
N_METRICS = 120  # of a step, where no run says how many: what verl logs, and the reward's
SHAPING = {"overlong": {"buffer": 600}, "reasoning": {"min_words": 100}, "candidates": {"credit": 0.1}}


def make_puzzles(number: int, sizes: Sequence[int] = (5, 8, 12)) -> list[Puzzle]:
    """Make puzzles without meaning of the usual size: 50 genes a cell."""
    rng = np.random.default_rng(0)
    genes = [f"{a}{b}{i}" for a in "ABCDEFGHIJ" for b in "KLMNOPQRST" for i in range(1, 21)]
    types = [f"{kind} cell of layer {i}" for kind in ("T", "B", "endothelial", "epithelial") for i in range(8)]
    puzzles = []
    for number_of in range(number):
        n = sizes[number_of % len(sizes)]
        cells = [[genes[i] for i in rng.choice(len(genes), N_GENES, replace=False)] for _ in range(n)]
        answer = [types[i] for i in rng.choice(len(types), n, replace=False)]
        puzzles.append(Puzzle(cells, sorted(answer), answer, "The cell is from a donor, originating from the lung."))
    return puzzles


def make_response(puzzle: Puzzle) -> str:
    """Write a right answer of 500 words, tags and separators not counted."""
    answer = puzzle.answer or ()
    words = [gene for cell in puzzle.cells for gene in (*cell, "->", "speaks", "for")]
    rest = N_WORDS - sum(len(name.split()) for name in answer)
    reasoning = " ".join((words * (rest // len(words) + 1))[:rest])
    return format_answer(answer, f"\n{reasoning}\n")


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


def build_tokenizer(puzzles: Sequence[Puzzle], path: str | None) -> Any:
    """Load a tokenizer, or make the one of the embedded default for these puzzles."""
    if path:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)
    from recipe.cello1.tiny_model import build_tokenizer

    return build_tokenizer(puzzles)


def measure_reward(tokenizer: Any, puzzle: Puzzle, repeats: int, shaping: dict[str, Any] | None) -> tuple[float, int]:
    """Time ``run_single``; returns microseconds and the tokens of the response."""
    import torch
    from omegaconf import OmegaConf

    from recipe.cello1.reward_manager import PuzzleRewardManager
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

    from recipe.cello1.dataset import PuzzleDataset
    from recipe.cello1.rl_parquet import write_rl_parquet

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


def machine() -> str:
    """Name the processor, not the host."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = match.group(1)
    return f"{name}, {os.cpu_count()} logical processors, {platform.system()}"


def versions() -> str:
    """List the versions that matter."""
    found = {"Python": platform.python_version(), **package_versions(PACKAGES)}
    return ", ".join(f"{name} {value}" for name, value in found.items())


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


def run(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Measure; returns the Markdown and the bounds that were missed."""
    from recipe.cello1.replay_buffer import mean_metrics

    step = step_seconds(args.metrics) if args.metrics else None
    puzzles = make_puzzles(args.repeats + 1)
    puzzle = puzzles[1]
    response = make_response(puzzle)
    tokenizer = build_tokenizer(puzzles[:60], args.tokenizer)
    rows: list[tuple[str, float, str]] = []
    missed = []
    bar = tqdm(total=6 + len(args.batch), desc="measuring", unit="part", leave=False)

    gold = " | ".join(puzzle.answer or ())
    slower = response.replace(" speaks", " <speaks", 1)
    for name, text in (("", response), (", `<` in its reasoning", slower), (", cut", response[: len(response) // 2])):
        cost = median_us(lambda text=text: score_answer(text, gold), args.repeats, 100)
        rows.append((f"score a response of {N_WORDS} words{name}", cost, f"{len(text)} characters"))
        if not name and cost > MAX_SCORE_US:
            missed.append(f"scoring a response takes {cost:.1f} us, more than {MAX_SCORE_US:.0f}")
    bar.update()

    plain, n_tokens = measure_reward(tokenizer, puzzle, args.repeats, None)
    rows.append(("reward manager, `run_single`", plain, f"{n_tokens} tokens"))
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

    for number, (prompts, responses) in enumerate(args.batch):
        info = {**score_answer(response, gold).metrics(), "acc": 1.0}
        infos = [dict(info) for _ in range(prompts * responses)]
        means = median_us(lambda infos=infos: mean_metrics(infos), args.repeats)
        rows.append((f"means over {len(infos)} responses", means, f"{len(info)} metrics"))
        total = prompts * row + prompts * responses * plain + means + writing
        note = f"{total / 1e6:.3f} s"
        if step and not number:
            share = total / 1e6 / step[0]
            note += f"; {share:.2%} of a step of {step[0]:.1f} s (median of {step[1]})"
            if share > MAX_SHARE:
                missed.append(f"our parts take {share:.2%} of a step, more than {MAX_SHARE:.0%}")
        rows.append((f"**step of {prompts} prompts x {responses} responses**", total, note))
        bar.update()
    bar.close()

    lines = [f"{versions()}  ", f"{machine()}  ", f"medians of {args.repeats}", ""]
    lines += ["| part | us | |", "| :-- | --: | :-- |"]
    lines += [f"| {name} | {cost:,.1f} | {note} |" for name, cost, note in rows]
    return "\n".join(lines), missed


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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = build_parser().parse_args(argv)
    try:
        if args.repeats < 2:
            msg = f"--repeats must be at least 2, got {args.repeats}"
            raise ValueError(msg)
        table, missed = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table)
    if args.out:
        atomic_write(args.out, table + "\n")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
