import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.rl.shaping import Candidates, Overlong, Reasoning, Shaping, question_candidates, read_shaping
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import render_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import MODES, score_answer

TYPES = ("B cell", "NK cell", "T cell")
PUZZLE = Puzzle((("MS4A1",), ("NKG7",), ("CD3E",)), TYPES, TYPES)
QUESTION = render_user(PUZZLE)
ALL = {
    "overlong": {"buffer": 20, "factor": 0.5},
    "reasoning": {"min_words": 4, "share": 0.5},
    "candidates": {"credit": 0.2},
}


@pytest.mark.parametrize(
    ("n_tokens", "expected"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (1000, -1.0)]
)
def test_overlong_penalty_is_that_of_dapo(n_tokens, expected):
    assert Overlong(20)._term(n_tokens, 100) == pytest.approx(expected)
    assert Overlong(20, 0.3)._term(n_tokens, 100) == pytest.approx(0.3 * expected)


@given(st.integers(1, 500), st.integers(0, 3000), st.integers(0, 3000))
def test_longer_is_never_better(buffer, n, more):
    term = Overlong(buffer)
    assert -1 <= term._term(n + more, 1000) <= term._term(n, 1000) <= 0


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [("", -0.5), ("a", -0.375), ("a a a a a", -0.375), ("a b", -0.25), ("a b c d", 0.0), ("a b c d e f", 0.0)],
)
def test_collapsed_reasoning_loses_a_share_of_its_pay(reasoning, expected):
    text = format_answer(TYPES, reasoning)
    assert Reasoning(4, 0.5)._term(1.0, text) == pytest.approx(expected)
    assert Reasoning(4, 0.5)._term(0.25, text) == pytest.approx(expected / 4)


@pytest.mark.parametrize("score", [0.0, -1.0])
def test_unpaid_answers_lose_nothing_for_their_reasoning(score):
    assert Reasoning(4, 1.0)._term(score, format_answer(TYPES)) == 0.0


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("B cell | NK cell | T cell", 1),
        ("t CELL | b cell | nk cell", 1),
        ("B cell | NK cell | monocyte", 2 / 3),
        ("B cell | NK cell | NK cell", 2 / 3),
        ("B cell | NK cell", 2 / 3),
        ("B cell | NK cell | T cell | monocyte", 3 / 4),
        ("x | y | z", 0),
        ("", 0),
    ],
)
def test_credit_for_keeping_to_the_candidates(answer, share):
    score = score_answer(f"<think>x</think>\n<answer>{answer}</answer>", TYPES)
    found = Candidates(0.2)._term(score, *question_candidates(QUESTION))
    assert found == pytest.approx(0.2 * share)


def test_candidates_come_from_the_question_with_its_decoys():
    decoys = Puzzle((("MS4A1",), ("NKG7",)), ("B cell", "NK cell", "Plasma cell"))
    assert question_candidates(render_user(decoys)) == (frozenset({"b cell", "nk cell", "plasma cell"}), 2)


items = st.lists(st.sampled_from([*TYPES, "monocyte", "t cell"]), min_size=1, max_size=5)


@given(items, items, st.floats(0.01, 1), st.sampled_from(MODES))
def test_credit_and_guard_never_put_an_illegal_answer_above_a_legal_one(one, other, credit, mode):
    shaping = read_shaping({"candidates": {"credit": credit}, "reasoning": {"min_words": 9, "share": 1}})

    def shaped(answer):
        text = f"<think></think>\n<answer>{' | '.join(answer)}</answer>"
        score = score_answer(text, TYPES, mode)
        return score, score.score + sum(shaping.terms(score, text, 5, QUESTION).values())

    (score, value), (other_score, other_value) = shaped(one), shaped(other)
    if score.score < 0 <= other_score.score:
        assert value < other_value
    assert value >= score.score * (score.score < 0)  # what is withheld is at most what was paid


def test_terms_that_are_off_are_absent():
    score = score_answer(format_answer(TYPES), TYPES)
    assert not read_shaping(None)
    assert not read_shaping({"overlong": None})
    assert read_shaping(None).terms(score, "", 3) == {}
    on = read_shaping({"reasoning": {"min_words": 3}})
    assert on
    assert list(on.terms(score, format_answer(TYPES), 3)) == ["shaping_reasoning"]


@pytest.mark.parametrize("text", [format_answer(TYPES, "a b"), "", "nonsense", format_answer(TYPES[:2])])
def test_every_response_has_the_same_keys(text):
    terms = read_shaping(ALL, 100).terms(score_answer(text, TYPES), text, 90, QUESTION)
    assert list(terms) == ["shaping_overlong", "shaping_reasoning", "shaping_candidates"]
    assert all(type(value) is float for value in terms.values())
    assert terms["shaping_overlong"] == pytest.approx(-0.25)


def test_defaults():
    shaping = read_shaping({"overlong": {"buffer": 20}, "reasoning": {"min_words": 4}}, 100)
    assert shaping == Shaping(100, Overlong(20, 1.0), Reasoning(4, 0.5), None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (True, r"cello1\.shaping must be null or a mapping"),
        ({"lenght": {}}, r"cello1\.shaping\.lenght is unknown; cello1\.shaping has overlong, reasoning, candidates"),
        ({"overlong": 600}, r"cello1\.shaping\.overlong must be null or a mapping of buffer, factor, got 600"),
        ({"overlong": {"factor": 1.0}}, r"cello1\.shaping\.overlong\.buffer is not set"),
        ({"overlong": {"buffer": 0}}, r"overlong\.buffer must be a positive whole number, got 0"),
        ({"overlong": {"buffer": 1.5}}, r"overlong\.buffer must be a positive whole number, got 1\.5"),
        ({"overlong": {"buffer": True}}, r"overlong\.buffer must be a positive whole number, got True"),
        ({"overlong": {"buffer": 101}}, r"overlong\.buffer is 101 tokens.*data\.max_response_length=100"),
        ({"overlong": {"buffer": 10, "factor": -1}}, r"overlong\.factor must be a positive number, got -1"),
        ({"overlong": {"buffer": 10, "factor": float("nan")}}, r"overlong\.factor must be a positive number"),
        ({"overlong": {"buffer": 10, "max": 5}}, r"cello1\.shaping\.overlong\.max is unknown"),
        ({"reasoning": {"min_words": "9"}}, r"reasoning\.min_words must be a positive whole number, got '9'"),
        ({"reasoning": {"min_words": 9, "share": 2}}, r"reasoning\.share must be above 0 and at most 1, got 2"),
        ({"candidates": {}}, r"cello1\.shaping\.candidates\.credit is not set"),
        ({"candidates": {"credit": 0}}, r"candidates\.credit must be above 0 and at most 1, got 0"),
    ],
)
def test_bad_options_name_the_key(options, match):
    with pytest.raises(ValueError, match=match):
        read_shaping(options, 100)


def test_overlong_needs_the_longest_response():
    with pytest.raises(ValueError, match=r"data\.max_response_length, a positive number of tokens, got None"):
        read_shaping({"overlong": {"buffer": 10}})


def test_candidates_need_a_question_that_lists_them():
    with pytest.raises(ValueError, match=r"cello1\.shaping\.candidates reads the candidates from extra_info"):
        question_candidates(None)
    with pytest.raises(ValueError, match="variant 'batch_open' list no candidates"):
        question_candidates(render_user(PUZZLE, "batch_open"), "batch_open")
    with pytest.raises(ValueError, match="user message must have 3 blocks"):
        question_candidates("What are these?")
