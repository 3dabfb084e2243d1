"""From support to the chance of being right: the map, how it is fitted, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

Method = Literal["isotonic", "temperature"]
METHODS = get_args(Method)
LEAST = 10  # groups
_BINS = 10
_EDGE = 0.01  # support is kept this far from 0 and 1 where its logit is taken
_FOLDS = 5


def expected_calibration_error(support: np.ndarray, right: np.ndarray) -> float:
    """Return the mean distance of support and share right in ten bins of equal width, weighed by what is in them."""
    bins = np.minimum((support * _BINS).astype(int), _BINS - 1)
    sums = [np.bincount(bins, weights=values, minlength=_BINS) for values in (support, right.astype(float))]
    return float(np.abs(sums[0] - sums[1]).sum() / len(support))


def fit(support: np.ndarray, right: np.ndarray, method: Method, same: np.ndarray | None = None) -> dict[str, Any]:
    """Fit a map; what it is worth is measured on what it has not seen. What is the ``same`` stays together there."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    n_folds = min(_FOLDS, int(right.sum()), int((~right).sum()))
    unseen = np.empty(len(support))
    folds = StratifiedKFold if same is None else StratifiedGroupKFold
    for train, test in folds(n_folds, shuffle=True, random_state=0).split(support, right, same):
        unseen[test] = apply(_map(support[train], right[train], method), support[test])
    return _map(support, right, method) | {
        "n": len(support),
        "n_right": int(right.sum()),
        "ece_before": expected_calibration_error(support, right),
        "ece_after": expected_calibration_error(unseen, right),
        "auroc": float(roc_auc_score(right, support)),
    }


def _map(support: np.ndarray, right: np.ndarray, method: Method) -> dict[str, Any]:
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(support, right)
        return {"method": method, "x": fitted.X_thresholds_, "y": fitted.y_thresholds_}
    values = _logit(support)

    def loss(log_temperature: float) -> float:
        signed = np.where(right, 1, -1) * values / np.exp(log_temperature)
        return float(np.logaddexp(0, -signed).sum())

    found = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return {"method": method, "temperature": float(np.exp(found.x))}


def _logit(support: np.ndarray) -> np.ndarray:
    return logit(np.clip(support, _EDGE, 1 - _EDGE))


def apply(calibration: Mapping[str, Any], support: np.ndarray) -> np.ndarray:
    """Map support."""
    if calibration["method"] == "isotonic":
        return np.interp(support, calibration["x"], calibration["y"])
    return expit(_logit(np.asarray(support, dtype=float)) / float(calibration["temperature"]))


def check_calibration(calibration: object) -> None:
    """Check what a caller gives as a map."""
    if isinstance(calibration, Mapping):
        method = calibration.get("method")
        lacking = {"isotonic": ("x", "y"), "temperature": ("temperature",)}.get(str(method))
        if lacking and all(name in calibration for name in (*lacking, "support")):
            return
    raise ValueError(
        f"calibration must be what tl.calibrate has stored, labelled.uns['cello1']['calibration'], "
        f"got {type(calibration).__name__}"
    )
