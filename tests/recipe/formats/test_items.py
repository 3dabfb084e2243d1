import pytest
from hypothesis import given

from recipe.cello1.formats.items import item_to_puzzle, puzzle_to_item
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import instruction, render_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer
from tests.helpers.toy_puzzles import ITEM, PUZZLE, USER, puzzles

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
