"""Score predictions: the paper's metrics with intervals, slices and comparisons.

What counts is decided in ``scores``; this module puts everything together.

    python -m recipe.cello1 evaluate predictions.jsonl --data test.json --baseline train.json --html report.html
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.engines.protocol import Engine
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.baseline import NaiveBayes, read_baseline
from recipe.cello1.evaluation.html_page import to_html
from recipe.cello1.evaluation.intervals import share
from recipe.cello1.evaluation.open_ended import by_judge, by_ontology
from recipe.cello1.evaluation.report import render, to_markdown
from recipe.cello1.evaluation.results import Evaluation, Measured, Metrics, Pair, plain
from recipe.cello1.evaluation.scores import (
    SLICES,
    Reference,
    Scored,
    Scores,
    baseline_scores,
    chance,
    compare,
    difference,
    reference,
    score_predictions,
    summarise,
)
from recipe.cello1.evaluation.voting_rules import CONSENSUS, combine, side_by_side
from recipe.cello1.formats.atomic import atomic_write, check_place, dumps
from recipe.cello1.formats.predictions import iter_predictions
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.vote import add_weighted
from recipe.cello1.task.answer import Reason
from recipe.cello1.task.ontology import CellOntology, load_ontology
from recipe.cello1.task.prompt import VARIANTS
from recipe.cello1.task.puzzle import Puzzle

NO_ANSWER = "(no answer)"


def evaluate(
    records: Iterable[Mapping[str, Any]],
    puzzles: Sequence[Puzzle | Reference] | None = None,
    *,
    greedy: Iterable[Mapping[str, Any]] | None = None,
    baseline: NaiveBayes | None = None,
    ontology: CellOntology | None = None,
    judge: Engine | None = None,
    weighted: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate predictions.

    Parameters
    ----------
    records
        Prediction and error records; read once, none is kept.
    puzzles
        The data set, for the gold; without it, the items that the records repeat.
    greedy
        Greedy predictions for the same puzzles, to stand beside the rules that combine several answers.
    baseline
        What solves the same puzzles without a language model, to stand beside the answers in every table: a
        ``NaiveBayes`` of ``evaluation.baseline``.
    ontology, judge
        To score open-ended answers by what they mean.
    weighted
        Whether the consensus weighs answers by log-probability; by default where every prediction has it.
    seed
        Seed of the bootstrap.

    Returns
    -------
    Everything found, see ``results.Evaluation``; ``results.plain`` makes values for JSON of it.

    Raises
    ------
    ValueError
        If nothing can be scored, or a record cannot.
    """
    scores = score_predictions(records, puzzles, baseline)
    n_errors = sum(scores.errors.values())
    if not scores.answers:
        worst = next(iter(scores.errors), "")
        msg = f"there is no prediction to score, only {n_errors} failures of the machinery ({worst}); predict again"
        raise ValueError(msg)
    others = baseline_scores(scores)
    rivals = {} if greedy is None else {"greedy": score_predictions(greedy, puzzles)}
    combined = combine(scores, weighted=weighted)
    rules = side_by_side({**rivals, **others, **combined}, CONSENSUS, seed=seed) if combined else {}
    illegal = Counter(str(answer.score.reason) for answer in scores.answers if answer.score.reason)
    pairs = _pairs(scores.answers)
    unit = scores.length_unit
    counts, edges = np.histogram([getattr(answer, unit) for answer in scores.answers], bins=20)
    return Evaluation(
        n=len({answer.index for answer in scores.answers}),
        n_answers=len(scores.answers),
        n_errors=n_errors,
        errors=scores.errors,
        missing=scores.missing,
        measured=_measure(scores, seed=seed),
        chance=chance(scores.answers),
        illegal={str(reason): illegal[reason] for reason in Reason if illegal[reason]},
        outside_candidates=sum(answer.score.in_candidates is False for answer in scores.answers),
        length_unit=unit,
        seed=seed,
        run=scores.run,
        confusion=[Pair(*key, count) for key, count in sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))],
        lengths={"edges": edges.tolist(), "counts": counts.tolist()},
        examples=scores.examples,
        baselines={name: _measure(other, seed=seed) for name, other in others.items()},
        over_baselines={name: difference(other, scores, other=name, seed=seed) for name, other in others.items()},
        rules=rules,
        calibration=scores.calibration() or (rules[CONSENSUS].calibration if rules else None),
        cost=scores.cost(),
        ontology=by_ontology(scores.answers, ontology, seed=seed) if ontology else None,
        judge=by_judge(scores.answers, judge, seed=seed) if judge else None,
    )


def _measure(scores: Scores, *, seed: int = 0) -> Measured:
    """Compute the metrics of scored answers: all together, by property of the puzzle, and by gold type."""
    puzzles = [group[0].puzzle for group in scores.groups().values()]
    values, n_cells = scores.arrays()
    slices: dict[str, dict[str, Metrics]] = {}
    for j, key in enumerate(SLICES):
        rows: dict[Any, list[int]] = {}
        for i, puzzle in enumerate(puzzles):
            rows.setdefault("" if puzzle.slices[j] is None else puzzle.slices[j], []).append(i)
        if set(rows) != {""}:
            ordered = sorted(rows) if key == "n_cells" else sorted(rows, key=str)
            slices[key] = {
                str(value) or "(unknown)": summarise(values[rows[value]], n_cells[rows[value]], seed=seed)
                for value in ordered
            }
    pairs = _pairs(scores.answers)
    totals: Counter[str] = Counter()
    for (gold, _), count in pairs.items():
        totals[gold] += count
    types = {name: share(pairs[name, name], totals[name]) for name in sorted(totals)}
    return Measured(summarise(values, n_cells, seed=seed), slices, types)


def _pairs(answers: Sequence[Scored]) -> Counter[tuple[str, str]]:
    """Count for each gold type what was answered, position by position as for the partial accuracy."""
    pairs: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        gold, items = answer.puzzle.answer, answer.score.items
        known = {name.lower(): name for name in (*(answer.puzzle.candidates or ()), *gold)}
        given = [known.get(item.lower(), item) for item in items] if len(items) <= len(gold) else []
        pairs.update(zip(gold, [*given, *[NO_ANSWER] * (len(gold) - len(given))], strict=True))
    return pairs


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description="Score predictions, with intervals and slices.")
    parser.add_argument("predictions", type=Path, help=".jsonl, .json, or a folder of <index>.json (published layout)")
    parser.add_argument("--data", type=Path, help="data set with the gold answers; default: those in the records")
    parser.add_argument(
        "--variant", choices=sorted(VARIANTS), help="task variant; default: the one that RL data names, else batch"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="TRAIN",
        help="compare with naive Bayes fitted on these training puzzles",
    )
    parser.add_argument("--greedy", type=Path, help="greedy predictions, to set beside several answers combined")
    add_weighted(parser)
    parser.add_argument("--ontology", action="store_true", help="relate the types to the gold by the Cell Ontology")
    parser.add_argument("--judge", metavar="MODEL", help="have this model relate the types to the gold")
    parser.add_argument("--judge-url", help="its OpenAI-compatible API; default: OPENAI_BASE_URL")
    parser.add_argument("--compare", type=Path, help="predictions of another run on the same data to compare with")
    parser.add_argument("--out", type=Path, help="write everything as JSON here")
    parser.add_argument("--markdown", type=Path, help="write the report as Markdown here")
    parser.add_argument("--html", type=Path, help="write the report as one self-contained HTML page here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for name in ("out", "markdown", "html"):
        if path := getattr(args, name):
            check_place(path, name)
    baseline = read_baseline(args.baseline)
    puzzles: list[Any] | None = None
    if args.data:
        puzzles = load_puzzles(args.data, args.variant, keep=lambda puzzle: reference(puzzle, baseline)).puzzles
    with ExitStack() as stack:
        judge = None
        if args.judge:
            judge = stack.enter_context(start_engine("openai", args.judge, base_url=args.judge_url))
        result = evaluate(
            iter_predictions(args.predictions),
            puzzles,
            greedy=iter_predictions(args.greedy) if args.greedy else None,
            baseline=baseline,
            ontology=load_ontology() if args.ontology else None,
            judge=judge,
            weighted=args.weighted,
            seed=args.seed,
        )
    if args.compare:
        runs = iter_predictions(args.compare), iter_predictions(args.predictions)
        result = replace(result, comparison=compare(*runs, puzzles, other=str(args.compare), seed=args.seed))
    render(result)
    outputs = (
        (args.out, lambda: dumps(plain(result), 2) + "\n"),
        (args.markdown, lambda: to_markdown(result)),
        (args.html, lambda: to_html(result)),
    )
    for path, content in outputs:
        if path:
            atomic_write(path, content())
            print(f"written: {path}")
