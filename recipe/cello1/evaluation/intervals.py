"""Means with intervals, paired differences, and calibration: the statistics of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
_BINS = 10  # of the calibration


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over puzzles and its interval.

    Attributes
    ----------
    mean
        The mean.
    low, high
        Ends of the 95% interval; NaN where none can be given (a single value).
    n
        Number of values.
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
        found = asdict(self)
        return found | {key: None if np.isnan(found[key]) else float(found[key]) for key in ("mean", "low", "high")}


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Give the Wilson score interval of a share (Wilson 1927).

    Parameters
    ----------
    successes, n
        How many of how many, ``n`` at least 1.

    Returns
    -------
    Ends of the 95% interval.
    """
    low, high = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def estimate(values: np.ndarray, *, seed: int, weights: np.ndarray | None = None) -> Estimate:
    """Estimate a mean over puzzles with a 95% interval.

    The bootstrap (BCa, Efron 1987) resamples puzzles; its jackknife takes time in proportion to their number. Where it
    cannot see any variation (all puzzles right, say) it would give an interval of no width, and for shares of a yes or
    no it is poor in small samples: these get the Wilson score interval.

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
        return Estimate(mean, *wilson(int(values.sum()), n), n, "wilson")
    if n < 2:
        return Estimate(mean, np.nan, np.nan, n, "bootstrap")
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, n, "bootstrap")
    return Estimate(mean, *_bootstrap(values, weights, seed), n, "bootstrap")


def _bootstrap(values: np.ndarray, weights: np.ndarray | None, seed: int) -> tuple[float, float]:
    parts = (values,) if weights is None else (values * weights, weights)

    def statistic(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        top = resampled[0].mean(axis=axis)
        return top if len(resampled) == 1 else top / resampled[1].mean(axis=axis)

    found = stats.bootstrap(
        parts,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        batch=max(1, 4_000_000 // len(values)),
        rng=np.random.default_rng(seed),
    )
    levels = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    corrected = _bca_levels(levels, found.bootstrap_distribution, float(statistic(*parts)), _jackknife(*parts))
    # All resamples on one side of the mean: BCa is undefined.
    low, high = np.quantile(found.bootstrap_distribution, corrected if np.isfinite(corrected).all() else levels)
    return float(low), float(high)


def _jackknife(top: np.ndarray, bottom: np.ndarray | None = None) -> np.ndarray:
    """Return the (weighted) mean without each of the values, from the sums: scipy's own takes n times as long."""
    left = top.sum() - top
    return left / (len(top) - 1) if bottom is None else left / (bottom.sum() - bottom)


def _bca_levels(levels: np.ndarray, resampled: np.ndarray, found: float, without: np.ndarray) -> np.ndarray:
    """Correct the levels of a percentile interval for bias and skewness (Efron 1987)."""
    below = ((resampled < found).mean() + (resampled <= found).mean()) / 2
    spread = without.mean() - without
    with np.errstate(all="ignore"):
        skew = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
        bias = stats.norm.ppf(below)
        shifted = bias + stats.norm.ppf(levels)
        return stats.norm.cdf(bias + shifted / (1 - skew * shifted))


def paired_difference(first: np.ndarray, second: np.ndarray, *, seed: int) -> Estimate:
    """Estimate how much higher the second of two runs is, on the same puzzles.

    Parameters
    ----------
    first, second
        One value per puzzle, length n, in the same order.
    seed
        Seed of the bootstrap, which resamples puzzles (so that what is hard for both is not counted as spread).

    Returns
    -------
    The mean of ``second - first``. No interval where all differences are the same.

    Raises
    ------
    ValueError
        If the lengths differ or there are no values.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        msg = f"first and second must have one value for each puzzle, got shapes {first.shape} and {second.shape}"
        raise ValueError(msg)
    change = second - first
    if len(change) < 2 or np.ptp(change) == 0:
        return Estimate(float(change.mean()), np.nan, np.nan, len(change), "bootstrap")
    return Estimate(float(change.mean()), *_bootstrap(change, None, seed), len(change), "bootstrap")


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Test whether two runs differ in a yes or no on the same puzzles (exact McNemar test).

    Parameters
    ----------
    first, second
        Boolean arrays of length n.

    Returns
    -------
    ``only_first`` and ``only_second`` (puzzles where just one says yes) and the two-sided ``p_value``.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    p_value = float(stats.binomtest(only_first, n).pvalue) if n else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Compare confidence with accuracy.

    Parameters
    ----------
    confidence
        Probabilities, length n, 0 to 1.
    right
        Whether each came true, boolean array of length n.

    Returns
    -------
    ``ece`` (expected calibration error: mean distance of accuracy from confidence over ten bins of equal width,
    weighted by their size; Naeini et al. 2015), ``brier`` (mean squared distance), ``n``, and ``bins``: for each that
    is not empty ``low``, ``high``, ``n``, ``confidence``, ``accuracy`` and the ends of its 95% interval.

    Raises
    ------
    ValueError
        If the lengths differ, there are no values, or a probability is out of range.
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=bool)
    if confidence.shape != right.shape or confidence.ndim != 1 or not len(confidence):
        msg = f"confidence and right must have the same length, got shapes {confidence.shape} and {right.shape}"
        raise ValueError(msg)
    if not ((confidence >= 0) & (confidence <= 1 + 1e-9)).all():
        msg = "confidence must be between 0 and 1"
        raise ValueError(msg)
    which = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
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
                "low": b / _BINS,
                "high": (b + 1) / _BINS,
                "n": n,
                "confidence": mean,
                "accuracy": hits / n,
                "accuracy_low": low,
                "accuracy_high": high,
            }
        )
    brier = float(((confidence - right) ** 2).mean())
    return {"ece": float(error), "brier": brier, "n": len(right), "bins": rows}
