"""Score predictions: the paper's metrics with 95% intervals, slices, and why answers were malformed.

The verdict on each answer is that of :mod:`recipe.cello1.scoring`, the one the training is rewarded with. A malformed
answer counts as 0. Error records (failures of the machinery) and items without a prediction are counted apart and never
scored.

    python -m recipe.cello1.evaluate predictions.jsonl --data test.json --out metrics.json
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from recipe.cello1.answer import Reason, parse_answer, split_types
from recipe.cello1.predict import read_dataset
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import GOLD_KEYS, atomic_write, check_prediction, dumps, read_predictions
from recipe.cello1.scoring import Score, score_answer

LEVEL = 0.95
RESAMPLES = 2000
SLICES = ("n_cells", "tissue", "dataset", "disease", "donor_id")

# Of each metric: its heading, and whether it is a yes or no for one answer.
METRICS = {
    "cell_accuracy": ("cell accuracy", False),
    "cell_accuracy_micro": ("cell accuracy (micro)", False),
    "exact_match": ("exact match", True),
    "format_valid": ("format validity", True),
    "uniqueness": ("uniqueness", False),
    "legal": ("legal answers", True),
    "length": ("length", False),
}


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
    length
        Length of the response: tokens, or words where the record does not say how many tokens.
    record
        The prediction record.
    """

    index: int
    sample: int
    score: Score
    gold: tuple[str, ...]
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
        try:
            score = score_answer(text, gold, candidates=candidates)
        except ValueError as error:
            msg = f"{where}: {error}"
            raise ValueError(msg) from None
        length = record["tokens"] if in_tokens else len(text.split())
        answers.append(Scored(index, sample, score, gold, float(length), record))
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
    return own, None


def _own_gold(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    for key in reversed(GOLD_KEYS):  # "answer" is the plain one
        if isinstance(text := record.get(key), str):
            parsed = parse_answer(text)
            return parsed.items if parsed.ok else split_types(text)
    return None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over puzzles and its interval.

    Attributes
    ----------
    mean
        The mean.
    low, high
        Ends of the 95% interval; NaN for fewer than two puzzles.
    n
        Number of puzzles.
    method
        How the interval was made: ``"bootstrap"`` (over puzzles) or ``"wilson"``.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; NaN becomes ``None``.

        Returns
        -------
        The attributes.
        """
        low, high = (None if np.isnan(end) else float(end) for end in (self.low, self.high))
        return {"mean": float(self.mean), "low": low, "high": high, "n": self.n, "method": self.method}


def estimate(values: np.ndarray, *, seed: int, weights: np.ndarray | None = None) -> Estimate:
    """Estimate a mean over puzzles with a 95% interval.

    The bootstrap (BCa, Efron 1987) resamples puzzles. Where it cannot see any variation (all puzzles right, say) it
    would give an interval of no width, and for shares of a yes or no it is poor in small samples: these get the Wilson
    score interval.

    Parameters
    ----------
    values
        One value per puzzle, length n.
    seed
        Seed of the bootstrap.
    weights
        Weight of each puzzle, length n, for a weighted mean.

    Returns
    -------
    The estimate.

    Raises
    ------
    ValueError
        If there are no values.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n == 0:
        msg = "values is empty; there is nothing to estimate"
        raise ValueError(msg)
    mean = float(np.average(values, weights=weights))
    if np.isin(values, (0.0, 1.0)).all() and (weights is None or np.ptp(values) == 0):
        low, high = stats.binomtest(int(values.sum()), n).proportion_ci(LEVEL, method="wilson")
        return Estimate(mean, float(low), float(high), n, "wilson")
    if n < 2:
        return Estimate(mean, np.nan, np.nan, n, "bootstrap")
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, n, "bootstrap")
    rng = np.random.default_rng(seed)
    sums = (values,) if weights is None else (values * weights, weights)

    def statistic(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        top = parts[0].mean(axis=axis)
        return top if len(parts) == 1 else top / parts[1].mean(axis=axis)

    found = stats.bootstrap(
        sums,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="BCa",
        batch=max(1, 4_000_000 // n),
        rng=rng,
    )
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():  # all resamples on one side of the mean: BCa is undefined
        low, high = np.quantile(found.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), n, "bootstrap")


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
    rows = np.array(
        [
            (
                answer.score.cell_accuracy,
                answer.score.exact_match,
                answer.score.format_valid,
                answer.score.uniqueness,
                not answer.score.reason,
                answer.length,
                len(answer.gold),
            )
            for answer in answers
        ],
        dtype=float,
    )
    _, puzzle = np.unique([answer.index for answer in answers], return_inverse=True)
    counts = np.bincount(puzzle)
    means = np.stack([np.bincount(puzzle, column) / counts for column in rows.T])
    cells, exact, valid, unique, legal, length, n_cells = means
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
    Plain values for JSON: ``n`` (puzzles scored), ``n_answers``, ``n_errors``, ``n_missing``, ``metrics`` (name ->
    mean, low, high, n, method), ``malformed`` (reason -> count), ``outside_candidates`` (answers that name a type not
    offered; only with ``puzzles``), ``errors``, ``missing``, ``slices`` (key -> value -> metrics), ``length_unit``,
    ``run`` (engine, model, sampling, layout).

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
    return {
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
    }


def _plain(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: found.as_dict() for name, found in metrics.items()}


def _run_of(answers: Sequence[Scored]) -> dict[str, Any]:
    """Return the settings that all records share."""
    keys = ("engine", "model", "fingerprint", "sampling", "prompt_layout")
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


def render(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print an evaluation as tables.

    Parameters
    ----------
    result
        What :func:`evaluate` returned.
    console
        Where to; the terminal by default.
    """
    console = console or Console()
    table = Table(title=f"{result['n']} puzzles, {result['n_answers']} answers", title_justify="left")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    table.add_column(f"{result['level']:.0%} interval", justify="right")
    for name, found in result["metrics"].items():
        heading = METRICS[name][0] + (f" ({result['length_unit']})" if name == "length" else "")
        table.add_row(heading, _number(name, found["mean"]), _interval(name, found))
    console.print(table)
    for key, groups in result["slices"].items():
        if len(groups) > 1:
            table = Table(title=f"by {key}", title_justify="left")
            table.add_column(key)
            table.add_column("puzzles", justify="right")
            shown = ("cell_accuracy", "exact_match", "format_valid")
            for name in shown:
                table.add_column(METRICS[name][0], justify="right")
            for value, metrics in groups.items():
                cells = [f"{_number(name, metrics[name]['mean'])} {_interval(name, metrics[name])}" for name in shown]
                table.add_row(escape(value), str(metrics["cell_accuracy"]["n"]), *cells)
            console.print(table)
    if result["malformed"]:
        share = ", ".join(f"{reason} {count}" for reason, count in result["malformed"].items())
        console.print(f"malformed answers (scored 0): {share}", highlight=False)
    if result["n_errors"]:
        console.print(f"not scored, the machinery failed: {result['n_errors']} (run predict again)", highlight=False)
    if result["n_missing"]:
        console.print(f"not scored, no prediction: {result['n_missing']} items of the data set", highlight=False)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1f}" if name == "length" else f"{value:.3f}"


def _interval(name: str, found: Mapping[str, Any]) -> str:
    return f"[{_number(name, found['low'])}, {_number(name, found['high'])}]".replace("[", "\\[")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.cello1.evaluate", description="Score predictions, with intervals and slices."
    )
    parser.add_argument("predictions", type=Path, help=".jsonl, .json, or a folder of <index>.json (published layout)")
    parser.add_argument("--data", type=Path, help="data set with the gold answers; default: those in the records")
    parser.add_argument("--variant", default="batch", help="task variant of the data set")
    parser.add_argument("--out", type=Path, help="write everything as JSON here")
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
        result = evaluate(read_predictions(args.predictions), puzzles, seed=args.seed)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    render(result)
    if args.out:
        atomic_write(args.out, dumps(result, 2) + "\n")
        print(f"evaluate: written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
