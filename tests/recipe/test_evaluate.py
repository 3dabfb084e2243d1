import io
import json

import numpy as np
import pytest
from rich.console import Console

from recipe.cello1.answer import format_answer
from recipe.cello1.evaluate import Estimate, estimate, evaluate, main, render, score_predictions
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import error_record, prediction_record, puzzle_to_item, write_items, write_puzzles

GOLD = ("B cell", "NK cell", "T cell")
RUN = {"engine": "fake", "sampling": {"temperature": 0.0}}


def puzzle(i=0, gold=GOLD, tissue="blood"):
    cells = tuple((f"G{i}", f"CELL{j}") for j in range(len(gold)))
    return Puzzle(cells, tuple(sorted(gold)), gold, "Context.", {"tissue": tissue, "donor_id": f"d{i % 2}"})


def record(prediction, i=0, tokens=10, sample=0, of=None, **more):
    item = puzzle_to_item(of or puzzle(i))
    return prediction_record(
        item, prediction, index=i, finish_reason="stop", tokens=tokens, sample=sample, **RUN, **more
    )


def failure(i, error="out of memory"):
    return error_record(puzzle_to_item(puzzle(i)), error, index=i, sample=0, **RUN)


RIGHT = format_answer(GOLD)
ONE_RIGHT = format_answer(("B cell", "T cell", "NK cell"))
DUPLICATE = format_answer(("B cell", "B cell", "T cell"))
SHORT = format_answer(("B cell", "NK cell"))


def means(result):
    return {name: found["mean"] for name, found in result["metrics"].items()}


def test_metrics_by_hand():
    texts = [RIGHT, ONE_RIGHT, DUPLICATE, SHORT, "no idea", ""]
    result = evaluate([record(text, i, tokens=10 * i) for i, text in enumerate(texts)])
    found = means(result)
    assert found["cell_accuracy"] == pytest.approx((1 + 1 / 3) / 6)
    assert found["cell_accuracy_micro"] == pytest.approx(4 / 18)
    assert found["exact_match"] == pytest.approx(1 / 6)
    assert found["format_valid"] == pytest.approx(4 / 6)
    assert found["uniqueness"] == pytest.approx((1 + 1 + 2 / 3 + 1) / 6)
    assert found["legal"] == pytest.approx(2 / 6)
    assert found["length"] == 25
    assert (result["n"], result["n_answers"], result["length_unit"]) == (6, 6, "tokens")
    assert result["malformed"] == {"empty": 1, "missing_tag": 1, "wrong_count": 1, "duplicate": 1}
    assert result["run"] == {**RUN, "prompt_layout": "system"}


def test_macro_weighs_puzzles_and_micro_cells():
    large = puzzle(1, ("a", "b", "c", "d", "e", "f"))
    records = [record(RIGHT, 0), record(format_answer(("b", "a", "c", "e", "f", "d")), 1, of=large)]
    found = means(evaluate(records))
    assert found["cell_accuracy"] == pytest.approx((1 + 1 / 6) / 2)
    assert found["cell_accuracy_micro"] == pytest.approx(4 / 9)


def test_samples_of_a_puzzle_are_averaged_before_puzzles():
    records = [record(RIGHT, 0, sample=s) for s in range(3)] + [record("?", 1)]
    result = evaluate(records)
    assert means(result)["cell_accuracy"] == 0.5
    assert result["metrics"]["cell_accuracy"]["n"] == 2


def test_failures_of_the_machinery_are_never_scored():
    scored = evaluate([record(RIGHT, 0)])
    result = evaluate([record(RIGHT, 0), failure(1), failure(2), failure(3, "time-out")])
    assert result["metrics"] == scored["metrics"]
    assert result["n_errors"] == 3
    assert result["errors"] == {"out of memory": 2, "time-out": 1}
    with pytest.raises(ValueError, match="no prediction to score, only 2 failures .*out of memory"):
        evaluate([failure(1), failure(2)])


def test_missing_predictions_are_counted():
    result = evaluate([record(RIGHT, 1)], [puzzle(i) for i in range(4)])
    assert result["missing"] == [0, 2, 3]
    assert result["n_missing"] == 3


def test_slices():
    of = puzzle(2, ("a", "b"), tissue="liver")
    result = evaluate([record(RIGHT, 0), record("?", 1), record(format_answer(("a", "b")), 2, of=of)])
    assert {k: v["exact_match"]["mean"] for k, v in result["slices"]["n_cells"].items()} == {"2": 1.0, "3": 0.5}
    assert list(result["slices"]["n_cells"]) == ["2", "3"]
    assert {k: v["cell_accuracy"]["n"] for k, v in result["slices"]["tissue"].items()} == {"blood": 2, "liver": 1}
    assert {k: v["cell_accuracy"]["n"] for k, v in result["slices"]["donor_id"].items()} == {"d0": 2, "d1": 1}
    assert "disease" not in result["slices"]


def test_slices_take_the_meta_of_the_data_set():
    bare = {"index": 0, "prediction": RIGHT}
    assert "blood" in evaluate([bare], [puzzle()])["slices"]["tissue"]


def test_strangers_are_counted_when_the_candidates_are_known():
    text = format_answer(("B cell", "NK cell", "pericyte"))
    assert evaluate([record(text)], [puzzle()])["outside_candidates"] == 1
    assert evaluate([record(RIGHT)], [puzzle()])["outside_candidates"] == 0


def test_length_in_words_where_tokens_are_not_told():
    result = evaluate([{"index": 0, "prediction": RIGHT, "answer": "B cell | NK cell | T cell"}])
    assert result["length_unit"] == "words"
    assert means(result)["length"] == len(RIGHT.split())


@pytest.mark.parametrize(
    ("records", "puzzles", "match"),
    [
        ([{"index": 3, "prediction": "x"}], None, r"prediction 3 has no gold: neither 'assistant_msg' nor 'answer'"),
        ([{"index": 3, "prediction": "x", "answer": ""}], None, "prediction 3: gold is empty"),
        ([{"index": 3, "prediction": "x", "answer": "a | A"}], None, "gold names 'A' twice"),
        ([{"index": 0, "answer": "a | b"}], None, "must have either 'prediction' or 'error'"),
        ([{"index": 0, "prediction": None, "answer": "a | b"}], None, "must be a str, got NoneType"),
        ([{"prediction": "x", "answer": "a | b"}], None, "'index' and 'sample' must be integers"),
        ([record(RIGHT), record(RIGHT)], None, "stands twice"),
        ([record(RIGHT, 5)], [puzzle()], "prediction 5 is not in the data set, which has 1 items"),
        ([record(RIGHT)], [puzzle(gold=GOLD[::-1])], "is not that of item 0"),
        ([{"index": 0, "prediction": "x"}], [Puzzle((("a",),), ("t",))], "item 0 of the data set has no gold"),
    ],
)
def test_what_cannot_be_scored_is_refused(records, puzzles, match):
    with pytest.raises(ValueError, match=match):
        score_predictions(records, puzzles)


def test_interval_of_a_share_is_wilsons():
    found = estimate(np.array([1.0] * 8 + [0.0] * 2), seed=0)
    assert (found.mean, found.n, found.method) == (0.8, 10, "wilson")
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson (1927), 8 of 10


def test_interval_of_a_sure_thing_is_not_empty():
    found = estimate(np.ones(20), seed=0)
    assert found.low < 0.9
    assert found.high == 1.0


def test_interval_by_bootstrap_is_seeded_and_sane():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = estimate(values, seed=1)
    assert found == estimate(values, seed=1)
    assert found != estimate(values, seed=2)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = estimate(rng.choice([0, 1 / 3, 1.0], size=60), seed=trial)
        hits += found.low <= 4 / 9 <= found.high
    assert 180 <= hits <= 199


def test_weighted_mean_and_its_interval():
    rng = np.random.default_rng(0)
    weights = rng.integers(2, 9, 300).astype(float)
    values = rng.random(300)
    found = estimate(values, seed=0, weights=weights)
    assert found.mean == pytest.approx(np.average(values, weights=weights))
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25], [0.1, 0.9], [1.0], [0.0, 0.0, 0.0, 0.3]])
def test_small_samples_do_not_break(values):
    found = estimate(np.array(values), seed=0)
    assert found.mean == pytest.approx(np.mean(values))
    assert np.isnan(found.low) or found.low <= found.mean <= found.high
    json.dumps(found.as_dict(), allow_nan=False)


def test_estimate_of_nothing():
    with pytest.raises(ValueError, match="values is empty"):
        estimate(np.array([]), seed=0)


def test_unknown_interval_is_null():
    assert Estimate(0.5, np.nan, np.nan, 1, "bootstrap").as_dict()["low"] is None


def printed(result):
    stream = io.StringIO()
    render(result, Console(file=stream, width=160))
    return stream.getvalue()


def test_table():
    other = record(format_answer(("a", "b")), 9, of=puzzle(9, ("a", "b")))
    text = printed(
        evaluate(
            [record(RIGHT, 0), record("?", 1), failure(2), other],
            [puzzle(i) for i in range(9)] + [puzzle(9, ("a", "b"))],
        )
    )
    assert "3 puzzles, 3 answers" in text
    for expected in (
        "cell accuracy",
        "0.667",
        "by n_cells",
        "missing_tag 1",
        "machinery failed: 1",
        "no prediction: 6",
    ):
        assert expected in text


def test_table_shows_text_of_the_data_as_it_is():
    of = puzzle(1, ("a", "b"), tissue="[red]liver[/red]")
    assert "[red]liver[/red]" in printed(evaluate([record(RIGHT, 0), record(format_answer(("a", "b")), 1, of=of)]))


def test_command_reads_jsonl_and_writes_json(tmp_path, capsys):
    write_items(tmp_path / "p.jsonl", [record(RIGHT, 0), record("?", 1)])
    assert main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "m" / "m.json")]) == 0
    assert "cell accuracy" in capsys.readouterr().out
    result = json.loads((tmp_path / "m" / "m.json").read_text())
    assert result["metrics"]["exact_match"]["mean"] == 0.5


def test_command_reads_a_published_folder_and_the_data_set(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    for i in (0, 2):
        (folder / f"{i}.json").write_text(
            json.dumps({"question": "?", "answer": " | ".join(GOLD), "prediction": RIGHT})
        )
    write_puzzles(tmp_path / "d.json", [puzzle(i) for i in range(3)])
    assert main([str(folder), "--data", str(tmp_path / "d.json"), "--out", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["missing"] == [1]


def test_same_predictions_same_bytes(tmp_path):
    write_items(tmp_path / "p.jsonl", [record([RIGHT, ONE_RIGHT, "?"][i % 3], i) for i in range(30)])
    for name in "ab":
        main([str(tmp_path / "p.jsonl"), "--out", str(tmp_path / f"{name}.json")])
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("content", [None, "", "[1]", '{"index": 0}\n', '{"index": 0, "prediction": "x"}\n'])
def test_command_refuses_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ")
    assert error.count("\n") == 1
