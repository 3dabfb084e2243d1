import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.voting import (
    assign,
    consensus,
    likeliest,
    logprob_weights,
    majority,
    matched,
    medoid,
    read_answers,
    vote_matrix,
)

ABC = ("a", "b", "c")


def test_read_answers():
    texts = [format_answer(ABC), format_answer(("a", "a", "b")), format_answer(("a", "b")), "?", None, b"x", ""]
    assert read_answers(texts, 3) == [ABC, ("a", "a", "b"), None, None, None, None, None]


def test_vote_matrix_ignores_case_and_strangers():
    votes = vote_matrix([("A", "b", "x"), None, ("a", "c", "b")], ABC, 3, weights=[1, 5, 0.5])
    assert votes.tolist() == [[1.5, 0, 0], [0, 1, 0.5], [0, 0.5, 0]]


@pytest.mark.parametrize(
    ("weights", "match"),
    [([1], "one number for each of the 2"), ([1, -1], "0 or more"), ([1, np.nan], "finite")],
)
def test_bad_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        vote_matrix([ABC, ABC], ABC, 3, weights)


def test_answer_of_another_length():
    with pytest.raises(ValueError, match="must have 3 types"):
        vote_matrix([("a",)], ABC, 3)


def test_consensus_by_hand():
    # Cell 1 and 2 both lean to "a"; cell 1 needs it more.
    answers = [("a", "b", "c"), ("a", "c", "b"), ("b", "a", "c"), ("a", "b", "c"), ("c", "a", "b")]
    found = consensus(answers, ABC, 3, smoothing=0)
    assert found.types == ("a", "b", "c")
    assert found.support.tolist() == [0.6, 0.4, 0.6]
    assert found.margin == pytest.approx([0.4, 0.0, 0.2])
    assert found.entropy[0] == pytest.approx(-(0.6 * np.log2(0.6) + 2 * 0.2 * np.log2(0.2)))
    assert found.probability.tolist() == found.support.tolist()
    assert found.probability.mean() == pytest.approx(1.6 / 3)
    assert (found.n_answers, found.n_used) == (5, 5)
    assert majority(answers, ABC, 3) == ("a", "a", "c")  # of equals the first


def test_consensus_is_a_matching_where_the_majority_is_not():
    answers = [("a", "b", "c"), ("a", "c", "b"), ("b", "a", "c"), ("c", "a", "b"), ("a", "a", "c")]
    assert majority(answers, ABC, 3) == ("a", "a", "c")
    found = consensus(answers, ABC, 3)
    assert sorted(found.types) == list(ABC)
    assert found.margin.min() < 0


@given(st.data())
def test_consensus_has_the_highest_expected_accuracy_of_all_matchings(data):
    n = data.draw(st.integers(1, 4))
    candidates = "abcde"[: data.draw(st.integers(n, 5))]
    answer = st.permutations(candidates).map(lambda order: tuple(order[:n])) | st.none()
    answers = data.draw(st.lists(answer, min_size=1, max_size=9))
    weights = data.draw(st.lists(st.floats(0, 3), min_size=len(answers), max_size=len(answers)))
    smoothing = data.draw(st.sampled_from([0, 0.5, 3.0]))
    found = consensus(answers, candidates, n, weights=weights, smoothing=smoothing)
    votes = vote_matrix(answers, candidates, n, weights)
    totals = votes.sum(axis=1, keepdims=True) + smoothing
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(totals > 0, (votes + smoothing / len(candidates)) / totals, 1 / len(candidates))
    best = max(p[range(n), list(order)].sum() for order in itertools.permutations(range(len(candidates)), n))
    assert found.probability.sum() == pytest.approx(best, abs=1e-4)
    assert len(set(found.types)) == n
    assert ((found.support >= 0) & (found.support <= 1 + 1e-12)).all()
    json.dumps(found.cells(), allow_nan=False)


def test_ties_go_to_the_most_common_answer():
    answers = [("b", "a"), ("a", "b")]
    assert consensus(answers, ("a", "b"), 2).types == ("b", "a")
    assert consensus(answers[::-1], ("a", "b"), 2).types == ("a", "b")
    assert consensus([*answers, ("a", "b"), ("b", "a"), ("a", "b"), ("b", "b")], ("a", "b"), 2).types == ("a", "b")


def test_one_answer_is_its_own_consensus():
    for order in itertools.permutations("abcd"):
        assert consensus([order], "abcd", 4).types == order


def test_decoys():
    found = consensus([("a", "d"), ("a", "d"), ("b", "d")], "abcd", 2)
    assert found.types == ("a", "d")


def test_duplicated_types_still_vote():
    assert consensus([("a", "a"), ("b", "a")], ("a", "b"), 2).types == ("b", "a")


def test_no_usable_answer_is_no_certainty():
    found = consensus([None, None], ABC, 3)
    assert sorted(found.types) == list(ABC)
    assert (found.n_answers, found.n_used) == (2, 0)
    assert found.support.tolist() == [0, 0, 0]
    assert found.probability == pytest.approx([1 / 3] * 3)
    assert found.cells()[0]["entropy"] is None


def test_weights_decide():
    answers = [("a", "b"), ("b", "a"), ("b", "a")]
    assert consensus(answers, ("a", "b"), 2).types == ("b", "a")
    assert consensus(answers, ("a", "b"), 2, weights=[3, 1, 1]).types == ("a", "b")


def test_smoothing_keeps_few_votes_from_being_a_certainty():
    few, many = consensus([ABC], ABC, 3), consensus([ABC] * 20, ABC, 3)
    assert few.support.tolist() == many.support.tolist() == [1, 1, 1]
    assert few.probability[0] < many.probability[0] < 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], ABC, 3), "answers is empty"),
        (([("a", "b", "c")], ("a", "b"), 3), "no one-to-one assignment"),
        (([("a",)], ("a", "A"), 1), "differ by more than case"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        consensus(*arguments)


@pytest.mark.parametrize(
    ("votes", "smoothing", "match"),
    [(np.zeros((0, 2)), 0, "non-empty"), (np.array([[1, -1]]), 0, "0 or more"), (np.ones((1, 2)), -1, "smoothing")],
)
def test_bad_votes(votes, smoothing, match):
    with pytest.raises(ValueError, match=match):
        assign(votes, smoothing=smoothing)


@given(st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 1.0]))
def test_matched_is_the_share_of_each_choice_among_the_matchings(n, spare, seed, concentration):
    own = np.random.default_rng(seed).dirichlet(np.full(n + spare, concentration), n)
    rows = 0.99 * own + 0.01 / (n + spare)
    expected = np.zeros_like(rows)
    for columns in itertools.permutations(range(n + spare), n):
        expected[range(n), columns] += rows[range(n), columns].prod()
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(matched(own * 3, smoothing=0.01), expected, atol=1e-12)


def test_what_another_cell_certainly_has_is_left_to_no_one_else():
    own = np.array([[0.5, 0.5], [0.0, 1.0]])
    assert matched(own)[0, 0] > 0.999
    np.testing.assert_allclose(matched(np.full((15, 15), 2.0)), 1 / 15)
    many = np.eye(16)  # too many sets of columns: as they are
    np.testing.assert_allclose(matched(many), 0.999 * many + 0.001 / 16)


@pytest.mark.parametrize("smoothing", [0.0, -1, 1.1, float("nan")])
def test_matched_needs_some_smoothing(smoothing):
    with pytest.raises(ValueError, match="smoothing must be above 0 and at most 1"):
        matched(np.eye(2), smoothing=smoothing)


@pytest.mark.parametrize("bad", [np.ones((3, 2)), np.array([[np.nan, 1]]), -np.eye(2), np.ones(3), np.ones((0, 2))])
def test_matched_needs_a_matrix_of_probabilities(bad):
    with pytest.raises(ValueError, match="probabilities (must be|has 3 rows)"):
        matched(bad)


def test_rows_may_share_a_column_if_asked():
    votes = np.array([[3, 1], [2, 1]])
    assert assign(votes, one_to_one=False).tolist() == [0, 0]
    assert sorted(assign(votes).tolist()) == [0, 1]


def test_logprob_weights():
    weights = logprob_weights([-10, -20, -5], [10, 10, 5])
    assert weights.sum() == pytest.approx(3)
    assert weights[0] == pytest.approx(weights[2])
    assert weights[0] / weights[1] == pytest.approx(np.e)
    for bad, match in (
        (([1], [1, 2]), "same length"),
        (([-np.inf], [1]), "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            logprob_weights(*bad)


def test_medoid():
    assert medoid([("a", "b", "c"), ("b", "a", "c"), ("b", "c", "a"), ("a", "B", "c")]) == ("a", "b", "c")
    assert medoid([("a", "a"), ("a", "a"), ("b", "a"), None]) == ("b", "a")  # legal ones first
    assert medoid([None]) is None


def test_likeliest():
    answers = [("a", "b"), ("b", "a"), None]
    assert likeliest(answers, [0.1, 0.3, 0.6]) == ("b", "a")
    assert likeliest([None], [1.0]) is None
