"""What each way of decoding makes of a model: one answer, several combined, and read-outs, side by side.

``python benchmarks/bench_voting.py --model MODEL --data TEST --baseline TRAIN`` answers the puzzles in every way in one
start of the engine, and prints a table as Markdown: the metrics of each way with 95% intervals, the tokens that a
puzzle takes, the expected calibration error (10 bins) where the way gives probabilities, and by how much the read-out
of its default (``predict --decode matrix``) is better on the same puzzles. Predictions and table are kept in
``--out``; a second call goes on from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipe.cello1.engines.options import SAMPLES
from recipe.cello1.engines.protocol import EngineError, Sampling
from recipe.cello1.engines.start import ENGINES, start_engine
from recipe.cello1.evaluation.baseline import read_baseline
from recipe.cello1.evaluation.report import markdown, ways_table
from recipe.cello1.evaluation.results import plain
from recipe.cello1.evaluation.scores import Scores, baseline_scores, chance, reference, score_predictions
from recipe.cello1.evaluation.voting_rules import BEST, CONSENSUS, ONE_SAMPLE, combine, side_by_side
from recipe.cello1.formats.atomic import atomic_write, dumps
from recipe.cello1.formats.predictions import iter_predictions
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.prompt import LAYOUTS

MATRIX = f"matrix, {SAMPLES} orders"


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(prog="python benchmarks/bench_voting.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--baseline", type=Path, metavar="TRAIN", help="training puzzles of the naive Bayes baseline")
    parser.add_argument("--out", type=Path, default=Path("outputs/voting"), help="folder (default outputs/voting)")
    parser.add_argument("--engine", default="vllm", choices=sorted(set(ENGINES) - {"openai"}))
    parser.add_argument("--samples", type=int, default=8, help="of consensus and soft votes (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="longest answer (default 512; published models: 3500)"
    )
    parser.add_argument("--prompt-layout", choices=LAYOUTS, help="default: the one that the data name, else system")
    parser.add_argument("--limit", type=int, help="only the first LIMIT puzzles")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def runs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """List what is predicted: its name, which is that of its file, and how."""
    greedy = Sampling(max_tokens=args.max_tokens)
    hot = Sampling(args.temperature, max_tokens=args.max_tokens)
    sampled = Sampling(args.temperature, max_tokens=args.max_tokens, logprobs=True)
    yield "free, greedy", {"sampling": greedy, "decode": "free"}
    yield "constrained, greedy", {"sampling": greedy, "decode": "constrained"}
    yield ONE_SAMPLE, {"sampling": sampled, "samples": args.samples, "decode": "free"}
    yield f"soft votes of {args.samples}", {"sampling": hot, "samples": args.samples, "decode": "soft"}
    yield "matrix, 1 order", {"sampling": greedy, "samples": 1, "decode": "matrix"}
    yield MATRIX, {"sampling": greedy, "samples": SAMPLES, "decode": "matrix"}


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Predict and compare; returns the table and everything found."""
    if args.samples < 2:
        msg = f"--samples must be at least 2, got {args.samples}; a consensus needs several answers"
        raise ValueError(msg)
    data = load_puzzles(args.data, layout=args.prompt_layout)
    puzzles = data.puzzles[: args.limit]
    how = {"layout": data.layout, "variant": data.variant, "seed": args.seed}
    files = {}
    with start_engine(args.engine, args.model, constrained=True) as engine:
        for name, options in runs(args):
            files[name] = args.out / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"
            done = predict(engine, puzzles, files[name], **how, **options)
            if done.failed:
                msg = f"{name}: {done.failed} answers failed ({next(iter(done.errors))}); run the same command again"
                raise EngineError(msg)
    baseline = read_baseline(args.baseline)
    known = [reference(puzzle, baseline) for puzzle in puzzles]
    ways: dict[str, Scores] = {}
    for name, file in files.items():
        found = score_predictions(iter_predictions(file), known)
        if name != ONE_SAMPLE:
            ways[name] = found
            continue
        rules = combine(found)
        ways |= {ONE_SAMPLE: rules[ONE_SAMPLE], f"consensus of {args.samples}": rules[CONSENSUS], BEST: rules[BEST]}
    ways[BEST] = ways.pop(BEST)  # last but for the baselines
    ways |= baseline_scores(ways[MATRIX])
    compared = side_by_side(ways, MATRIX, seed=args.seed)
    level = chance(ways[MATRIX].answers)
    table = markdown(ways_table("", compared, MATRIX, "tokens"))
    note = f"{len(puzzles)} puzzles, samples at temperature {args.temperature:g}, seed {args.seed}."
    if level is not None:
        note += f" A random legal answer has a partial accuracy of {level:.3f}."
    return f"{table}\n\n{note}\n", {"n": len(puzzles), "chance": level, "ways": plain(compared)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    try:
        text, found = measure(args)
    except (ValueError, OSError, EngineError) as error:
        print(f"bench_voting: {error}", file=sys.stderr)
        return 2
    atomic_write(args.out / "voting.json", dumps(found, 2) + "\n")
    atomic_write(args.out / "voting.md", text)
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
