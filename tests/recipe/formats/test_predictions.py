"""Records of predictions: a failure is never one, and what is written is read again."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.formats.atomic import append_jsonl, write_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.predictions import (
    check_prediction,
    error_record,
    has_logprobs,
    prediction_record,
    read_predictions,
    record_weights,
)
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.voting import logprob_weights

ITEM = puzzle_to_item(
    Puzzle((("ALB", "TTR"), ("CD5L", "MARCO")), ("Kupffer cell", "hepatocyte"), ("hepatocyte", "Kupffer cell"))
)
USER = ITEM["user_msg"]
HOW = {"index": 4, "engine": "vllm", "sampling": {"temperature": 0.0, "seed": 1}}


def test_prediction_record():
    record = prediction_record(ITEM, "text", finish_reason="stop", tokens=np.int32(7), model="m", **HOW)
    assert record == ITEM | {
        "index": 4,
        "engine": "vllm",
        "sampling": {"temperature": 0.0, "seed": 1},
        "prompt_layout": "system",
        "model": "m",
        "answer": "hepatocyte | Kupffer cell",  # where the published evaluator looks
        "prediction": "text",
        "finish_reason": "stop",
        "tokens": 7,
    }
    assert check_prediction(record)
    no_gold = prediction_record({"user_msg": USER}, "", finish_reason="length", tokens=0, prompt_layout="user", **HOW)
    assert "answer" not in no_gold
    assert check_prediction(no_gold)


def test_error_record_is_never_a_prediction():
    record = error_record(ITEM, MemoryError("no room"), **HOW)
    assert record["error"] == "MemoryError: no room"
    assert "prediction" not in record
    assert not check_prediction(record)
    assert error_record({}, "time-out", **HOW)["error"] == "time-out"


def test_bad_records_are_named():
    with pytest.raises(ValueError, match="prediction of item 4 must be a str, got NoneType; record failures as errors"):
        prediction_record(ITEM, None, finish_reason="stop", tokens=0, **HOW)
    with pytest.raises(ValueError, match=r"item 4 already has the keys \['prediction'\]"):
        prediction_record(ITEM | {"prediction": "old"}, "new", finish_reason="stop", tokens=0, **HOW)
    with pytest.raises(ValueError, match=r"item 4 already has the keys \['index'\]"):
        error_record({"index": 3}, "x", **HOW)
    with pytest.raises(ValueError, match="layout must be one of"):
        error_record({}, "x", prompt_layout="?", **HOW)
    for bad, match in [
        ([], "record must be an object, got list"),
        ({"answer": "a"}, "record must have either 'prediction' or 'error', its keys are"),
        ({"prediction": "", "error": ""}, "must have either"),
        ({"prediction": None}, "record, key 'prediction': must be a str, got NoneType"),
    ]:
        with pytest.raises(ValueError, match=match):
            check_prediction(bad)


@given(text=st.text())
def test_predictions_survive_the_file(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("p") / "p.jsonl"
    append_jsonl(path, prediction_record(ITEM, text, finish_reason="stop", tokens=1, **HOW))
    append_jsonl(path, error_record(ITEM, text, **HOW))
    first, second = read_predictions(path)
    assert first["prediction"] == second["error"] == text


def test_published_folder_is_read_in_order_of_the_items(tmp_path):
    for index in (10, 9, 0):
        (tmp_path / f"{index}.json").write_text(json.dumps(ITEM | {"prediction": f"p{index}"}))
    (tmp_path / "log.txt").write_text("not a record")
    found = read_predictions(tmp_path)
    assert [(record["index"], record["prediction"]) for record in found] == [(0, "p0"), (9, "p9"), (10, "p10")]
    (tmp_path / "10.json").write_text("{")
    with pytest.raises(ValueError, match="10.json is not valid JSON"):
        read_predictions(tmp_path)
    (tmp_path / "10.json").write_text("{}")
    with pytest.raises(ValueError, match="10.json must have either 'prediction' or 'error'"):
        read_predictions(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="'summary.json' is not named after an item"):
        read_predictions(tmp_path)


def test_prediction_list_is_read(tmp_path):
    path = tmp_path / "p.json"
    write_items(path, [{"prediction": "a"}, {"prediction": "b", "index": 7}])
    assert [record["index"] for record in read_predictions(path)] == [0, 7]
    write_items(path, [])
    with pytest.raises(ValueError, match="holds no predictions"):
        read_predictions(path)
    write_items(path, [{"prediction": "a"}, {}])
    with pytest.raises(ValueError, match="p.json: record 1 must have either"):
        read_predictions(path)


def test_predictions_weigh_by_the_mean_log_probability_of_their_tokens():
    records = [{"prediction": "x", "logprob": -2.0, "tokens": 4}, {"prediction": "y", "logprob": -1, "tokens": 1}]
    assert has_logprobs(records)
    assert not has_logprobs([]) and not has_logprobs([{"error": "e"}])
    assert not has_logprobs([*records, {"prediction": "z", "logprob": None, "tokens": 1}])
    assert np.array_equal(record_weights(records), logprob_weights([-2.0, -1.0], [4, 1]))
