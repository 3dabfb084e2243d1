"""Prediction records -> scored answers, and the paper's metrics over them.

The verdict on each answer is that of :mod:`recipe.cello1.task.scoring`, which training is rewarded with. A malformed
answer counts as 0. Error records (failures of the machinery) and items without a prediction are counted apart and never
scored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipe.cello1.evaluation.intervals import Estimate, estimate
from recipe.cello1.formats.items import GOLD_KEYS, USER_KEYS
from recipe.cello1.formats.predictions import check_prediction
from recipe.cello1.task.answer import parse_answer, split_types
from recipe.cello1.task.prompt import VARIANTS, parse_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import Score, score_answer

# The published script stores what an exception said as the prediction.
_PUBLISHED_FAILURE = re.compile(r"[A-Za-z_]*(Error|Exception): ")

# What is measured on each answer, in the order of `means`.
MEASURED = ("cell_accuracy", "exact_match", "format_valid", "uniqueness", "legal", "length")


@dataclass(frozen=True, slots=True)
class Scored:
    """One scored answer."""

    # Position of the puzzle in its data set
    index: int
    # Number of the answer among those for the puzzle
    sample: int
    # The verdict
    score: Score
    # Types in cell order
    gold: tuple[str, ...]
    # Candidate types, if known
    candidates: tuple[str, ...] | None
    # Length of the response: tokens, or words where the record does not say how many tokens
    length: float
    # The prediction record
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scored predictions, and what could not be scored."""

    # The scored answers, by index and sample
    answers: tuple[Scored, ...]
    # For each error of the machinery how many records have it
    errors: Mapping[str, int]
    # Items of the data set for which there is no record
    missing: tuple[int, ...]
    # ``"tokens"`` or ``"words"``
    length_unit: str


def score_predictions(
    records: Iterable[Mapping[str, Any]], puzzles: Sequence[Puzzle] | None = None, *, in_words: bool = False
) -> Scores:
    """Score prediction records."""
    answers: list[Scored] = []
    errors: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    records = list(records)
    in_tokens = not in_words and all(
        isinstance(record.get("tokens"), int) for record in records if "prediction" in record
    )
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
    text = next((record[key] for key in USER_KEYS if isinstance(record.get(key), str)), None)
    if text is None:
        return None
    for variant in VARIANTS:
        try:
            return parse_user(text, variant).candidates or None
        except ValueError:
            continue
    return None


def _own_gold(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    for key in reversed(GOLD_KEYS):  # "answer" is the plain one
        if isinstance(text := record.get(key), str):
            parsed = parse_answer(text)
            return parsed.items if parsed.ok else split_types(text)
    return None


def summarise(answers: Sequence[Scored], *, seed: int = 0) -> dict[str, Estimate]:
    """Compute the metrics of some answers. Several answers to a puzzle are averaged first: puzzles are the sample."""
    puzzles = list(per_puzzle(answers).values())
    cells, exact, valid, unique, legal, length = np.array([means(group) for group in puzzles]).T
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


def per_puzzle(answers: Sequence[Scored]) -> dict[int, list[Scored]]:
    """Group answers by puzzle."""
    found: dict[int, list[Scored]] = {}
    for answer in answers:
        found.setdefault(answer.index, []).append(answer)
    return found


def means(answers: Sequence[Scored]) -> list[float]:
    """Average over the answers to one puzzle."""
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
