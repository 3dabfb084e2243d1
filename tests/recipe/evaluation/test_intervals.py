import json
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from recipe.cello1.evaluation import intervals
from recipe.cello1.evaluation.intervals import Estimate, calibration, estimate, mcnemar, paired_difference
from recipe.cello1.evaluation.results import plain


def test_interval_of_a_share_is_wilsons():
    found = estimate(np.array([1.0] * 8 + [0.0] * 2), seed=0)
    assert (found.mean, found.n, found.method) == (0.8, 10, "wilson")
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson (1927), 8 of 10


def test_interval_of_a_sure_thing_is_not_empty():
    found = estimate(np.ones(20), seed=0)
    assert found.low < 0.9
    assert found.high == 1.0


def test_interval_by_bootstrap_is_seeded_and_sane():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = estimate(values, seed=1)
    assert found == estimate(values, seed=1)
    assert found != estimate(values, seed=2)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = estimate(rng.choice([0, 1 / 3, 1.0], size=60), seed=trial)
        hits += found.low <= 4 / 9 <= found.high
    assert 180 <= hits <= 199


def test_weighted_mean_and_its_interval():
    rng = np.random.default_rng(0)
    weights = rng.integers(2, 9, 300).astype(float)
    values = rng.random(300)
    found = estimate(values, seed=0, weights=weights)
    assert found.mean == pytest.approx(np.average(values, weights=weights))
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("weighted", [False, True])
def test_interval_is_scipys_bca(weighted):
    rng = np.random.default_rng(0)
    values, weights = rng.gamma(0.7, 2.0, 80), rng.integers(2, 9, 80).astype(float)
    parts = (values * weights, weights) if weighted else (values,)

    def mean(top, bottom=None, axis=-1):
        return top.mean(axis=axis) / (1 if bottom is None else bottom.mean(axis=axis))

    expected = stats.bootstrap(
        parts, mean, paired=True, vectorized=True, n_resamples=2000, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    found = estimate(values, seed=3, weights=weights if weighted else None)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)


def test_the_time_of_an_interval_is_not_quadratic(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 9)
    values = np.random.default_rng(0).random(20_000)
    tracemalloc.start()
    found = estimate(values, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.method == "normal"
    assert peak < 50 * values.nbytes  # a jackknife by copies takes 20,000 times as much, in pieces of 32 MB


@pytest.mark.parametrize("weighted", [False, True])
def test_the_interval_of_many_puzzles_agrees_with_the_bootstrap(monkeypatch, weighted):
    rng = np.random.default_rng(0)
    values, weights = rng.choice([0, 1 / 3, 1.0], 2001), rng.integers(5, 12, 2001).astype(float)
    options = {"seed": 0, "weights": weights if weighted else None}
    normal = estimate(values, **options)
    monkeypatch.setattr(intervals, "LARGE", 3000)
    bootstrap = estimate(values, **options)
    assert (normal.method, bootstrap.method) == ("normal", "bootstrap")
    assert (normal.low, normal.high) == pytest.approx((bootstrap.low, bootstrap.high), abs=2e-3)


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25], [0.1, 0.9], [1.0], [0.0, 0.0, 0.0, 0.3]])
def test_small_samples_do_not_break(values):
    found = estimate(np.array(values), seed=0)
    assert found.mean == pytest.approx(np.mean(values))
    assert np.isnan(found.low) or found.low <= found.mean <= found.high
    json.dumps(plain(found), allow_nan=False)


def test_estimate_of_nothing():
    with pytest.raises(ValueError, match="values is empty"):
        estimate(np.array([]), seed=0)


def test_unknown_interval_is_null():
    assert plain(Estimate(0.5, np.nan, np.nan, 1, "bootstrap"))["low"] is None


def test_paired_difference_takes_out_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    found = paired_difference(hard, hard + 0.05 + rng.normal(0, 0.01, 200), seed=0)
    assert found.mean == pytest.approx(0.05, abs=0.005)
    assert 0.045 < found.low < found.mean < found.high < 0.055
    assert np.isnan(paired_difference(hard, hard, seed=0).low)
    with pytest.raises(ValueError, match="one value for each puzzle"):
        paired_difference(hard, hard[1:], seed=0)


def test_mcnemar():
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    second = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    # Two-sided exact binomial test, 1 of 8: 2 * (1 + 8) / 2**8
    assert mcnemar(first, second) == {"only_first": 1, "only_second": 7, "p_value": pytest.approx(18 / 256)}
    assert mcnemar(first, first)["p_value"] == 1


def test_calibration_by_hand():
    confidence = np.array([0.95, 0.92, 0.98, 0.15, 0.11, 0.0, 1.0])
    right = np.array([1, 1, 0, 0, 1, 0, 1], dtype=bool)
    found = calibration(confidence, right)
    assert [row["n"] for row in found.bins] == [1, 2, 4]
    gaps = [0.0, abs(0.5 - 0.13), abs(0.75 - 0.9625)]
    assert (found.of, found.n, found.n_bins) == ("answers", 7, 10)
    assert found.ece == pytest.approx((gaps[0] + 2 * gaps[1] + 4 * gaps[2]) / 7)
    assert found.brier == pytest.approx(((confidence - right) ** 2).mean())


def test_calibrated_confidence_has_little_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    right = rng.random(20_000) < confidence
    assert calibration(confidence, right).ece < 0.02
    assert calibration(confidence, ~right).ece > 0.3


@pytest.mark.parametrize(
    ("confidence", "right", "match"),
    [([0.5], [True, False], "same length"), ([], [], "same length"), ([1.5], [True], "between 0 and 1")],
)
def test_bad_calibration(confidence, right, match):
    with pytest.raises(ValueError, match=match):
        calibration(np.array(confidence), np.array(right))
