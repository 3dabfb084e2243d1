"""Score predictions: the paper's metrics with intervals, slices and comparisons.

What counts is decided in ``scores``; this module puts everything together.

    python -m recipe.cello1 evaluate predictions.jsonl --data test.json --out metrics.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.engines.protocol import Engine
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.html_page import to_html
from recipe.cello1.evaluation.intervals import LEVEL, Estimate, mcnemar, paired_difference, wilson
from recipe.cello1.evaluation.open_ended import by_judge, by_ontology
from recipe.cello1.evaluation.report import render, to_markdown
from recipe.cello1.evaluation.scores import MEASURED, Scored, means, per_puzzle, score_predictions, summarise
from recipe.cello1.evaluation.voting_rules import compare_rules
from recipe.cello1.formats.atomic import atomic_write, dumps
from recipe.cello1.formats.items import USER_KEYS
from recipe.cello1.formats.predictions import RUN_KEYS, read_predictions
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.vote import add_weighted
from recipe.cello1.task.answer import Reason
from recipe.cello1.task.ontology import CellOntology, load_ontology
from recipe.cello1.task.prompt import VARIANTS
from recipe.cello1.task.puzzle import Puzzle

SLICES = ("n_cells", "tissue", "dataset", "disease", "donor_id")
NO_ANSWER = "(no legal answer)"
_EXAMPLES = {"right": 3, "wrong": 3, "illegal": 2}
_SHOWN = 4000  # characters of an example


def evaluate(
    records: Iterable[Mapping[str, Any]],
    puzzles: Sequence[Puzzle] | None = None,
    *,
    greedy: Iterable[Mapping[str, Any]] | None = None,
    ontology: CellOntology | None = None,
    judge: Engine | None = None,
    weighted: bool | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate predictions.

    Parameters
    ----------
    records
        Prediction and error records.
    puzzles
        The data set; see ``scores.score_predictions``.
    greedy
        Greedy predictions for the same puzzles, to stand beside the rules that combine several answers.
    ontology, judge
        To score open-ended answers by what they mean.
    weighted
        Whether the consensus weighs answers by log-probability; see ``voting_rules.compare_rules``.
    seed
        Seed of the bootstrap.

    Returns
    -------
    Plain values for JSON:

    - ``n`` (puzzles scored), ``n_answers``, ``n_errors``, ``n_missing``, ``errors``, ``missing``
    - ``metrics`` (name -> mean, low, high, n, method), ``length_unit``, ``level``, ``seed``
    - ``illegal`` (reason -> count), ``outside_candidates`` (answers naming a type not offered, where that is known)
    - ``slices`` (key -> value -> metrics), ``types`` (type -> n, accuracy, low, high), ``confusion`` (gold, predicted,
      count; most frequent first)
    - with several answers to a puzzle: what ``voting_rules.compare_rules`` returns
    - ``ontology`` and ``judge`` (see ``open_ended``) if asked for
    - ``lengths`` (histogram: edges, counts), ``examples``, ``run`` (engine, model, sampling, layout)

    Raises
    ------
    ValueError
        If nothing can be scored, or a record cannot.
    """
    scores = score_predictions(records, puzzles)
    answers = scores.answers
    n_errors = sum(scores.errors.values())
    if not answers:
        worst = next(iter(scores.errors), "")
        msg = f"there is no prediction to score, only {n_errors} failures of the machinery ({worst}); predict again"
        raise ValueError(msg)
    illegal = Counter(str(answer.score.reason) for answer in answers if answer.score.reason)
    types, confusion = _confusion(answers)
    result = {
        "n": len({answer.index for answer in answers}),
        "n_answers": len(answers),
        "n_errors": n_errors,
        "n_missing": len(scores.missing),
        "metrics": _plain(summarise(answers, seed=seed)),
        "illegal": {str(reason): illegal[reason] for reason in Reason if illegal[reason]},
        "outside_candidates": sum(answer.score.in_candidates is False for answer in answers),
        "errors": dict(scores.errors),
        "missing": list(scores.missing),
        "length_unit": scores.length_unit,
        "level": LEVEL,
        "seed": seed,
        "run": _run_of(answers),
        "slices": {key: found for key in SLICES if (found := _slices(answers, key, puzzles, seed))},
        "types": types,
        "confusion": confusion,
        "lengths": _histogram([answer.length for answer in answers]),
        "examples": _examples(answers),
    }
    rivals = None if greedy is None else score_predictions(greedy, puzzles).answers
    result |= compare_rules(answers, rivals, weighted=weighted, seed=seed)
    if ontology is not None:
        result["ontology"] = by_ontology(answers, ontology, seed=seed)
    if judge is not None:
        result["judge"] = by_judge(answers, judge, seed=seed)
    return result


def _plain(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: found.as_dict() for name, found in metrics.items()}


def _run_of(answers: Sequence[Scored]) -> dict[str, Any]:
    """Return the settings that all records share."""
    keys = (*RUN_KEYS, "rule")
    first = answers[0].record
    return {key: first[key] for key in keys if key in first and all(a.record.get(key) == first[key] for a in answers)}


def _slices(
    answers: Sequence[Scored], key: str, puzzles: Sequence[Puzzle] | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Compute the metrics for each value of ``key``; nothing if no record has it."""
    groups: dict[Any, list[Scored]] = {}
    for answer in answers:
        if key == "n_cells":
            value: Any = len(answer.gold)
        else:
            value = answer.record.get(key)
            if value is None and puzzles is not None:
                value = puzzles[answer.index].meta.get(key)
        groups.setdefault("" if value is None else value, []).append(answer)
    if set(groups) == {""}:
        return {}
    ordered = sorted(groups) if key == "n_cells" else sorted(groups, key=str)
    return {str(value) or "(unknown)": _plain(summarise(groups[value], seed=seed)) for value in ordered}


def _confusion(answers: Sequence[Scored]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Count for each type how often it was found, and what was named in its place."""
    pairs: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        known = {name.lower(): name for name in (*(answer.candidates or ()), *answer.gold)}
        items = [NO_ANSWER] * len(answer.gold) if answer.score.reason else answer.score.items
        for gold, item in zip(answer.gold, items, strict=True):
            pairs[gold, known.get(item.lower(), item)] += 1
    totals: Counter[str] = Counter()
    for (gold, _), count in pairs.items():
        totals[gold] += count
    types = {}
    for name in sorted(totals):
        n, right = totals[name], pairs[name, name]
        low, high = wilson(right, n)
        types[name] = {"n": n, "accuracy": right / n, "low": low, "high": high}
    ordered = sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))
    return types, [{"gold": gold, "predicted": item, "count": count} for (gold, item), count in ordered]


def _examples(answers: Sequence[Scored]) -> list[dict[str, Any]]:
    """Take the first answers of each kind, for reading."""
    found = []
    left = dict(_EXAMPLES)
    for answer in answers:
        kind = "illegal" if answer.score.reason else "right" if answer.score.exact_match else "wrong"
        if left[kind]:
            left[kind] -= 1
            question = next((answer.record[key] for key in USER_KEYS if isinstance(answer.record.get(key), str)), "")
            found.append(
                {
                    "kind": kind,
                    "index": answer.index,
                    "sample": answer.sample,
                    "reason": str(answer.score.reason),
                    "cell_accuracy": answer.score.cell_accuracy,
                    "gold": list(answer.gold),
                    "items": list(answer.score.items),
                    "question": question[:_SHOWN],
                    "prediction": answer.record["prediction"][:_SHOWN],
                }
            )
    return sorted(found, key=lambda example: list(_EXAMPLES).index(example["kind"]))


def _histogram(values: Sequence[float]) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=20)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def compare(
    first: Iterable[Mapping[str, Any]],
    second: Iterable[Mapping[str, Any]],
    puzzles: Sequence[Puzzle] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two runs on the puzzles both have answered.

    Parameters
    ----------
    first, second
        Prediction records of the runs.
    puzzles
        The data set; see ``scores.score_predictions``.
    seed
        Seed of the bootstrap.

    Returns
    -------
    ``n`` (puzzles in both), ``n_first`` and ``n_second`` (puzzles in each), ``metrics`` (name -> estimate of second
    minus first, over puzzles), ``length_unit`` (words for both runs where not both say how many tokens) and
    ``mcnemar`` (for exact match; only where each puzzle has one answer in each run).

    Raises
    ------
    ValueError
        If the runs have no puzzle in common, their gold differs, or a record cannot be scored.
    """
    both = [list(first), list(second)]
    scores = [score_predictions(records, puzzles) for records in both]
    if len({found.length_unit for found in scores}) > 1:
        scores = [score_predictions(records, puzzles, in_words=True) for records in both]
    runs = [per_puzzle(found.answers) for found in scores]
    common = [index for index in runs[0] if index in runs[1]]
    if not common:
        msg = "the two runs have no answered puzzle in common; nothing can be compared"
        raise ValueError(msg)
    for index in common:
        if runs[0][index][0].gold != runs[1][index][0].gold:
            msg = f"item {index} has another gold answer in the other run; they are not of the same data set"
            raise ValueError(msg)
    values = [np.array([means(run[index]) for index in common]) for run in runs]
    metrics = {
        name: paired_difference(values[0][:, j], values[1][:, j], seed=seed).as_dict()
        for j, name in enumerate(MEASURED)
    }
    result: dict[str, Any] = {
        "n": len(common),
        "n_first": len(runs[0]),
        "n_second": len(runs[1]),
        "metrics": metrics,
        "length_unit": scores[0].length_unit,
        "level": LEVEL,
        "seed": seed,
    }
    if all(len(run[index]) == 1 for run in runs for index in common):
        j = MEASURED.index("exact_match")
        result["mcnemar"] = mcnemar(values[0][:, j], values[1][:, j])
    return result


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description="Score predictions, with intervals and slices.")
    parser.add_argument("predictions", type=Path, help=".jsonl, .json, or a folder of <index>.json (published layout)")
    parser.add_argument("--data", type=Path, help="data set with the gold answers; default: those in the records")
    parser.add_argument(
        "--variant", choices=sorted(VARIANTS), help="task variant; default: the one that RL data names, else batch"
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
    puzzles = load_puzzles(args.data, args.variant).puzzles if args.data else None
    records = read_predictions(args.predictions)
    with ExitStack() as stack:
        judge = None
        if args.judge:
            judge = stack.enter_context(start_engine("openai", args.judge, base_url=args.judge_url))
        result = evaluate(
            records,
            puzzles,
            greedy=read_predictions(args.greedy) if args.greedy else None,
            ontology=load_ontology() if args.ontology else None,
            judge=judge,
            weighted=args.weighted,
            seed=args.seed,
        )
    if args.compare:
        other = read_predictions(args.compare)
        result["comparison"] = {"with": str(args.compare), **compare(other, records, puzzles, seed=args.seed)}
    render(result)
    outputs = (
        (args.out, lambda: dumps(result, 2) + "\n"),
        (args.markdown, lambda: to_markdown(result)),
        (args.html, lambda: to_html(result)),
    )
    for path, content in outputs:
        if path:
            atomic_write(path, content())
            print(f"written: {path}")
