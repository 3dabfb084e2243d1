"""Means with intervals, paired differences, and calibration: the statistics of the evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
# Above so many puzzles, BCa agrees with the normal interval, and takes time in proportion to their number squared.
LARGE = 2000
BINS = 10  # of the calibration


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over puzzles and its interval."""

    mean: float
    # Ends of the 95% interval; NaN where none can be given (a single value)
    low: float
    high: float
    # Number of values
    n: int
    # How the interval was made: "bootstrap" (BCa, over puzzles), "wilson" or "normal"
    method: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far the confidence in single cells is that with which they turn out right."""

    # What the confidence is of: "answers" (their own probabilities), or a rule that combines several
    of: str
    # Expected calibration error: the cells are put into bins of equal width by confidence; the mean over bins of the
    # distance between mean confidence and share of right cells, each bin weighing as much as it holds cells
    ece: float
    # Mean squared distance between confidence and being right (1) or not (0)
    brier: float
    # Cells, and bins between 0 and 1
    n: int
    n_bins: int
    # Of each bin that holds cells: low, high, n, mean confidence, accuracy and its Wilson interval
    bins: Sequence[Mapping[str, Any]]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Give the Wilson score interval of a share (Wilson 1927)."""
    low, high = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def share(successes: int, n: int) -> Estimate:
    """Estimate a share."""
    return Estimate(successes / n, *wilson(successes, n), n, "wilson")


def estimate(values: np.ndarray, *, seed: int, weights: np.ndarray | None = None) -> Estimate:
    """Estimate a mean over puzzles with a 95% interval."""
    # Where the bootstrap cannot see any variation (all puzzles right, say) it would give an interval of no width, and
    # for shares of a yes or no it is poor in small samples: these get the Wilson score interval.
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("values is empty; there is nothing to estimate")
    if np.isin(values, (0.0, 1.0)).all() and (weights is None or np.ptp(values) == 0):
        return share(int(values.sum()), len(values))
    return _interval(values, weights, seed, sure=np.ptp(values) == 0)


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, seed: int, weights: np.ndarray | None = None
) -> Estimate:
    """Estimate how much higher the second of two runs is, on the same puzzles, which are what is resampled."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        msg = f"first and second must have one value for each puzzle, got shapes {first.shape} and {second.shape}"
        raise ValueError(msg)
    return _interval(second - first, weights, seed, sure=False)


def _interval(values: np.ndarray, weights: np.ndarray | None, seed: int, *, sure: bool) -> Estimate:
    n, mean = len(values), float(np.average(values, weights=weights))
    if n < 2 or np.ptp(values) == 0:
        low, high = (mean, mean) if sure and n > 1 else (np.nan, np.nan)
        return Estimate(mean, low, high, n, "bootstrap")
    if n > LARGE:
        shares = np.ones(n) if weights is None else weights / weights.mean()
        reach = float(stats.norm.ppf((1 + LEVEL) / 2) * np.std(shares * (values - mean), ddof=1)) / n**0.5
        return Estimate(mean, mean - reach, mean + reach, n, "normal")
    return Estimate(mean, *_bootstrap(values, weights, seed), n, "bootstrap")


def _bootstrap(values: np.ndarray, weights: np.ndarray | None, seed: int) -> tuple[float, float]:
    parts = (values,) if weights is None else (values * weights, weights)

    def statistic(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        top = resampled[0].mean(axis=axis)
        return top if len(resampled) == 1 else top / resampled[1].mean(axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            parts,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="BCa",
            batch=max(1, 1_000_000 // len(values)),
            rng=np.random.default_rng(seed),
        )
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():  # all resamples on one side of the mean: BCa is undefined
        low, high = np.quantile(found.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Test whether two runs differ in a yes or no on the same puzzles (exact McNemar test)."""
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    p_value = float(stats.binomtest(only_first, n).pvalue) if n else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def calibration(confidence: np.ndarray, right: np.ndarray, of: str = "answers") -> Calibration:
    """Compare confidence with accuracy: expected calibration error (Naeini et al. 2015), Brier score and bins."""
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=bool)
    if confidence.shape != right.shape or confidence.ndim != 1 or not len(confidence):
        msg = f"confidence and right must have the same length, got shapes {confidence.shape} and {right.shape}"
        raise ValueError(msg)
    if not ((confidence >= 0) & (confidence <= 1 + 1e-9)).all():
        raise ValueError("confidence must be between 0 and 1")
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows: list[Mapping[str, Any]] = []
    error = 0.0
    for b in np.unique(which).tolist():
        inside = which == b
        n, hits = int(inside.sum()), int(right[inside].sum())
        mean = float(confidence[inside].mean())
        error += n / len(right) * abs(hits / n - mean)
        low, high = wilson(hits, n)
        rows.append(
            {
                "low": b / BINS,
                "high": (b + 1) / BINS,
                "n": n,
                "confidence": mean,
                "accuracy": hits / n,
                "accuracy_low": low,
                "accuracy_high": high,
            }
        )
    brier = float(((confidence - right) ** 2).mean())
    return Calibration(of, float(error), brier, len(right), BINS, rows)
