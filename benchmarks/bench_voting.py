"""What several answers to each puzzle are worth: greedy, majority, medoid and consensus side by side.

``python benchmarks/bench_voting.py --model MODEL --data TEST`` answers the puzzles greedily and with 8 samples each,
in one start of vLLM, and prints the table of :mod:`recipe.cello1.evaluation.voting_rules`: the metrics of each rule
with 95% intervals, and by how much the consensus is better on the same puzzles. Predictions and evaluation are kept
in ``--out``; a second call goes on from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe.cello1.engines.protocol import EngineError, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.evaluate import evaluate
from recipe.cello1.evaluation.report import rules_markdown
from recipe.cello1.evaluation.results import plain
from recipe.cello1.formats.atomic import atomic_write, dumps
from recipe.cello1.formats.predictions import read_predictions
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.prompt import LAYOUTS


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(prog="python benchmarks/bench_voting.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("outputs/voting"), help="folder (default outputs/voting)")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="longest answer (default 512; published models: 3500)"
    )
    parser.add_argument("--prompt-layout", choices=LAYOUTS, help="default: the one that the data name, else system")
    parser.add_argument("--limit", type=int, help="only the first LIMIT puzzles")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    greedy, sampled = args.out / "greedy.jsonl", args.out / "samples.jsonl"
    try:
        data = load_puzzles(args.data, layout=args.prompt_layout)
        puzzles = data.puzzles[: args.limit]
        asked = {"layout": data.layout, "variant": data.variant}
        with start_engine("vllm", args.model) as engine:
            runs = [
                predict(engine, puzzles, greedy, sampling=Sampling(max_tokens=args.max_tokens), **asked),
                predict(
                    engine,
                    puzzles,
                    sampled,
                    sampling=Sampling(args.temperature, max_tokens=args.max_tokens, logprobs=True),
                    samples=args.samples,
                    seed=args.seed,
                    **asked,
                ),
            ]
        if failed := sum(run.failed for run in runs):
            print(f"bench_voting: {failed} answers failed; the same command tries them again", file=sys.stderr)
            return 1
        result = evaluate(read_predictions(sampled), puzzles, greedy=read_predictions(greedy))
    except (ValueError, OSError, EngineError) as error:
        print(f"bench_voting: {error}", file=sys.stderr)
        return 2
    if not result.rules:
        print("bench_voting: no puzzle has several answers to combine; raise --samples", file=sys.stderr)
        return 2
    atomic_write(args.out / "voting.json", dumps(plain(result), 2) + "\n")
    print(f"\n{len(puzzles)} puzzles, {args.samples} samples at temperature {args.temperature:g}\n")
    print(rules_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
