import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task import answer
from recipe.cello1.task.answer import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    Reason,
    format_answer,
    join_types,
    parse_answer,
    split_types,
    type_fault,
)
from recipe.cello1.task.text import normal_form

RIGHT = "<think>CD19 is high</think>\n<answer>B cell | T cell</answer>"

# Types as users have them: anything on one line without the separator, trimmed, and without our tags.
type_names = st.text(min_size=1, max_size=12).map(normal_form).map(str.strip).filter(lambda name: not type_fault(name))
reasonings = st.text(max_size=60).filter(lambda text: not any(tag in text for tag in TAGS))
# Text built from the pieces that matter, beside plain noise.
pieces = st.sampled_from(
    [
        *TAGS,
        f"{THINK_CLOSE}\n{ANSWER_OPEN}",
        "|",
        " | ",
        "a",
        "b",
        "A",
        " ",
        "\n",
        "\r\n",
        "\u2028",
        "\v",
        "<",
        ">",
        "\ud800",
    ]
)
texts = st.one_of(st.text(max_size=200), st.lists(pieces, max_size=25).map("".join))


def wrapped(inside: str, reasoning: str = "r") -> str:
    return f"{THINK_OPEN}{reasoning}{THINK_CLOSE}\n{ANSWER_OPEN}{inside}{ANSWER_CLOSE}"


def test_tags_are_spelled_as_published():
    assert TAGS == ("<think>", "</think>", "<answer>", "</answer>")


def test_parse_reads_items_and_reasoning():
    parsed = parse_answer(RIGHT)
    assert parsed.items == ("B cell", "T cell")
    assert parsed.reasoning == "CD19 is high"
    assert parsed.ok
    assert parsed.separated
    assert parsed.reason is Reason.OK
    assert not parsed.reason


@given(types=st.lists(type_names, min_size=1, max_size=15), reasoning=reasonings)
def test_format_then_parse_gives_the_types_back(types, reasoning):
    parsed = parse_answer(format_answer(types, reasoning))
    assert parsed.ok
    assert parsed.items == tuple(types)
    assert parsed.reasoning == reasoning
    assert parsed.separated == (len(types) > 1)


@given(types=st.lists(type_names, min_size=1, max_size=8))
def test_join_then_split(types):
    assert split_types(join_types(types)) == tuple(types)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, Reason.NOT_TEXT),
        (b"<think></think>\n<answer>a | b</answer>", Reason.NOT_TEXT),
        (3.5, Reason.NOT_TEXT),
        (["a"], Reason.NOT_TEXT),
        ("", Reason.EMPTY),
        (" \n\t ", Reason.EMPTY),
        ("B cell | T cell", Reason.MISSING_TAG),
        ("<answer>a | b</answer>", Reason.MISSING_TAG),
        ("the prompt had the tag</think>\n<answer>a | b</answer>", Reason.MISSING_TAG),
        ("<THINK>x</THINK>\n<ANSWER>a | b</ANSWER>", Reason.MISSING_TAG),
        ("<think>x</think>\n<answer>a | b </answer >", Reason.UNFINISHED),
        ("<think>x and so on", Reason.UNFINISHED),
        ("<think>x</think>\n", Reason.UNFINISHED),
        ("<think>x</think>\n<answer>a | ", Reason.UNFINISHED),
        ("<think>the <answer> tag</think>\n<answer>a | b</answer>", Reason.REPEATED_TAG),
        (RIGHT + RIGHT, Reason.REPEATED_TAG),
        ("\n" + RIGHT, Reason.TEXT_OUTSIDE),
        ("Sure. " + RIGHT, Reason.TEXT_OUTSIDE),
        (RIGHT + "\n\n", Reason.TEXT_OUTSIDE),
        (RIGHT + "\r\n", Reason.TEXT_OUTSIDE),
        (RIGHT + "<|im_end|>", Reason.TEXT_OUTSIDE),
        ("<think>x</think><answer>a | b</answer>", Reason.BAD_JOINT),
        ("<think>x</think>\n\n<answer>a | b</answer>", Reason.BAD_JOINT),
        ("<think>x</think> \n<answer>a | b</answer>", Reason.BAD_JOINT),
        ("<think>x</think>\r\n<answer>a | b</answer>", Reason.BAD_JOINT),
        ("<think><answer>a | b</think>\n</answer>", Reason.BAD_JOINT),
        (wrapped(""), Reason.EMPTY_ANSWER),
        (wrapped(" \n \n"), Reason.EMPTY_ANSWER),
        (wrapped(" | || "), Reason.EMPTY_ANSWER),
        (wrapped("\n|\n"), Reason.EMPTY_ANSWER),
        (wrapped("a | b\nb | a"), Reason.CONTRADICTION),
        (wrapped("a | b\n| c"), Reason.CONTRADICTION),
        (wrapped("a | b |\nc"), Reason.CONTRADICTION),
        (wrapped("\nno list here\na | b\nremark\nb | a\n"), Reason.CONTRADICTION),
        (wrapped("a | b\u2028b | a"), Reason.CONTRADICTION),
    ],
)
def test_malformed_text_has_a_named_reason(text, reason):
    parsed = parse_answer(text)
    assert parsed.reason is reason
    assert not parsed.ok
    assert parsed.items == ()


def test_reasoning_of_malformed_text_is_kept_for_display():
    assert parse_answer("x <think>why</think> no answer").reasoning == "why"
    assert parse_answer("<think>why").reasoning == ""


@pytest.mark.parametrize(
    ("inside", "items"),
    [
        ("a | b", ("a", "b")),
        ("  a|b  ", ("a", "b")),
        ("| a || b |", ("a", "b")),
        ("a | b\n", ("a", "b")),
        ("a | b |\n|\n", ("a", "b")),  # the rest holds nothing
        ("a | b\nthat is all", ("a", "b")),  # a remark
        ("a | b\nA | B\na | b", ("a", "b")),  # repetitions
        ("\na | b\n", ("a", "b")),
        ("\nThe types are:\na | b\n", ("a", "b")),
        ("\x1c a | b\x85", ("a", "b")),
        ("\na | b", ("a", "b")),
        (" \u2028\t\na | b", ("a", "b")),
        ("a", ("a",)),
        ("\n a \n", ("a",)),
        ("\na", ("a",)),
    ],
)
def test_lines_inside_the_answer(inside, items):
    parsed = parse_answer(wrapped(inside))
    assert parsed.ok
    assert parsed.items == items
    assert parse_answer(wrapped(inside) + "\n").items == items


@pytest.mark.parametrize("inside", ["b | a", "\nb | a\n", "\nb | a", "\nsee below\nb | a\n"])
def test_a_list_in_the_reasoning_is_never_the_answer(inside):
    assert parse_answer(wrapped(inside, "so\na | b\n")).items == ("b", "a")
    assert parse_answer(wrapped("\n", "so\na | b\n")).reason is Reason.EMPTY_ANSWER


def test_one_type_on_its_own_line_is_read_whatever_the_reasoning_holds():
    parsed = parse_answer(wrapped("\na\n", "| gene | level |"))
    assert parsed.items == ("a",)
    assert not parsed.separated


@given(texts)
def test_any_text_is_read_without_error(text):
    parsed = parse_answer(text)
    assert parsed.ok == (parsed.reason is Reason.OK) == bool(parsed.items)


@given(st.one_of(st.none(), st.binary(), st.integers(), st.floats(), st.lists(st.text())))
def test_what_is_not_text_is_malformed(value):
    assert parse_answer(value).reason is Reason.NOT_TEXT


@pytest.mark.parametrize(
    ("types", "reasoning", "match"),
    [
        ([], "", "types is empty"),
        ("a | b", "", "split_types"),
        (["a", "b|c"], "", r"cell 2, 'b\|c', contains '\|'"),
        ([" a"], "", "white space around"),
        (["a\nb"], "", "line break"),
        (["a\u2029"], "", "line break"),
        ([""], "", "is empty"),
        ([None], "", "is a NoneType"),
        (["\udfff"], "", "lone surrogate"),
        (["a</answer>"], "", "contains the tag </answer>"),
        (["a"], "about <think>", "reasoning contains the tag <think>"),
    ],
)
def test_format_refuses_what_could_not_be_read_back(types, reasoning, match):
    with pytest.raises(ValueError, match=match):
        format_answer(types, reasoning)


def steps(text: str) -> int:
    """Count the lines run in the parser while it reads a text: a measure of time that no machine changes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != answer.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        parse_answer(text)
    finally:
        sys.settrace(before)
    return count


HOSTILE = [
    "|",
    "<answer>",
    "<think>",
    "\n",
    "</think>\n",
    "</answer>",
    "|\n",
    "a|",
    "\n|",
    " ",
    "a | b\n",
    "\u2028",
    "<",
]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("place", ["bare", "answer", "reasoning", "both"])
def test_hostile_text_takes_few_more_steps_when_longer(unit, place):
    def text(n: int) -> str:
        filler = unit * n
        return {
            "bare": filler,
            "answer": wrapped(filler),
            "reasoning": wrapped("\na | b\n", filler),
            "both": wrapped("\n" + filler, filler),
        }[place]

    # A hundred times the text: every loop over it runs in C, bar the halving of runs of "|".
    assert steps(text(20_000)) <= steps(text(200)) + 40


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.slow
def test_time_grows_no_faster_than_the_text(unit):
    """Quadratic time would make 16 times the text take 256 times as long."""

    def seconds(size: int) -> float:
        filler = unit * (size // len(unit))
        texts = [filler, wrapped(filler), wrapped("\na | b\n", filler), wrapped("\n" + filler, filler)]
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            for text in texts:
                parse_answer(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(1_000_000) < 100 * max(seconds(62_500), 1e-4)


@given(texts)
def test_short_cut_for_the_usual_response_agrees_with_the_rule(text):
    joint = answer._plain_joint(text)
    if joint >= 0:
        assert answer._layout_fault(text) is Reason.OK
        assert text.find(f"{THINK_CLOSE}\n{ANSWER_OPEN}") == joint
