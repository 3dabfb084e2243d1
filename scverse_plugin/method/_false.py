"""How often a label is false, estimated by decoys, and the support from which on it is so seldom enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True, slots=True)
class FalseRate:
    """A threshold, and the share of false labels to expect beyond it, with its 95% interval."""

    threshold: float  # infinite where no support is enough
    rate: float  # NaN where there is no label or no decoy was shown
    low: float
    high: float


def find_threshold(support: np.ndarray, decoys: np.ndarray, n_wrong: float, n_units: int, allowed: float) -> FalseRate:
    """Find the lowest support at which the labels that reach it are false seldom enough.

    ``support`` are those of the units that would get a label, ``decoys`` those of each decoy in each unit that met it.
    """
    # A wrong type is taken to be given as often as a decoy. A unit has n_wrong of them: so many false labels are
    # expected, of those that there are.
    levels = np.unique(support)
    n = len(decoys)
    if not n or not len(levels):
        return FalseRate(np.inf, *[np.nan] * 3)
    n_labels = len(support) - np.searchsorted(np.sort(support), levels)
    n_decoys = n - np.searchsorted(np.sort(decoys), levels)
    factor = n_wrong * n_units / n_labels
    enough = np.flatnonzero(factor * n_decoys / n <= allowed)
    if not len(enough):
        return FalseRate(np.inf, *[np.nan] * 3)
    i = int(enough[0])
    interval = binomtest(int(n_decoys[i]), n).proportion_ci(0.95, "exact")
    found = [min(1.0, float(factor[i] * share)) for share in (n_decoys[i] / n, interval.low, interval.high)]
    return FalseRate(float(levels[i]), *found)
