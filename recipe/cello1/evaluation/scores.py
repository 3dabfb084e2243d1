"""Prediction records -> scored answers, and the paper's metrics over them.

The verdict on each answer is that of :mod:`recipe.cello1.task.scoring`, which training is rewarded with. Error records
(failures of the machinery) and items without a prediction are counted apart and never scored. Of each record only what
is needed later is kept, so that a file may be longer than the memory.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from recipe.cello1.evaluation.baseline import NaiveBayes
from recipe.cello1.evaluation.intervals import (
    Calibration,
    Estimate,
    calibration,
    estimate,
    mcnemar,
    paired_difference,
)
from recipe.cello1.evaluation.results import Comparison, Cost, Example
from recipe.cello1.formats.items import GOLD_KEYS, USER_KEYS
from recipe.cello1.formats.predictions import RUN_KEYS, check_prediction
from recipe.cello1.task.answer import ANSWER_OPEN, parse_answer, split_types
from recipe.cello1.task.prompt import find_variant, parse_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import METRICS, Score, gold_types, score_parsed, score_types

# What is measured on each answer, in the order of `Scores.values`.
MEASURED = (*METRICS, "length")
# Shares of all cells, as in the published evaluator; the others are means over puzzles.
OVER_CELLS = ("partial_accuracy", "strict_accuracy")
SLICES = ("n_cells", "tissue", "dataset", "disease", "donor_id")

# The published script stores what an exception said as the prediction.
_PUBLISHED_FAILURE = re.compile(r"[A-Za-z_]*(Error|Exception): ")
_EXAMPLES = {"right": 3, "wrong": 3, "illegal": 2}
_SHOWN = 4000  # characters of an example


@dataclass(frozen=True, slots=True)
class Reference:
    """What a puzzle is judged by."""

    # Empty if unknown
    answer: tuple[str, ...]
    # None if unknown
    candidates: tuple[str, ...] | None
    # Its values of SLICES
    slices: tuple[Any, ...]
    # Answers of the baselines
    baselines: Mapping[str, tuple[str, ...]]


def reference(puzzle: Puzzle, baseline: NaiveBayes | None = None) -> Reference:
    """Keep what is needed of a puzzle."""
    slices = (puzzle.n_cells, *(puzzle.meta.get(key) for key in SLICES[1:]))
    solved = baseline.answers(puzzle.cells, puzzle.candidates) if baseline else {}
    return Reference(_interned(puzzle.answer or ()), _interned(puzzle.candidates) or None, slices, solved)


def _interned(types: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(sys.intern, types))  # the same few names in every puzzle


@dataclass(frozen=True, slots=True)
class Scored:
    """One scored answer."""

    # Position of the puzzle in its data set
    index: int
    # Number of the answer among those for the puzzle
    sample: int
    score: Score
    puzzle: Reference
    # Of the response; tokens where the record says how many
    words: int
    tokens: int | None = None
    logprob: float | None = None
    prompt_tokens: int | None = None
    scored: int = 0
    # Probability of the type of each cell
    confidence: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Scored predictions, and what could not be scored."""

    # By index and sample
    answers: tuple[Scored, ...]
    # For each error of the machinery how many records have it
    errors: Mapping[str, int] = field(default_factory=dict)
    # Items of the data set for which there is no record
    missing: tuple[int, ...] = ()
    # Settings that all records share
    run: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Example] = ()

    @property
    def length_unit(self) -> str:
        """``"tokens"``, or ``"words"`` where not every record says how many tokens."""
        return "words" if any(answer.tokens is None for answer in self.answers) else "tokens"

    def of(self, indices: Collection[int]) -> Scores:
        """Keep only some puzzles."""
        return replace(self, answers=tuple(answer for answer in self.answers if answer.index in indices))

    def calibration(self, of: str = "answers") -> Calibration | None:
        """Compare the probabilities of the answered types with the gold, where there are any."""
        sure: list[float] = []
        right: list[bool] = []
        for answer in self.answers:
            if answer.confidence is not None:
                sure += answer.confidence
                pairs = zip(answer.score.items, answer.puzzle.answer, strict=True)
                right += [name.lower() == gold.lower() for name, gold in pairs]
        return calibration(np.array(sure), np.array(right), of) if sure else None

    def cost(self) -> Cost | None:
        """Add up what a puzzle takes."""
        if self.length_unit == "words":
            return None
        n = len({answer.index for answer in self.answers})
        prompts = [answer.prompt_tokens for answer in self.answers if answer.prompt_tokens is not None]
        return Cost(
            sum(answer.tokens or 0 for answer in self.answers) / n,
            sum(prompts) / n if len(prompts) == len(self.answers) else None,
            sum(answer.scored for answer in self.answers) / n,
        )

    def groups(self) -> dict[int, list[Scored]]:
        """Group the answers by puzzle."""
        found: dict[int, list[Scored]] = {}
        for answer in self.answers:
            found.setdefault(answer.index, []).append(answer)
        return found

    def values(self, unit: str | None = None) -> dict[int, np.ndarray]:
        """Average what is MEASURED over the answers to each puzzle: puzzles are the sample."""
        name = unit or self.length_unit
        return {
            index: np.mean([(*(getattr(a.score, key) for key in METRICS), getattr(a, name)) for a in group], axis=0)
            for index, group in self.groups().items()
        }

    def arrays(self, unit: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return what is MEASURED of each puzzle, one row each, and its number of cells."""
        n_cells = [len(group[0].puzzle.answer) for group in self.groups().values()]
        return np.array(list(self.values(unit).values())), np.array(n_cells, dtype=float)


def score_predictions(
    records: Iterable[Mapping[str, Any]],
    puzzles: Sequence[Puzzle | Reference] | None = None,
    baseline: NaiveBayes | None = None,
) -> Scores:
    """Score prediction records."""
    answers: list[Scored] = []
    errors: Counter[str] = Counter()
    known: dict[int, Reference] = {}
    seen: set[tuple[int, int]] = set()
    run: dict[str, Any] | None = None
    examples: dict[str, list[Example]] = {kind: [] for kind in _EXAMPLES}
    for record in records:
        index, sample = record.get("index"), record.get("sample", 0)
        where = f"prediction {index}" + (f", sample {sample}" if sample else "")
        if not isinstance(index, int) or not isinstance(sample, int):
            raise ValueError(f"{where}: 'index' and 'sample' must be integers, got {index!r} and {sample!r}")
        if (index, sample) in seen:
            raise ValueError(f"duplicate {where}; remove one of the two")
        seen.add((index, sample))
        puzzle = known[index] = _reference(record, known.get(index), puzzles, baseline, where)
        if not check_prediction(record, where):
            errors[record["error"]] += 1
            continue
        text = record["prediction"]
        if "engine" not in record and _PUBLISHED_FAILURE.match(text):
            errors[" ".join(text.split())[:200]] += 1
            continue
        score = score_parsed(parse_answer(text), puzzle.answer, candidates=puzzle.candidates)
        numbers = [record.get(name) for name in ("tokens", "prompt_tokens", "scored")]
        tokens, prompt_tokens, scored = (value if isinstance(value, int) else None for value in numbers)
        logprob = record.get("logprob")
        answers.append(
            Scored(
                index,
                sample,
                score,
                puzzle,
                len(text.split()),
                tokens,
                float(logprob) if isinstance(logprob, int | float) else None,
                prompt_tokens,
                scored or 0,
                _confidence(record, len(puzzle.answer)) if len(score.items) == len(puzzle.answer) else None,
            )
        )
        _add_example(examples, answers[-1], record)
        own = {key: record[key] for key in (*RUN_KEYS, "rule") if key in record}
        run = own if run is None else {key: value for key, value in run.items() if own.get(key) == value}
    answers.sort(key=lambda answer: (answer.index, answer.sample))
    missing = tuple(i for i in range(len(puzzles or ())) if i not in known)
    shown = [example for found in examples.values() for example in found]
    return Scores(tuple(answers), dict(errors.most_common()), missing, run or {}, shown)


def _confidence(record: Mapping[str, Any], n_cells: int) -> tuple[float, ...] | None:
    """Find the probability of each cell's type: the ``support`` of a read-out, or the ``cells`` of a consensus."""
    found = record.get("support")
    if isinstance(cells := record.get("cells"), list):
        found = [cell.get("probability") if isinstance(cell, dict) else None for cell in cells]
    if not isinstance(found, list) or len(found) != n_cells:
        return None
    return tuple(found) if all(isinstance(value, float | int) and 0 <= value <= 1 for value in found) else None


def _add_example(found: dict[str, list[Example]], answer: Scored, record: Mapping[str, Any]) -> None:
    """Keep the first answers of each kind."""
    score = answer.score
    kind = "illegal" if score.reason else "right" if score.exact_match else "wrong"
    if len(found[kind]) < _EXAMPLES[kind]:
        question = next((record[name] for name in USER_KEYS if isinstance(record.get(name), str)), "")
        shown = (question[:_SHOWN], record["prediction"][:_SHOWN])
        read = (str(score.reason), score.partial_accuracy, answer.puzzle.answer, score.items)
        found[kind].append(Example(kind, answer.index, answer.sample, *read, *shown))


def _reference(
    record: Mapping[str, Any],
    known: Reference | None,
    puzzles: Sequence[Puzzle | Reference] | None,
    baseline: NaiveBayes | None,
    where: str,
) -> Reference:
    """Return what the puzzle of a record is judged by: from the data set, or from the item that the record repeats."""
    text = next((record[key] for key in reversed(GOLD_KEYS) if isinstance(record.get(key), str)), None)
    own = None if text is None else _read_gold(text)
    index = record["index"]
    if known is None and puzzles is not None:
        if not 0 <= index < len(puzzles):
            msg = f"{where} is not in the data set, which has {len(puzzles)} items; give the data it was made from"
            raise ValueError(msg)
        puzzle = puzzles[index]
        known = puzzle if isinstance(puzzle, Reference) else reference(puzzle, baseline)
        if not known.answer:
            raise ValueError(f"{where}: item {index} of the data set has no gold under 'assistant_msg' or 'answer'")
        told = [record.get(key, value) for key, value in zip(SLICES[1:], known.slices[1:], strict=True)]
        known = replace(known, slices=(known.slices[0], *told))
    if known is not None:
        if own is not None and own != known.answer:
            msg = f"{where}: its gold {own} is not that of item {index}, {known.answer}; give the data it was made from"
            raise ValueError(msg)
        return known
    if own is None:
        msg = f"{where} has no gold: neither {' nor '.join(map(repr, GOLD_KEYS))} is among its keys {sorted(record)}"
        raise ValueError(msg)
    try:
        answer = _interned(gold_types(own))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    text = next((record[key] for key in USER_KEYS if isinstance(record.get(key), str)), "")
    try:
        variant = find_variant(text)
        question = parse_user(text, variant) if variant else None
    except ValueError:  # it is in no format we know
        question = None
    slices = (len(answer), *(record.get(key) for key in SLICES[1:]))
    if question and question.candidates:
        return replace(reference(question, baseline), answer=answer, slices=slices)
    if baseline:
        raise ValueError(f"{where} repeats no question with candidates, which the baseline needs; give the data set")
    return Reference(answer, None, slices, {})


@lru_cache(maxsize=4096)  # once for all answers to a puzzle
def _read_gold(text: str) -> tuple[str, ...]:
    parsed = parse_answer(text) if ANSWER_OPEN in text else None
    return parsed.items if parsed and parsed.ok else split_types(text)


def baseline_scores(scores: Scores) -> dict[str, Scores]:
    """Score what the baselines answer to the same puzzles."""
    found: dict[str, list[Scored]] = {}
    for index, group in scores.groups().items():
        puzzle = group[0].puzzle
        for name, types in puzzle.baselines.items():
            score = score_types(types, puzzle.answer, candidates=puzzle.candidates)
            found.setdefault(name, []).append(Scored(index, 0, score, puzzle, 0, 0))
    return {name: Scores(tuple(answers)) for name, answers in found.items()}


def chance(answers: Sequence[Scored]) -> float | None:
    """Compute the partial accuracy of random legal answers; ``None`` where a question lists no candidates."""
    puzzles = {answer.index: answer.puzzle for answer in answers}.values()
    if not all(puzzle.candidates for puzzle in puzzles):
        return None
    n_right = sum(len(puzzle.answer) / len(puzzle.candidates or ()) for puzzle in puzzles)
    return n_right / sum(len(puzzle.answer) for puzzle in puzzles)


def weights_of(name: str, n_cells: np.ndarray) -> np.ndarray | None:
    """Return the weight of each puzzle in a metric."""
    return n_cells if name in OVER_CELLS else None


def summarise(values: np.ndarray, n_cells: np.ndarray, *, seed: int = 0) -> dict[str, Estimate]:
    """Estimate the metrics from the values of puzzles, one row each."""
    return {
        name: estimate(values[:, j], seed=seed, weights=weights_of(name, n_cells)) for j, name in enumerate(MEASURED)
    }


def compare(
    first: Iterable[Mapping[str, Any]],
    second: Iterable[Mapping[str, Any]],
    puzzles: Sequence[Puzzle | Reference] | None = None,
    *,
    other: str = "",
    seed: int = 0,
) -> Comparison:
    """Compare the predictions of a second run with those of a first."""
    return difference(*(score_predictions(run, puzzles) for run in (first, second)), other=other, seed=seed)


def difference(first: Scores, second: Scores, *, other: str = "", seed: int = 0) -> Comparison:
    """Compare the second run with the first, on the puzzles that both have answered."""
    units = {first.length_unit, second.length_unit}
    unit = units.pop() if len(units) == 1 else "words"
    runs = [scores.values(unit) for scores in (first, second)]
    groups = [scores.groups() for scores in (first, second)]
    common = [index for index in runs[0] if index in runs[1]]
    if not common:
        raise ValueError("the two runs have no answered puzzle in common; nothing can be compared")
    for index in common:
        if groups[0][index][0].puzzle.answer != groups[1][index][0].puzzle.answer:
            msg = f"item {index} has another gold answer in the other run; they are not of the same data set"
            raise ValueError(msg)
    before, after = (np.array([run[index] for index in common]) for run in runs)
    n_cells = np.array([len(groups[0][index][0].puzzle.answer) for index in common], dtype=float)
    metrics = {
        name: paired_difference(before[:, j], after[:, j], seed=seed, weights=weights_of(name, n_cells))
        for j, name in enumerate(MEASURED)
    }
    single = all(len(group[index]) == 1 for group in groups for index in common)
    exact = MEASURED.index("exact_match")
    test = mcnemar(before[:, exact], after[:, exact]) if single else None
    return Comparison(other, len(common), len(runs[0]), len(runs[1]), metrics, unit, test)
