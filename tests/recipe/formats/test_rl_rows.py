import numpy as np
import pytest
from hypothesis import given

from recipe.cello1.formats.rl_rows import check_rl_row, puzzle_from_rl_row, rl_row
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.toy_puzzles import PUZZLE, USER, puzzles


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
        ("reward_model", {"ground_truth": "|"}, "column 'reward_model': 'ground_truth': gold is empty"),
        ("reward_model", {"ground_truth": "T cell | t cell"}, "'ground_truth': gold names 't cell' twice"),
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
