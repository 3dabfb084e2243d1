import numpy as np
import pandas as pd
import pytest

from recipe.cello1.task.labels import make_labels
from recipe.cello1.task.sampling import sample_puzzles


@pytest.mark.parametrize(
    "values",
    [
        pd.Categorical(["b", None, "a", "unknown", "b"]),
        np.array(["b", "nan", "a", "", "b"], dtype=object),
        np.array(["b", "NA", "a", "None", "b"]),
        [b"b", None, b"a", float("nan"), b"b"],
    ],
)
def test_labels_of_text(values):
    labels = make_labels(values)
    assert labels.categories == ("a", "b")
    assert labels.codes.tolist() == [1, -1, 0, -1, 1]
    assert [labels.value(row) for row in range(5)] == ["b", "", "a", "", "b"]
    assert len(labels.take(np.array([0, 2]))) == 2


def test_labels_of_numbers():
    labels = make_labels(np.array([24.5, np.nan, 3.0]))
    assert [labels.value(row) for row in range(3)] == ["24.5", "", "3.0"]
    for values in (np.array([23.45], np.float32), pd.Categorical(np.array([23.45], np.float32))):
        assert make_labels(values).categories == ("23.45",)
    assert make_labels(np.array([True, False])).categories == ("False", "True")


def test_labels_serve_the_sampler_as_categories():
    labels = make_labels(pd.Categorical(["b", "a", "unknown"]))
    (puzzle,) = sample_puzzles(labels, None, sizes=[2], n_per_size=1, rng=0)
    assert puzzle.candidates == ("a", "b")


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(["b", "a", None], dtype="category"),
        pd.Series(["b", "a", pd.NA], dtype="string"),
        pd.Series(["b ", "a", "\u200b"]),
        ["b", "a", None],
        ("b", "a", float("nan")),
        np.array([b"b", b"a", b""]),
    ],
)
def test_however_a_column_comes_its_codes_are_the_same(values):
    labels = make_labels(values)
    assert (labels.codes.tolist(), labels.categories) == ([1, 0, -1], ("a", "b"))


def test_the_order_is_the_callers():
    assert make_labels(["a", "b"], str.upper, lambda names: sorted(names, reverse=True)).categories == ("B", "A")


def test_numbers_in_a_list_keep_their_type():
    assert make_labels([1, 2.5, None]).categories == ("1", "2.5")
