"""What an evaluation finds, as frozen dataclasses, and as plain values for JSON, whose keys are identifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from recipe.cello1.evaluation.intervals import LEVEL, Calibration, Estimate

Metrics = Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Measured:
    """The metrics of some answers: all together, by property of the puzzle, and by gold type."""

    metrics: Metrics
    # Key -> value -> metrics
    slices: Mapping[str, Mapping[str, Metrics]]
    # Type -> share of its cells that are right
    types: Metrics


@dataclass(frozen=True, slots=True)
class Pair:
    """How often a type was answered for cells of a type."""

    gold: str
    predicted: str
    count: int


@dataclass(frozen=True, slots=True)
class Example:
    """An answer to read."""

    # "right", "wrong" or "illegal"
    kind: str
    index: int
    sample: int
    reason: str
    partial_accuracy: float
    gold: tuple[str, ...]
    items: tuple[str, ...]
    question: str
    prediction: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much higher one run is than another, on the puzzles that both have answered."""

    # What it was compared with
    other: str
    n: int
    # Puzzles in each
    n_first: int
    n_second: int
    metrics: Metrics
    length_unit: str
    # For exact match, where each puzzle has one answer in each run; see `intervals.mcnemar`
    mcnemar: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Meanings:
    """What open-ended answers mean, see `open_ended`."""

    # Version of the ontology or name of the model that decided
    by: str
    # Relation to the gold -> share of cells
    relations: Metrics
    # Edges in the ontology between answer and gold
    distance: Estimate | None = None
    # Names that the ontology lacks, and how often they were answered
    unknown: Mapping[str, int] | None = None
    n_judged: int = 0
    n_failed: int = 0
    # Why there is no verdict -> cells
    failures: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """What one of several ways of answering the same puzzles is worth."""

    # The length is that of all that a puzzle takes
    metrics: Metrics
    calibration: Calibration | None
    # How much higher the partial accuracy of the best way is
    behind: Estimate | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a puzzle takes on average, all its samples together."""

    # Tokens generated
    tokens: float
    # Tokens of the prompts and beginnings sent for that, where the records say so; a prompt sent twice counts twice
    prompt_tokens: float | None
    # Beginnings behind which the candidates were scored
    scored: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that `evaluate` finds."""

    # Puzzles scored, and answers to them
    n: int
    n_answers: int
    # Records of failures, with what failed, and items of the data set without a record
    n_errors: int
    errors: Mapping[str, int]
    missing: tuple[int, ...]
    measured: Measured
    # Partial accuracy of random legal answers; unknown where a question lists no candidates
    chance: float | None
    # Reason -> answers
    illegal: Mapping[str, int]
    # Answers that name a type not among the candidates, where those are known
    outside_candidates: int
    length_unit: str
    seed: int
    # Engine, model, sampling and layout, where all records agree
    run: Mapping[str, Any]
    # Most frequent first
    confusion: Sequence[Pair]
    lengths: Mapping[str, Sequence[float]]
    examples: Sequence[Example]
    # Baseline -> its metrics, and how much higher the model is
    baselines: Mapping[str, Measured]
    over_baselines: Mapping[str, Comparison]
    # With several answers to a puzzle, by rule; the best is the consensus
    rules: Mapping[str, Way]
    # Of the probabilities that the records hold, else of the consensus
    calibration: Calibration | None
    # Unknown where a record does not say how many tokens
    cost: Cost | None
    ontology: Meanings | None = None
    judge: Meanings | None = None
    comparison: Comparison | None = None
    level: float = LEVEL


def plain(value: Any) -> Any:
    """Turn results into values for JSON; NaN becomes null."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
