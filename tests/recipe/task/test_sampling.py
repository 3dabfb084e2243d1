import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task import sampling
from recipe.cello1.task.sampling import PuzzleIndex, _groups, sample_puzzles

TYPES = ("B cell", "T cell")


def possible_puzzles(labels, donors, sizes, batches=None):
    """How many different cell sets of each size there are."""
    groups = _groups(labels, donors, batches)
    return {size: sum(group.n_sets(size) for group in groups) for size in sizes}


class FakeCategorical:
    """What a pandas categorical looks like from outside, without pandas."""

    def __init__(self, codes, categories):
        self.codes = codes
        self.categories = categories


class FakeSeries:
    def __init__(self, categorical):
        self.cat = categorical


def toy(n=400, n_labels=12, n_donors=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.array([f"type {i:02d}" for i in range(n_labels)])[rng.integers(n_labels, size=n)]
    donors = np.array([f"donor {i}" for i in range(n_donors)])[rng.integers(n_donors, size=n)]
    return labels, donors


def test_sampled_puzzles_are_legal():
    labels, donors = toy()
    batches = np.array(["x", "y"])[np.random.default_rng(1).integers(2, size=len(labels))]
    found = sample_puzzles(labels, donors, sizes=range(3, 8), n_per_size=20, rng=0, batches=batches)
    assert Counter(len(puzzle.rows) for puzzle in found) == {size: 20 for size in range(3, 8)}
    assert [len(puzzle.rows) for puzzle in found] == sorted(len(puzzle.rows) for puzzle in found)
    for puzzle in found:
        rows = list(puzzle.rows)
        assert tuple(labels[rows]) == puzzle.labels
        assert len(set(puzzle.labels)) == len(rows)
        assert set(donors[rows]) == {puzzle.donor}
        assert set(batches[rows]) == {puzzle.batch}
        assert puzzle.candidates == tuple(sorted(puzzle.labels))
        assert all(isinstance(row, int) for row in rows)
    assert len({frozenset(puzzle.rows) for puzzle in found}) == len(found)
    assert {puzzle.donor for puzzle in found} == set(donors)


def test_cells_are_shuffled():
    labels, donors = toy()
    found = sample_puzzles(labels, donors, sizes=[5], n_per_size=40, rng=0)
    assert any(puzzle.labels != puzzle.candidates for puzzle in found)
    # Every type stands in every place now and then: no place tells the type.
    first = Counter(puzzle.labels[0] for puzzle in sample_puzzles(labels, None, sizes=[12], n_per_size=600, rng=0))
    assert len(first) == 12
    assert max(first.values()) < 100


def test_same_seed_same_puzzles():
    labels, donors = toy()
    options = dict(sizes=[3, 9], n_per_size=15)
    once = sample_puzzles(labels, donors, rng=7, **options)
    assert sample_puzzles(list(labels), list(donors), rng=np.random.default_rng(7), **options) == once
    assert sample_puzzles(labels.astype(object), donors, rng=7, **options) == once
    assert sample_puzzles(labels, donors, rng=8, **options) != once
    names, codes = np.unique(labels, return_inverse=True)
    backwards = FakeCategorical(len(names) - 1 - codes, [*names[::-1], "never used"])
    assert sample_puzzles(backwards, donors, rng=7, **options) == once
    assert sample_puzzles(FakeSeries(backwards), donors, rng=7, **options) == once


def test_same_seed_same_puzzles_whatever_the_hash_seed():
    code = (
        "import numpy as np; from recipe.cello1.task.sampling import sample_puzzles;"
        "labels = [f't{i % 7}' for i in range(60)]; donors = [f'd{i % 2}' for i in range(60)];"
        "print(sample_puzzles(labels, donors, sizes=[2, 5, 7], n_per_size=30, rng=3))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "PuzzleIndex" in outputs.pop()


def test_few_cells_give_every_puzzle_once():
    labels = ["a", "a", "b", "c", "c", "c"]
    assert possible_puzzles(labels, None, sizes=[1, 2, 3, 4]) == {1: 6, 2: 11, 3: 6, 4: 0}
    found = sample_puzzles(labels, None, sizes=[1, 2, 3, 4], n_per_size=100, rng=0)
    assert Counter(len(puzzle.rows) for puzzle in found) == {1: 6, 2: 11, 3: 6}
    assert len({frozenset(puzzle.rows) for puzzle in found}) == len(found)
    assert {(puzzle.donor, puzzle.batch) for puzzle in found} == {("", "")}


def test_wanted_number_is_met_when_small_donors_run_out():
    labels = ["a", "b"] * 40 + ["a", "b", "a", "b"]
    donors = ["big"] * 80 + ["small 1"] * 2 + ["small 2"] * 2
    assert possible_puzzles(labels, donors, sizes=[2]) == {2: 1602}
    found = sample_puzzles(labels, donors, sizes=[2], n_per_size=300, rng=0)
    assert Counter(puzzle.donor for puzzle in found) == {"big": 298, "small 1": 1, "small 2": 1}
    assert len({frozenset(puzzle.rows) for puzzle in found}) == 300


def test_donors_with_too_few_types_are_skipped():
    labels = ["a", "b", "c", "a", "b"]
    donors = ["x", "x", "x", "y", "y"]
    found = sample_puzzles(labels, donors, sizes=[3], n_per_size=5, rng=0)
    assert [puzzle.donor for puzzle in found] == ["x"]
    assert sample_puzzles(labels, donors, sizes=[4], n_per_size=5, rng=0) == []


def test_missing_labels_and_donors_are_not_drawn():
    labels = ["a", None, float("nan"), "", "b", "a", "b", "<NA>", " "]
    donors = ["x", "x", "x", "x", "x", None, float("nan"), "x", "x"]
    (found,) = sample_puzzles(labels, donors, sizes=[2], n_per_size=5, rng=0)
    assert sorted(found.rows) == [0, 4]
    masked = FakeCategorical(np.array([0, -1, 1], dtype=np.int8), ["a", "b"])
    assert possible_puzzles(masked, None, sizes=[1, 2]) == {1: 2, 2: 1}


def test_missing_batch_is_a_batch_of_its_own():
    labels, batches = ["a", "b", "a", "b"], [None, None, "1", "1"]
    found = sample_puzzles(labels, None, sizes=[2], n_per_size=9, rng=0, batches=batches)
    assert sorted((puzzle.batch, tuple(sorted(puzzle.rows))) for puzzle in found) == [("", (0, 1)), ("1", (2, 3))]


def test_no_cells_no_puzzles():
    assert sample_puzzles([], [], sizes=[2], n_per_size=1, rng=0) == []
    assert sample_puzzles([None, None], None, sizes=[1], n_per_size=1, rng=0) == []
    assert possible_puzzles(np.array([]), None, sizes=[1]) == {1: 0}


@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=1, max_size=25),
    data=st.data(),
    wanted=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_as_many_as_wanted_or_possible(labels, data, wanted, seed):
    donors = data.draw(st.lists(st.sampled_from("xy"), min_size=len(labels), max_size=len(labels)))
    sizes = [1, 2, 3, 4]
    possible = possible_puzzles(labels, donors, sizes=sizes)
    found = sample_puzzles(labels, donors, sizes=sizes, n_per_size=wanted, rng=seed)
    counted = Counter(len(puzzle.rows) for puzzle in found)
    assert {size: counted[size] for size in sizes} == {size: min(wanted, possible[size]) for size in sizes}
    assert len({(len(puzzle.rows), frozenset(puzzle.rows)) for puzzle in found}) == len(found)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rng": None}, "rng is None"),
        ({"n_per_size": 0}, "n_per_size must be a positive integer, got 0"),
        ({"n_per_size": 1.5}, "n_per_size must be a positive integer, got 1.5"),
        ({"n_per_size": True}, "n_per_size must be"),
        ({"sizes": [2, 0]}, "sizes must hold positive integers, got 0"),
        ({"sizes": [2, 2]}, r"holds a size twice: \[2, 2\]"),
        ({"donors": ["x"]}, "donors has 1 entries for 2 labels"),
        ({"batches": ["x"] * 3}, "batches has 3 entries for 2 labels"),
    ],
)
def test_bad_requests_are_named(changes, match):
    options = {"labels": ["a", "b"], "donors": None, "sizes": [2], "n_per_size": 1, "rng": 0} | changes
    with pytest.raises(ValueError, match=match):
        sample_puzzles(**options)


def test_puzzle_index_is_a_plain_value():
    assert PuzzleIndex((1, 2), ("b", "a")) == PuzzleIndex(rows=(1, 2), labels=("b", "a"), donor="", batch="")


def test_many_cells_are_grouped_once(monkeypatch):
    """Hundreds of puzzles from many cells: the labels are read once, not once for each puzzle or size."""
    labels, donors = toy(n=100_000, n_labels=30, n_donors=10)
    calls = []
    group = sampling._groups
    monkeypatch.setattr(sampling, "_groups", lambda *columns: calls.append(1) or group(*columns))
    assert len(sample_puzzles(labels, donors, sizes=range(8, 16), n_per_size=40, rng=0)) == 320
    assert len(calls) == 1
