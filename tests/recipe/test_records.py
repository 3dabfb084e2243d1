import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.answer import TAGS, format_answer, text_fault, type_fault
from recipe.cello1.prompt import instruction, messages, render_user
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import check_rl_row, item_to_puzzle, puzzle_from_rl_row, puzzle_to_item, rl_row
from recipe.cello1.scoring import score_answer

PUZZLE = Puzzle(
    cells=(("ALB", "TTR"), ("CD5L", "MARCO")),
    candidates=("Kupffer cell", "hepatocyte"),
    answer=("hepatocyte", "Kupffer cell"),
    context="The liver of a donor.",
    meta={"donor_id": "D7", "tissue": "liver", "n_counts": 3},
)
ITEM = puzzle_to_item(PUZZLE)
USER = ITEM["user_msg"]
HOW = {"index": 4, "engine": "vllm", "sampling": {"temperature": 0.0, "seed": 1}}

names = st.text(min_size=1, max_size=8).map(str.strip).filter(lambda name: not type_fault(name))
genes = st.text(min_size=1, max_size=6).map(str.strip).filter(lambda gene: not text_fault(gene) and ", " not in gene)
reasonings = st.text(max_size=30).filter(lambda text: not any(tag in text for tag in TAGS))
values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)


@st.composite
def puzzles(draw) -> Puzzle:
    cells = draw(st.lists(st.lists(genes, min_size=1, max_size=4), min_size=1, max_size=5))
    types = draw(st.lists(names, min_size=len(cells), max_size=len(cells) + 1, unique_by=str.lower))
    context = draw(st.just("") | st.text(max_size=20).filter(lambda text: not text_fault(text)))
    meta = draw(st.dictionaries(st.sampled_from(["donor_id", "tissue", "cell_ids", "x"]), values | st.lists(values)))
    if draw(st.booleans()):
        meta["reasoning"] = draw(reasonings)
    return Puzzle(cells, sorted(types), draw(st.permutations(types))[: len(cells)], context, meta)


# ---------------------------------------------------------------------------------------------------- puzzle items


def test_item_of_a_puzzle():
    assert list(ITEM) == ["system_msg", "user_msg", "assistant_msg", "donor_id", "tissue", "n_counts"]
    assert ITEM["system_msg"] == instruction()
    assert ITEM["user_msg"] == render_user(PUZZLE)
    assert ITEM["assistant_msg"] == "hepatocyte | Kupffer cell"
    assert item_to_puzzle(ITEM) == PUZZLE
    assert item_to_puzzle(ITEM).meta == PUZZLE.meta


def test_item_with_reasoning_holds_the_trace():
    puzzle = Puzzle(PUZZLE.cells, PUZZLE.candidates, PUZZLE.answer, PUZZLE.context, {"reasoning": "ALB | TTR: liver"})
    item = puzzle_to_item(puzzle)
    assert item["assistant_msg"] == format_answer(PUZZLE.answer, "ALB | TTR: liver")
    assert "reasoning" not in item
    assert item_to_puzzle(item).meta == {"reasoning": "ALB | TTR: liver"}


@given(puzzle=puzzles())
def test_gold_of_every_item_scores_one(puzzle):
    back = item_to_puzzle(puzzle_to_item(puzzle))
    response = format_answer(back.answer, back.meta.get("reasoning", ""))
    assert score_answer(response, puzzle.answer, candidates=back.candidates).score == 1.0
    assert score_answer(response, rl_row(back, "train", 0)["reward_model"]["ground_truth"]).score == 1.0


@pytest.mark.parametrize("user_key", ["user_msg", "question"])
@pytest.mark.parametrize("gold_key", ["assistant_msg", "answer"])
@pytest.mark.parametrize("gold", ["hepatocyte | Kupffer cell", format_answer(PUZZLE.answer, "why")])
def test_both_names_of_the_keys_are_read(user_key, gold_key, gold):
    puzzle = item_to_puzzle({user_key: USER, gold_key: gold, "id": "a1"})
    assert puzzle == PUZZLE
    assert puzzle.meta == {"id": "a1"} | ({"reasoning": "why"} if "<think>" in gold else {})


def test_both_keys_at_once_must_agree():
    trace = format_answer(PUZZLE.answer, "why")
    item = {"user_msg": USER, "question": USER, "assistant_msg": trace, "answer": "hepatocyte | Kupffer cell"}
    assert item_to_puzzle(item).meta == {"reasoning": "why"}
    with pytest.raises(ValueError, match="item 3: the keys 'assistant_msg' and 'answer' differ"):
        item_to_puzzle(item | {"answer": "Kupffer cell | hepatocyte"}, 3)
    with pytest.raises(ValueError, match="item 0: the keys 'user_msg' and 'question' differ"):
        item_to_puzzle(item | {"question": "?"})


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ("text", "item 2 must be an object with the key 'user_msg', got str"),
        ({}, r"item 2 has neither 'user_msg' nor 'question'; its keys are \[\]"),
        ({"prompt": USER, "answer": "x"}, r"neither 'user_msg' nor 'question'; its keys are \['answer', 'prompt'\]"),
        ({"user_msg": USER}, "item 2 has neither 'assistant_msg' nor 'answer'"),
        ({"user_msg": None, "answer": "x"}, "item 2, key 'user_msg': must be a str, got NoneType"),
        ({"user_msg": USER, "answer": ["x"]}, "item 2, key 'answer': must be a str, got list"),
        ({"user_msg": USER, "answer": " | "}, "item 2, key 'answer': is empty"),
        ({"user_msg": USER, "answer": "hepatocyte"}, "item 2, key 'answer': answer has 1 types for 2 cells"),
        ({"user_msg": USER, "answer": "hepatocyte | T cell"}, r"key 'answer': answer names \['T cell'\]"),
        (
            {"user_msg": USER, "assistant_msg": "<think>x"},
            r"key 'assistant_msg': the trace is malformed \(unfinished\)",
        ),
        ({"user_msg": "Cells: A", "answer": "a"}, "item 2, key 'user_msg': user message must have 3 blocks"),
        ({"user_msg": USER, "answer": "a", "system_msg": "Be brief."}, "item 2, key 'system_msg': not the instruction"),
    ],
)
def test_bad_item_is_named(item, match):
    with pytest.raises(ValueError, match=match):
        item_to_puzzle(item, 2)


def test_gold_is_optional_on_request():
    puzzle = item_to_puzzle({"user_msg": USER}, require_gold=False)
    assert puzzle.answer is None
    assert "assistant_msg" not in puzzle_to_item(puzzle)
    assert item_to_puzzle(ITEM, require_gold=False) == PUZZLE


def test_meta_may_not_use_the_keys_of_the_item():
    with pytest.raises(ValueError, match=r"meta must not hold the keys \['answer'\]"):
        puzzle_to_item(Puzzle(PUZZLE.cells, PUZZLE.candidates, meta={"answer": "x"}))


def test_variants_are_written_and_read():
    puzzle = Puzzle((("ALB",),), ("hepatocyte", "T cell"), ("hepatocyte",))
    item = puzzle_to_item(puzzle, "single")
    assert item["system_msg"] == instruction("single")
    assert item_to_puzzle(item, variant="single") == puzzle
    with pytest.raises(ValueError, match="key 'system_msg': not the instruction of the variant 'batch'"):
        item_to_puzzle(item)
    opened = item_to_puzzle(puzzle_to_item(puzzle, "single_open"), variant="single_open")
    assert (opened.answer, opened.candidates) == (("hepatocyte",), ())


# --------------------------------------------------------------------------------------------------------- RL rows


def test_rl_row():
    assert rl_row(PUZZLE, "train", 5) == {
        "data_source": "cell_data",
        "prompt": messages(PUZZLE),
        "ability": "cell_type_annotation",
        "reward_model": {"style": "rule", "ground_truth": "hepatocyte | Kupffer cell"},
        "extra_info": {
            "split": "train",
            "index": 5,
            "question": USER,
            "answer": "hepatocyte | Kupffer cell",
            "n_cells": 2,
            "donor_id": "D7",
            "dataset": "",
            "tissue": "liver",
            "disease": "",
            "prompt_layout": "system",
            "variant": "batch",
        },
    }
    row = rl_row(PUZZLE, "test", np.int64(0), "user")
    assert row["prompt"] == messages(PUZZLE, "user")
    assert row["extra_info"]["prompt_layout"] == "user"
    assert type(row["extra_info"]["index"]) is int
    check_rl_row(row)
    with pytest.raises(ValueError, match="puzzle 1 of split 'train' has no answer"):
        rl_row(Puzzle(PUZZLE.cells, PUZZLE.candidates), "train", 1)


@given(puzzles())
def test_rl_row_round_trip(puzzle):
    back = puzzle_from_rl_row(rl_row(puzzle, "train", 0, "user"))
    assert back == puzzle
    assert back.meta.get("tissue", "") == ("" if puzzle.meta.get("tissue") is None else str(puzzle.meta["tissue"]))


def test_row_of_the_published_script_is_read():
    row = {
        "data_source": "cell_data",
        "prompt": np.array([{"role": "user", "content": USER}], dtype=object),  # as parquet gives it
        "ability": "cell_type_annotation",
        "reward_model": {"style": "rule", "ground_truth": "hepatocyte | Kupffer cell"},
        "extra_info": {"split": "train", "index": 0, "question": USER, "answer": "hepatocyte | Kupffer cell"},
    }
    check_rl_row(row)
    assert puzzle_from_rl_row(row) == PUZZLE
    single = rl_row(Puzzle((("ALB",),), ("hepatocyte",), ("hepatocyte",)), "train", 0, variant="single")
    assert puzzle_from_rl_row(single).candidates == ("hepatocyte",)


@pytest.mark.parametrize(
    ("column", "value", "match"),
    [
        ("prompt", None, "row 9, column 'prompt': must be a list of messages, got NoneType"),
        ("prompt", "text", "column 'prompt': must be a list of messages, got str"),
        ("prompt", [], "column 'prompt': must be a list of messages"),
        ("prompt", [{"role": "user"}], "column 'prompt': every message needs 'role' and 'content'"),
        ("data_source", "gsm8k", "column 'data_source': must be 'cell_data', got 'gsm8k'"),
        ("reward_model", {}, "column 'reward_model': 'ground_truth' must name the types, got None"),
        ("reward_model", "a | b", "column 'reward_model'"),
        ("reward_model", {"ground_truth": "|"}, "column 'reward_model'"),
        ("extra_info", {}, "row 9, column 'extra_info': has no 'question'"),
        ("extra_info", None, "row 9, column 'extra_info': has no 'question'"),
        ("extra_info", {"question": "?"}, "row 9, column 'extra_info': item 9, key 'question': user message"),
    ],
)
def test_bad_row_is_named(column, value, match):
    with pytest.raises(ValueError, match=match):
        puzzle_from_rl_row(rl_row(PUZZLE, "train", 9) | {column: value}, 9)


@pytest.mark.parametrize("column", ["data_source", "prompt", "reward_model"])
def test_missing_column_is_named(column):
    row = rl_row(PUZZLE, "train", 9)
    del row[column]
    with pytest.raises(ValueError, match=f"row 9 has no column '{column}'; its columns are"):
        check_rl_row(row, 9)
