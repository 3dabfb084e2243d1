import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.answer import format_answer
from recipe.cello1.evaluate import evaluate
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import error_record, prediction_record, puzzle_to_item, read_items, write_items
from recipe.cello1.voting import (
    assign,
    consensus,
    likeliest,
    logprob_weights,
    main,
    majority,
    medoid,
    merge_rounds,
    open_cells,
    read_answers,
    second_puzzle,
    vote_matrix,
    vote_records,
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
    assert found.expected_accuracy == pytest.approx(1.6 / 3)
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


def test_rows_may_share_a_column_if_asked():
    votes = np.array([[3, 1], [2, 1]])
    assert assign(votes, one_to_one=False).tolist() == [0, 0]
    assert sorted(assign(votes).tolist()) == [0, 1]


def test_logprob_weights():
    weights = logprob_weights([-10, -20, -5], [10, 10, 5])
    assert weights.sum() == pytest.approx(3)
    assert weights[0] == pytest.approx(weights[2])
    assert weights[0] / weights[1] == pytest.approx(np.e)
    assert logprob_weights([-10, -20], [10, 10], temperature=1e9) == pytest.approx([1, 1])
    for bad, match in (
        (([1], [1, 2]), "same length"),
        (([-np.inf], [1]), "finite"),
        (([-1], [1], 0), "temperature must be above 0"),
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


def puzzle(i=0):
    return Puzzle((("G1", f"X{i}"), ("G2",), ("G3",)), ABC, ("a", "b", "c"), "Context.", {"tissue": "blood"})


def test_second_round():
    found = consensus([("a", "b", "c")] * 3 + [("a", "c", "b")] * 2, ABC, 3)
    cells = open_cells(found, 0.9)
    assert cells == [1, 2]
    smaller = second_puzzle(puzzle(), found, cells)
    assert smaller.cells == (("G2",), ("G3",))
    assert (smaller.candidates, smaller.answer) == (("b", "c"), ("b", "c"))
    assert merge_rounds(found, cells, ("c", "b")) == ("a", "c", "b")
    assert open_cells(found, 0.5) == []
    with pytest.raises(ValueError, match="cells is empty"):
        second_puzzle(puzzle(), found, [])


def test_second_round_without_choice_or_gold():
    sure = consensus([("b", "a", "c")] * 5 + [("b", "a", "a")], ABC, 3)
    assert open_cells(sure, 0.99) == []  # one open cell and one type left
    wrong = consensus([("b", "a", "c")] * 3 + [("b", "c", "a")] * 2, ABC, 3)
    assert second_puzzle(puzzle(), wrong, open_cells(wrong, 0.9)).answer is None  # its gold type is taken


def records(texts, i=0, logprobs=None):
    common = {"index": i, "engine": "fake", "sampling": {"temperature": 1.0}}
    return [
        error_record(puzzle_to_item(puzzle(i)), "out of memory", sample=s, **common)
        if text is None
        else prediction_record(
            puzzle_to_item(puzzle(i)),
            text,
            finish_reason="stop",
            tokens=10,
            sample=s,
            **common,
            **({"logprob": logprobs[s]} if logprobs else {}),
        )
        for s, text in enumerate(texts)
    ]


TEXTS = [format_answer(("b", "a", "c")), format_answer(ABC, "because"), format_answer(ABC), "?", None]


def test_vote_records():
    (voted,) = vote_records(records(TEXTS))
    assert voted["prediction"] == format_answer(ABC, "because")
    assert voted["voted"] == [["b", "a", "c"], ["a", "b", "c"], ["a", "b", "c"], None]
    assert voted["cells"][2]["support"] == 1.0
    assert (voted["index"], voted["sample"], voted["tissue"], voted["rule"]) == (0, 0, "blood", "consensus")
    assert evaluate([voted], [puzzle()])["metrics"]["exact_match"]["mean"] == 1.0


def test_vote_records_by_other_rules():
    logprobs = [-1.0, -50.0, -60.0, -70.0, None]
    assert vote_records(records(TEXTS), rule="majority")[0]["prediction"] == format_answer(ABC, "because")
    assert vote_records(records(TEXTS), rule="medoid")[0]["prediction"] == format_answer(ABC, "because")
    chosen = vote_records(records(TEXTS, logprobs=logprobs), rule="likeliest")[0]
    assert chosen["prediction"] == format_answer(("b", "a", "c"))
    weighted = vote_records(records(TEXTS, logprobs=logprobs), weighted=True)[0]
    assert weighted["prediction"] == format_answer(("b", "a", "c"))


def test_votes_are_weighed_where_every_prediction_has_its_logprob():
    given = records(TEXTS, logprobs=[-1.0, -50.0, -60.0, -70.0, None])
    (voted,) = vote_records(given)
    assert voted["prediction"] == format_answer(("b", "a", "c"))
    assert voted["weights"] == pytest.approx(logprob_weights([-1.0, -50.0, -60.0, -70.0], [10] * 4))
    assert vote_records(given, weighted=False)[0]["prediction"] == format_answer(ABC, "because")
    (plain,) = vote_records([given[0], *records(TEXTS)[1:]])
    assert "weights" not in plain and plain["prediction"] == format_answer(ABC, "because")


def test_voted_matching_that_nobody_gave():
    texts = [format_answer(order) for order in (("a", "a", "c"), ("b", "b", "c"), ("a", "b", "b"))]
    assert vote_records(records(texts))[0]["prediction"] == format_answer(ABC)


def test_items_without_votes():
    failed, lost = vote_records([*records(["?", ""], 3), *records([None, None], 1)])
    assert (failed["index"], failed["error"]) == (1, "out of memory")
    assert lost["index"] == 3
    assert vote_records(records(["?"]), rule="medoid")[0]["prediction"] == ""


@pytest.mark.parametrize(
    ("options", "match"), [({"rule": "best"}, "rule must be one of"), ({"weighted": True}, "has no 'logprob'")]
)
def test_vote_records_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        vote_records(records(TEXTS), **options)


def test_command_weighs_unless_told_not_to(tmp_path):
    write_items(tmp_path / "p.jsonl", records(TEXTS, logprobs=[-1.0, -50.0, -60.0, -70.0, None]))
    for flags, types in (([], ("b", "a", "c")), (["--no-weighted"], ABC), (["--weighted"], ("b", "a", "c"))):
        assert main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "v.jsonl"), *flags]) == 0
        (voted,) = read_items(tmp_path / "v.jsonl")
        assert voted["prediction"].endswith(f"<answer>{' | '.join(types)}</answer>")


def test_command(tmp_path, capsys):
    write_items(tmp_path / "p.jsonl", records(TEXTS) + records(TEXTS, 1))
    assert main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "v.jsonl")]) == 0
    assert [record["index"] for record in read_items(tmp_path / "v.jsonl")] == [0, 1]
    assert "10 predictions combined into 2" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing.jsonl"), "--out", str(tmp_path / "v.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("voting: ")
