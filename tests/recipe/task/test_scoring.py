import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task.answer import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    Reason,
    format_answer,
    type_fault,
)
from recipe.cello1.task.scoring import Score, gold_types, score_answer, score_types
from recipe.cello1.task.text import normal_form
from tests.helpers.published import listed, published_evaluation, published_score

GOLD = "hepatocyte | Kupffer cell | cholangiocyte | stellate cell"


def answer(inside: str, reasoning: str = "ALB in cell 1", after: str = "") -> str:
    return f"<think>{reasoning}</think>\n<answer>{inside}</answer>{after}"


def shared_file(name: str) -> Path:
    folder = os.environ.get("CELLO1_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data"
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"third-party {name} is not here; set CELLO1_SHARED_DATA to the folder that holds it")
    return path


# Text, published verdict on it, and ours where it differs (with the reason).
OWN_CASES = {
    "all right": (answer(GOLD), 1.0, ""),
    "line break at the end": (answer(GOLD, after="\n"), 1.0, ""),
    "two line breaks at the end": (answer(GOLD, after="\n\n"), -1, "text_outside"),
    "case is ignored": (answer(GOLD.upper()), 1.0, ""),
    "lines of their own": (answer(f"\n{GOLD}\n"), 1.0, ""),
    "no reasoning": (answer(GOLD, ""), 1.0, ""),
    "half right": (answer("hepatocyte | Kupffer cell | stellate cell | cholangiocyte"), 0.25, ""),
    "one right": (answer("hepatocyte | stellate cell | Kupffer cell | cholangiocyte"), 0.125, ""),
    "none right": (
        answer("stellate cell | cholangiocyte | Kupffer cell | hepatocyte".replace("Kupffer", "kupfer")),
        0,
        "",
    ),
    "stranger": (answer("hepatocyte | Kupffer cell | cholangiocyte | pericyte"), 0.375, ""),
    "hyphen": (answer(GOLD.replace("Kupffer cell", "Kupffer-cell")), 0.375, ""),
    "empty items": (answer(f"|{GOLD}||"), 1.0, ""),
    "one missing": (answer("hepatocyte | Kupffer cell | cholangiocyte"), -1, "wrong_count"),
    "one too many": (answer(GOLD + " | T cell"), -1, "wrong_count"),
    "duplicate": (answer("hepatocyte | hepatocyte | cholangiocyte | stellate cell"), -1, "duplicate"),
    "commas": (answer(GOLD.replace(" |", ",")), -1, "no_separator"),
    "wrapped": (answer("hepatocyte | Kupffer cell |\ncholangiocyte | stellate cell"), -1, "contradiction"),
    "remark on a second line": (answer(GOLD + "\nI am fairly sure."), 1.0, ""),
    "same list twice": (answer(f"{GOLD}\n{GOLD}"), 1.0, ""),
    "list in the reasoning too": (answer(f"\n{GOLD}\n", f"Thus\n{GOLD}\n"), 1.0, ""),
    "other list in the reasoning": (answer(GOLD, "a | b | c | d"), 1.0, ""),
    "no think": (f"<answer>{GOLD}</answer>", -1, "missing_tag"),
    "cut": (f"<think>x</think>\n<answer>{GOLD}", -1, "unfinished"),
    "tags on one line": (f"<think>x</think><answer>{GOLD}</answer>", -1, "bad_joint"),
    "tag named in the reasoning": (answer(GOLD, "into <answer> tags"), -1, "repeated_tag"),
    "chatter before": ("OK. " + answer(GOLD), -1, "text_outside"),
    "empty": ("", -1, "empty"),
}

# The list in the module docstring: what the published code pays, where we do not.
DEVIATIONS = {
    "1 gold in the reasoning, nothing in the tags": (answer("", f"so\n{GOLD}\n"), 1.0, "empty_answer"),
    "1 gold in the reasoning, no list in the tags": (answer("\nsee above", f"so\n{GOLD}\n"), 1.0, "no_separator"),
    "2 second list": (
        answer(GOLD + "\nor: Kupffer cell | hepatocyte | cholangiocyte | stellate cell"),
        1.0,
        "contradiction",
    ),
    "2 list goes on": (answer(GOLD + "\n| T cell"), 1.0, "contradiction"),
    "2 list goes on after its separator": (answer(GOLD + " |\nT cell"), 1.0, "contradiction"),
    "3 duplicate but for case": (
        answer("hepatocyte | Hepatocyte | cholangiocyte | stellate cell"),
        0.375,
        "duplicate",
    ),
}


SWAPPED = "Kupffer cell | hepatocyte | cholangiocyte | stellate cell"
# The fourth: text, published verdict, and ours, which is that on the list in the tags.
ON_A_LINE_OF_ITS_OWN = {
    "gold in the reasoning, wrong list in the tags": (answer(f"\n{SWAPPED}\n", f"so\n{GOLD}\n"), 1.0, 0.25),
    "wrong list in the reasoning, gold in the tags": (answer(f"\n{GOLD}\n", f"hm\n{SWAPPED}\n"), 0.25, 1.0),
    "a table in the reasoning, gold in the tags": (answer(f"\n{GOLD}\n", "\n| gene | level |\n"), -1, 1.0),
    "closing tag on the line of the list": (answer(f"\n{GOLD}"), 0.375, 1.0),
}


def is_on_a_line_of_its_own(text: str) -> bool:
    """Whether a text is of the fourth kind."""
    head, _, inside = text.partition(f"{THINK_CLOSE}\n{ANSWER_OPEN}")
    lines = inside.rstrip("\n").splitlines()
    if not lines or lines[0].strip() or "|" not in inside:
        return False
    first = next(line for line in lines if "|" in line)
    return "|" in head or ANSWER_CLOSE in first


def is_listed_deviation(text: str) -> bool:
    """Whether a text is of a kind that the list of deviations names."""
    head, _, inside = text.partition(f"{THINK_CLOSE}\n{ANSWER_OPEN}")
    inside = inside.rstrip("\n").removesuffix(ANSWER_CLOSE)
    lines = [line.strip() for line in (inside.splitlines() or [""])]
    line = lines[0] or next((line for line in lines if "|" in line), "")
    items = listed(line)
    return (
        (not lines[0] and "|" in head and "|" not in inside)
        or sum("|" in line for line in lines) > 1
        or (line.endswith("|") and any(lines[lines.index(line) + 1 :]))
        or (not items and not lines[0])
        or len({x.lower() for x in items}) < len(items)
    )


@pytest.mark.parametrize("case", OWN_CASES)
def test_contract(case):
    text, verdict, reason = OWN_CASES[case]
    score = score_answer(text, GOLD)
    assert score.score == verdict == published_score(text, GOLD)
    assert score.reason == reason
    assert (score.score == -1) == bool(score.reason)


@pytest.mark.parametrize("case", DEVIATIONS)
def test_listed_deviation(case):
    text, published, reason = DEVIATIONS[case]
    assert published_score(text, GOLD) == published
    assert is_listed_deviation(text)
    assert score_answer(text, GOLD).score == -1
    assert score_answer(text, GOLD).reason == reason


@pytest.mark.parametrize("case", ON_A_LINE_OF_ITS_OWN)
def test_a_list_on_a_line_of_its_own_is_scored_as_what_it_says(case):
    text, published, ours = ON_A_LINE_OF_ITS_OWN[case]
    assert published_score(text, GOLD) == published
    assert is_on_a_line_of_its_own(text)
    assert score_answer(text, GOLD).score == ours


METRIC_CASES = {
    "right": ("a | b | c", (1, 1, 1, 1)),
    "two exchanged": ("a | c | b", (1 / 3, 0, 1, 1)),
    "one twice": ("a | b | b", (2 / 3, 0, 1, 2 / 3)),
    "one twice but for case": ("a | b | B", (2 / 3, 0, 1, 1)),
    "one missing": ("a | b", (2 / 3, 0, 1, 1)),
    "the first missing": ("b | c", (0, 0, 1, 1)),
    "one is no candidate": ("a | x | c", (2 / 3, 0, 1, 1)),
    "only separators": (" | ", (0, 0, 1, 0)),
    "commas": ("a, b, c", (0, 0, 0, 0)),
    "nothing": ("", (0, 0, 0, 0)),
    "a remark below": ("a | b | c\nsure", (1, 1, 1, 1)),
}


def measured(text):
    score = score_answer(text, "a | b | c", candidates=["a", "b", "c"])
    return score.partial_accuracy, score.exact_match, score.format_validity, score.uniqueness


@pytest.mark.parametrize("case", METRIC_CASES)
def test_the_metrics_are_those_of_the_published_evaluator(case):
    inside, expected = METRIC_CASES[case]
    assert published_evaluation(answer(inside), "a | b | c") == pytest.approx(expected)
    assert measured(answer(inside)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "published", "ours"),
    [
        (answer("a | b | c | d"), (1, 1, 1, 1), (0, 0, 1, 1)),  # one type too many
        (answer("", "a | b | c"), (2 / 3, 0, 1, 1), (0, 0, 0, 0)),
        (answer("a | b | c\nb | a | c"), (1, 1, 1, 1), (0, 0, 1, 0)),
        (answer("\na | b | c\n", "b | a | c"), (0, 0, 1, 1), (1, 1, 1, 1)),
        (answer("\na | b | c"), (2 / 3, 0, 1, 1), (1, 1, 1, 1)),
    ],
)
def test_documented_differences_from_the_published_evaluator(text, published, ours):
    text = text.replace("<think>a | b | c</think>", "<think>\na | b | d\n</think>")
    assert published_evaluation(text, "a | b | c") == pytest.approx(published)
    assert measured(text) == pytest.approx(ours)


def test_strict_accuracy_and_legal():
    found = {
        case: score_answer(answer(inside), "a | b | c", candidates=["a", "b", "c"])
        for case, (inside, _) in METRIC_CASES.items()
    }
    assert {case: score.strict_accuracy for case, score in found.items() if score.strict_accuracy} == {
        "right": 1, "two exchanged": 1 / 3, "one is no candidate": 2 / 3, "a remark below": 1
    }  # fmt: skip
    assert {case for case, score in found.items() if score.legal} == {"right", "two exchanged", "a remark below"}


@pytest.mark.parametrize("types", [("a", "b", "c"), ("A", "c", "b"), ("a", "a", "x"), ("a",), ("a", "b", "c", "d"), ()])
def test_types_are_scored_as_the_text_that_names_them(types):
    text = answer(" | ".join(types) + (" |" if len(types) == 1 else ""))
    assert score_types(types, "a | b | c", candidates=["a", "b", "c"]) == score_answer(
        text, "a | b | c", candidates=["a", "b", "c"]
    )
    assert score_types(None, "a | b").reason is Reason.EMPTY_ANSWER


def test_published_cases():
    """The verdicts of that code itself, where the file is at hand."""
    cases = json.loads(shared_file("published_reward_cases.json").read_text())
    assert len(cases) >= 43
    differing = set()
    for case in cases:
        assert published_score(case["text"], case["gold"]) == case["published_score"]
        score = score_answer(case["text"], case["gold"]).score
        if score != case["published_score"]:
            if normal_form(case["text"]) != case["text"]:  # names that look the same are one name
                continue
            assert (score == -1 and is_listed_deviation(case["text"])) or is_on_a_line_of_its_own(case["text"])
            differing.add(case["case"])
    assert differing == {
        "wrapped before last sep, gold prefix",
        "pipe in reasoning, empty 1st line of answer",
        "reasoning holds gold, answer empty",
        "reasoning holds gold, answer wrong on 2nd line",
        "dup differing in case",
        "stray closing tag variant: answer then wrong 2nd line",
    }


parts = st.sampled_from(
    ["a", "b", "B", "c", "x", "|", "|", " | ", " ", "\n", "\r", "\u2028", "\n\n", "a | b | c", "a|b"]
)
bodies = st.lists(parts, max_size=12).map("".join)
loose = st.lists(st.one_of(parts, st.sampled_from([*TAGS, "</think>\n<answer>"])), max_size=14).map("".join)
responses = st.one_of(
    st.builds(answer, bodies, bodies, st.sampled_from(["", "\n", " "])),
    st.builds(answer, bodies, st.just("no list")),
    loose,
    st.text(),
)


@given(text=responses, gold=st.sampled_from(["a | b", "a | b | c", "c | a | x | b"]))
def test_every_score_is_the_published_one_or_a_listed_deviation(text, gold):
    score = score_answer(text, gold)
    published = published_score(text, gold)
    if score.score != published:
        assert (score.score == -1 and is_listed_deviation(text)) or is_on_a_line_of_its_own(text)
    if score.score != -1 and score.items and is_on_a_line_of_its_own(text):
        assert score.score == published_score(answer(" | ".join(score.items) + " |", ""), gold)
    found = (score.partial_accuracy, score.exact_match, score.format_validity, score.uniqueness)
    if found != pytest.approx(published_evaluation(text, gold)):
        too_many = len(score.items) > gold.count("|") + 1
        assert too_many or is_listed_deviation(text) or is_on_a_line_of_its_own(text)
    sparse = score_answer(text, gold, mode="sparse")
    assert sparse.score == (-1 if score.score == -1 else float(score.score == 1))


hostile = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from("\ud800\udfff\x00|<>/ \n\u2028thinkaswer")),
    st.builds(
        lambda unit, n: answer(unit * n),
        st.sampled_from(["|", "a|", "<", "\x00|", "\ud800 | ", "a"]),
        st.integers(0, 1_000_000),
    ),
    st.none(),
    st.binary(),
    st.integers(),
    st.lists(st.text()),
)


@given(text=hostile, mode=st.sampled_from(["dense", "sparse"]))
def test_never_raises_on_a_response(text, mode):
    score = score_answer(text, GOLD, mode=mode, candidates=GOLD.split(" | "))
    assert -1 <= score.score <= 1
    assert 0 <= score.strict_accuracy <= score.partial_accuracy <= 1
    assert 0 <= score.uniqueness <= 1
    assert (score.score == -1) == bool(score.reason)
    if not isinstance(text, str):
        assert score.reason is Reason.NOT_TEXT


type_names = st.text(min_size=1, max_size=10).map(normal_form).map(str.strip).filter(lambda name: not type_fault(name))


@given(
    types=st.lists(type_names, min_size=1, max_size=15, unique_by=str.lower),
    reasoning=st.text().filter(lambda text: not any(tag in text for tag in TAGS)),
    mode=st.sampled_from(["dense", "sparse"]),
)
def test_gold_scores_one(types, reasoning, mode):
    expected = Score(1.0, 1.0, True, True, 1.0, 1.0, True, Reason.OK, tuple(types), True)
    assert score_answer(format_answer(types, reasoning), types, mode, candidates=types) == expected
    assert score_answer(format_answer(types, reasoning), " | ".join(types), mode).score == 1.0


def test_single_cell_needs_no_separator():
    assert score_answer(answer("B cell"), "B cell").score == 1.0
    assert score_answer(answer("\nb cell\n", "| gene | level |"), "B cell").score == 1.0
    assert score_answer(answer("B cell |"), "B cell").score == 1.0
    assert score_answer(answer("T cell"), "B cell").score == 0.0
    assert score_answer(answer("B cell | T cell"), "B cell").reason is Reason.WRONG_COUNT
    # The tags alone decide, where the published code would read the reasoning.
    assert score_answer(answer("", "B cell |"), "B cell").score == -1


def test_all_fields_of_a_partial_answer():
    score = score_answer(answer("a | c | b | d"), "a | b | c | d", candidates=["a", "b", "c", "D"])
    assert score == Score(0.25, 0.5, False, True, 1.0, 0.5, True, Reason.OK, ("a", "c", "b", "d"), True)
    assert score.metrics() == {
        "score": 0.25,
        "partial_accuracy": 0.5,
        "exact_match": 0.0,
        "format_validity": 1.0,
        "uniqueness": 1.0,
        "strict_accuracy": 0.5,
        "legal": 1.0,
    }


def test_sparse_pays_only_for_all():
    assert score_answer(answer("a | c | b"), "a | b | c", mode="sparse").score == 0.0
    assert score_answer(answer("a | b | c"), "a | b | c", mode="sparse").score == 1.0
    assert score_answer(answer("a | a | c"), "a | b | c", mode="sparse").score == -1.0


def test_illegal_answers_keep_what_was_read():
    duplicate = score_answer(answer("a | a | c"), "a | b | c", candidates=["a", "b", "c"])
    assert duplicate == Score(-1.0, 2 / 3, False, True, 2 / 3, 0.0, False, Reason.DUPLICATE, ("a", "a", "c"), True)
    count = score_answer(answer("a | b"), "a | b | c")
    assert count == Score(-1.0, 2 / 3, False, True, 1.0, 0.0, False, Reason.WRONG_COUNT, ("a", "b"), None)


def test_candidates_are_reported_not_scored():
    text = answer("a | unicorn | c")
    assert score_answer(text, "a | b | c").in_candidates is None
    assert score_answer(text, "a | b | c", candidates=["a", "b", "c"]).in_candidates is False
    assert score_answer(text, "a | b | c", candidates=["a", "b", "c", "Unicorn"]).in_candidates is True
    assert score_answer("", "a | b | c", candidates=["a", "b", "c"]).in_candidates is None
    assert score_answer(text, "a | b | c", candidates=["a"]).score == score_answer(text, "a | b | c").score


def test_score_is_frozen():
    with pytest.raises(AttributeError):
        score_answer("", "a | b").score = 1.0


@pytest.mark.parametrize(
    ("gold", "match"),
    [
        ("", "gold is empty"),
        (" | ", "gold is empty"),
        ([], "gold is empty"),
        (None, "must be a str or a sequence"),
        (b"a | b", "must be a str or a sequence"),
        ({"a": 1}, "must be a str or a sequence"),
        ([["a"], ["b"]], "hold only str"),
        ("a | b | A", "names 'A' twice"),
        (["a | b"], "separates the types"),
        ("a | b<answer>", "contains the tag"),
    ],
)
def test_bad_gold_is_an_error(gold, match):
    with pytest.raises(ValueError, match=match):
        score_answer(answer("a | b"), gold)


def test_gold_types_reads_text_and_sequences():
    assert gold_types(" a |b| c ") == gold_types(["a", "b", "c"]) == gold_types(("a", "b", "c")) == ("a", "b", "c")


def test_bad_settings_are_errors():
    with pytest.raises(ValueError, match="mode must be one of dense, sparse, got 'Dense'"):
        score_answer("", "a | b", mode="Dense")
    with pytest.raises(ValueError, match="candidates must be a collection"):
        score_answer("", "a | b", candidates="a | b")


def test_think_tags_are_those_of_the_prompt():
    assert answer("a | b", "r") == f"{THINK_OPEN}r{THINK_CLOSE}\n{ANSWER_OPEN}a | b{ANSWER_CLOSE}"
