"""Score predictions: the paper's metrics with 95% intervals, slices, and why answers were malformed.

The verdict on each answer is that of :mod:`recipe.cello1.scoring`, the one the training is rewarded with. A malformed
answer counts as 0. Error records (failures of the machinery) and items without a prediction are counted apart and never
scored.

    python -m recipe.cello1.evaluate predictions.jsonl --data test.json --out metrics.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.answer import Reason, format_answer, parse_answer, split_types
from recipe.cello1.intervals import LEVEL, Estimate, calibration, estimate, mcnemar, paired_difference, wilson
from recipe.cello1.predict import read_dataset
from recipe.cello1.prompt import parse_user
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import GOLD_KEYS, USER_KEYS, atomic_write, check_prediction, dumps, read_predictions
from recipe.cello1.report import render, to_html, to_markdown
from recipe.cello1.scoring import Score, score_answer
from recipe.cello1.voting import consensus, likeliest, logprob_weights, majority, medoid, read_answers

SLICES = ("n_cells", "tissue", "dataset", "disease", "donor_id")
NO_ANSWER = "(no legal answer)"
_EXAMPLES = {"right": 3, "wrong": 3, "malformed": 2}
# The published script stores what an exception said as the prediction.
_PUBLISHED_FAILURE = re.compile(r"[A-Za-z_]*(Error|Exception): ")
_SHOWN = 4000  # characters of an example


@dataclass(frozen=True, slots=True)
class Scored:
    """One scored answer.

    Attributes
    ----------
    index
        Position of the puzzle in its data set.
    sample
        Number of the answer among those for the puzzle.
    score
        The verdict.
    gold
        Types in cell order.
    candidates
        Candidate types, if known.
    length
        Length of the response: tokens, or words where the record does not say how many tokens.
    record
        The prediction record.
    """

    index: int
    sample: int
    score: Score
    gold: tuple[str, ...]
    candidates: tuple[str, ...] | None
    length: float
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scored predictions, and what could not be scored.

    Attributes
    ----------
    answers
        The scored answers, by index and sample.
    errors
        For each error of the machinery how many records have it.
    missing
        Items of the data set for which there is no record.
    length_unit
        ``"tokens"`` or ``"words"``.
    """

    answers: tuple[Scored, ...]
    errors: Mapping[str, int]
    missing: tuple[int, ...]
    length_unit: str


def score_predictions(records: Iterable[Mapping[str, Any]], puzzles: Sequence[Puzzle] | None = None) -> Scores:
    """Score prediction records.

    Parameters
    ----------
    records
        Prediction and error records, each with ``index``.
    puzzles
        The data set, for the gold answers; without it each record must hold its own (``answer`` or ``assistant_msg``).

    Returns
    -------
    The scores.

    Raises
    ------
    ValueError
        If a record has no gold (naming the keys), is not of the data set, or stands twice.
    """
    answers: list[Scored] = []
    errors: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    records = list(records)
    in_tokens = all(isinstance(record.get("tokens"), int) for record in records if "prediction" in record)
    for record in records:
        index, sample = record.get("index"), record.get("sample", 0)
        where = f"prediction {index}" + (f", sample {sample}" if sample else "")
        if not isinstance(index, int) or not isinstance(sample, int):
            msg = f"{where}: 'index' and 'sample' must be integers, got {index!r} and {sample!r}"
            raise ValueError(msg)
        if (index, sample) in seen:
            msg = f"{where} stands twice; which of the two counts? remove one"
            raise ValueError(msg)
        seen.add((index, sample))
        gold, candidates = _gold(record, puzzles, where)
        if not check_prediction(record, where):
            errors[record["error"]] += 1
            continue
        text = record["prediction"]
        if "engine" not in record and _PUBLISHED_FAILURE.match(text):
            errors[" ".join(text.split())[:200]] += 1
            continue
        try:
            score = score_answer(text, gold, candidates=candidates)
        except ValueError as error:
            msg = f"{where}: {error}"
            raise ValueError(msg) from None
        length = record["tokens"] if in_tokens else len(text.split())
        answers.append(Scored(index, sample, score, gold, candidates, float(length), record))
    answers.sort(key=lambda answer: (answer.index, answer.sample))
    found = {index for index, _ in seen}
    missing = tuple(i for i in range(len(puzzles or ())) if i not in found)
    return Scores(tuple(answers), dict(errors.most_common()), missing, "tokens" if in_tokens else "words")


def _gold(
    record: Mapping[str, Any], puzzles: Sequence[Puzzle] | None, where: str
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the gold types and the candidates, if known."""
    if puzzles is not None:
        index = record["index"]
        if not 0 <= index < len(puzzles):
            msg = f"{where} is not in the data set, which has {len(puzzles)} items; give the data it was made from"
            raise ValueError(msg)
        puzzle = puzzles[index]
        if puzzle.answer is None:
            msg = f"{where}: item {index} of the data set has no gold under 'assistant_msg' or 'answer'"
            raise ValueError(msg)
        own = _own_gold(record)
        if own is not None and own != puzzle.answer:
            msg = (
                f"{where}: its gold {own} is not that of item {index}, {puzzle.answer}; give the data it was made from"
            )
            raise ValueError(msg)
        return puzzle.answer, puzzle.candidates or None
    own = _own_gold(record)
    if own is None:
        msg = f"{where} has no gold: neither {' nor '.join(map(repr, GOLD_KEYS))} is among its keys {sorted(record)}"
        raise ValueError(msg)
    return own, _own_candidates(record)


def _own_candidates(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Read the candidates from the question the record repeats; ``None`` if it is in no format we know."""
    for key in USER_KEYS:
        if isinstance(text := record.get(key), str):
            try:
                return parse_user(text).candidates or None
            except ValueError:
                return None
    return None


def _own_gold(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    for key in reversed(GOLD_KEYS):  # "answer" is the plain one
        if isinstance(text := record.get(key), str):
            parsed = parse_answer(text)
            return parsed.items if parsed.ok else split_types(text)
    return None


def summarise(answers: Sequence[Scored], *, seed: int = 0) -> dict[str, Estimate]:
    """Compute the metrics of some answers. Several answers to a puzzle are averaged first: puzzles are the sample.

    Parameters
    ----------
    answers
        Scored answers, at least one.
    seed
        Seed of the bootstrap.

    Returns
    -------
    For each of ``METRICS`` the estimate: ``cell_accuracy`` averages over puzzles (macro), ``cell_accuracy_micro`` over
    cells; ``uniqueness`` is distinct types over types, as in the paper; ``legal`` is the share of answers with valid
    format, the right number of types and none twice.
    """
    puzzles = list(_per_puzzle(answers).values())
    cells, exact, valid, unique, legal, length = np.array([_means(group) for group in puzzles]).T
    n_cells = np.array([len(group[0].gold) for group in puzzles], dtype=float)
    return {
        "cell_accuracy": estimate(cells, seed=seed),
        "cell_accuracy_micro": estimate(cells, seed=seed, weights=n_cells),
        "exact_match": estimate(exact, seed=seed),
        "format_valid": estimate(valid, seed=seed),
        "uniqueness": estimate(unique, seed=seed),
        "legal": estimate(legal, seed=seed),
        "length": estimate(length, seed=seed),
    }


def evaluate(
    records: Iterable[Mapping[str, Any]], puzzles: Sequence[Puzzle] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Evaluate predictions.

    Parameters
    ----------
    records
        Prediction and error records.
    puzzles
        The data set; see :func:`score_predictions`.
    seed
        Seed of the bootstrap.

    Returns
    -------
    Plain values for JSON:

    - ``n`` (puzzles scored), ``n_answers``, ``n_errors``, ``n_missing``, ``errors``, ``missing``
    - ``metrics`` (name -> mean, low, high, n, method), ``length_unit``, ``level``, ``seed``
    - ``malformed`` (reason -> count), ``outside_candidates`` (answers naming a type not offered, where that is known)
    - ``slices`` (key -> value -> metrics), ``types`` (type -> n, accuracy, low, high), ``confusion`` (gold, predicted,
      count; most frequent first)
    - with several answers to a puzzle: ``rules`` (rule -> metrics) and ``calibration`` of the consensus
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
    malformed = Counter(str(answer.score.reason) for answer in answers if answer.score.reason)
    types, confusion = _confusion(answers)
    result = {
        "n": len({answer.index for answer in answers}),
        "n_answers": len(answers),
        "n_errors": n_errors,
        "n_missing": len(scores.missing),
        "metrics": _plain(summarise(answers, seed=seed)),
        "malformed": {str(reason): malformed[reason] for reason in Reason if malformed[reason]},
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
    return result | _voted(answers, seed)


def _plain(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: found.as_dict() for name, found in metrics.items()}


def _run_of(answers: Sequence[Scored]) -> dict[str, Any]:
    """Return the settings that all records share."""
    keys = ("engine", "model", "fingerprint", "sampling", "prompt_layout", "rule")
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
        kind = "malformed" if answer.score.reason else "right" if answer.score.exact_match else "wrong"
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


def _voted(answers: Sequence[Scored], seed: int) -> dict[str, Any]:
    """Compare the rules that combine several answers; nothing where puzzles have one answer each."""
    groups: dict[int, list[Scored]] = {}
    for answer in answers:
        groups.setdefault(answer.index, []).append(answer)
    puzzles = [group for group in groups.values() if group[0].candidates]
    if not any(len(group) > 1 for group in puzzles):
        return {}
    scores: dict[str, list[tuple[float, float, float]]] = {}
    confidence: list[float] = []
    right: list[bool] = []
    for group in puzzles:
        gold, candidates = group[0].gold, group[0].candidates or ()
        given = read_answers([answer.record["prediction"] for answer in group], len(gold))
        best = consensus(given, candidates, len(gold))
        ruled = {
            "majority": majority(given, candidates, len(gold)),
            "medoid": medoid(given),
            "consensus": best.types,
        }
        records = [answer.record for answer in group]
        if all(isinstance(r.get("logprob"), float) and isinstance(r.get("tokens"), int) for r in records):
            weights = logprob_weights([r["logprob"] for r in records], [r["tokens"] for r in records])
            ruled["likeliest"] = likeliest(given, weights)
            ruled["weighted consensus"] = consensus(given, candidates, len(gold), weights=weights).types
        single = np.mean([_triple(answer.score) for answer in group], axis=0)
        scores.setdefault("one sample", []).append(tuple(single))
        for rule, types in ruled.items():
            text = "" if types is None else _plain_answer(types)
            scores.setdefault(rule, []).append(_triple(score_answer(text, gold)))
        # Not a rule, since it needs the gold: what choosing well could reach at most.
        scores.setdefault("best of all (needs the gold)", []).append(max(_triple(answer.score) for answer in group))
        confidence += best.probability.tolist()
        right += [name.lower() == wanted.lower() for name, wanted in zip(best.types, gold, strict=True)]
    names = ("cell_accuracy", "exact_match", "legal")
    rules = {
        rule: {
            name: estimate(np.array(column), seed=seed).as_dict()
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        for rule, rows in scores.items()
        if len(rows) == len(puzzles)
    }
    return {"rules": rules, "calibration": calibration(np.array(confidence), np.array(right))}


def _triple(score: Score) -> tuple[float, float, float]:
    return score.cell_accuracy, float(score.exact_match), float(not score.reason)


def _plain_answer(types: Sequence[str]) -> str:
    """Write voted types as an answer; names of a sample that cannot stand in one make it malformed."""
    try:
        return format_answer(types)
    except ValueError:
        return ""


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
        The data set; see :func:`score_predictions`.
    seed
        Seed of the bootstrap.

    Returns
    -------
    ``n`` (puzzles in both), ``n_first`` and ``n_second`` (puzzles in each), ``metrics`` (name -> estimate of second
    minus first, over puzzles) and ``mcnemar`` (for exact match; only where each puzzle has one answer in each run).

    Raises
    ------
    ValueError
        If the runs have no puzzle in common, their gold differs, or a record cannot be scored.
    """
    runs = [_per_puzzle(score_predictions(records, puzzles).answers) for records in (first, second)]
    common = [index for index in runs[0] if index in runs[1]]
    if not common:
        msg = "the two runs have no answered puzzle in common; nothing can be compared"
        raise ValueError(msg)
    for index in common:
        if runs[0][index][0].gold != runs[1][index][0].gold:
            msg = f"item {index} has another gold answer in the other run; they are not of the same data set"
            raise ValueError(msg)
    values = [np.array([_means(run[index]) for index in common]) for run in runs]
    metrics = {
        name: paired_difference(values[0][:, j], values[1][:, j], seed=seed).as_dict()
        for j, name in enumerate(_COMPARED)
    }
    result: dict[str, Any] = {
        "n": len(common),
        "n_first": len(runs[0]),
        "n_second": len(runs[1]),
        "metrics": metrics,
        "level": LEVEL,
        "seed": seed,
    }
    if all(len(run[index]) == 1 for run in runs for index in common):
        j = _COMPARED.index("exact_match")
        result["mcnemar"] = mcnemar(values[0][:, j], values[1][:, j])
    return result


_COMPARED = ("cell_accuracy", "exact_match", "format_valid", "uniqueness", "legal", "length")


def _per_puzzle(answers: Sequence[Scored]) -> dict[int, list[Scored]]:
    found: dict[int, list[Scored]] = {}
    for answer in answers:
        found.setdefault(answer.index, []).append(answer)
    return found


def _means(answers: Sequence[Scored]) -> list[float]:
    """Return the means of ``_COMPARED`` over the answers to one puzzle."""
    rows = [
        (
            answer.score.cell_accuracy,
            answer.score.exact_match,
            answer.score.format_valid,
            answer.score.uniqueness,
            not answer.score.reason,
            answer.length,
        )
        for answer in answers
    ]
    return np.mean(np.array(rows, dtype=float), axis=0).tolist()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.cello1.evaluate", description="Score predictions, with intervals and slices."
    )
    parser.add_argument("predictions", type=Path, help=".jsonl, .json, or a folder of <index>.json (published layout)")
    parser.add_argument("--data", type=Path, help="data set with the gold answers; default: those in the records")
    parser.add_argument("--variant", default="batch", help="task variant of the data set")
    parser.add_argument("--compare", type=Path, help="predictions of another run on the same data to compare with")
    parser.add_argument("--out", type=Path, help="write everything as JSON here")
    parser.add_argument("--markdown", type=Path, help="write the report as Markdown here")
    parser.add_argument("--html", type=Path, help="write the report as one self-contained HTML page here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments, ``sys.argv`` by default.

    Returns
    -------
    0, or 2 if the predictions cannot be evaluated.
    """
    args = _parser().parse_args(argv)
    try:
        puzzles = read_dataset(args.data, args.variant) if args.data else None
        records = read_predictions(args.predictions)
        result = evaluate(records, puzzles, seed=args.seed)
        if args.compare:
            other = read_predictions(args.compare)
            result["comparison"] = {"with": str(args.compare), **compare(other, records, puzzles, seed=args.seed)}
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    render(result)
    outputs = (
        (args.out, lambda: dumps(result, 2) + "\n"),
        (args.markdown, lambda: to_markdown(result)),
        (args.html, lambda: to_html(result)),
    )
    for path, content in outputs:
        if path:
            atomic_write(path, content())
            print(f"evaluate: written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
