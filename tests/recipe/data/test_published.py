"""Puzzles that others made: every form of the published files, and what is wrong with others."""

import json
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.cello1.data.published import read_hub, read_puzzle_file, split_in_name
from recipe.cello1.formats.atomic import write_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.task.prompt import VARIANTS
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.prepare_runs import manifest, run
from tests.helpers.toy_model import toy_puzzles

PUZZLES = tuple(toy_puzzles(3))
ITEMS = [puzzle_to_item(puzzle) for puzzle in PUZZLES]


def renamed(items):
    names = {"user_msg": "question", "assistant_msg": "answer"}
    return [{names.get(key, key): value for key, value in item.items() if key != "system_msg"} for item in items]


@pytest.mark.parametrize("items", [ITEMS, renamed(ITEMS)], ids=["messages", "question and answer"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_form(tmp_path, items, suffix):
    path = tmp_path / f"train_data.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(items), path)
    else:
        write_items(path, items)
    found = read_puzzle_file(path)
    assert found.puzzles == PUZZLES
    assert found.puzzles[0].meta == PUZZLES[0].meta
    assert (found.name, found.split, found.failures) == (path.name, "train", ())


def test_rl_rows(tmp_path):
    write_rl_parquet(tmp_path / "test.parquet", PUZZLES, "test")
    found = read_puzzle_file(tmp_path / "test.parquet")
    assert found.puzzles == PUZZLES
    assert found.split == "test"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_is_found_out(tmp_path, variant):
    puzzle = PUZZLES[0]
    if variant.startswith("single"):
        puzzle = Puzzle(puzzle.cells[:1], puzzle.candidates, puzzle.answer[:1], puzzle.context)
    if variant.endswith("open"):
        puzzle = Puzzle(puzzle.cells, (), puzzle.answer, puzzle.context)
    write_items(tmp_path / "a.json", [puzzle_to_item(puzzle, variant)])
    assert read_puzzle_file(tmp_path / "a.json", None).puzzles == (puzzle,)


def test_columns_that_a_row_lacks(tmp_path):
    pq.write_table(pa.Table.from_pylist([{**ITEMS[0], "note": "a"}, *ITEMS]), tmp_path / "a.parquet")
    found = read_puzzle_file(tmp_path / "a.parquet")
    assert "note" not in found.puzzles[3].meta
    assert found.puzzles[0].meta["note"] == "a"


def test_items_that_cannot_be_read_are_listed_the_others_are_kept(tmp_path):
    bad = [
        {"user_msg": "hello", "assistant_msg": "A"},
        {"text": "a"},
        7,
        {**ITEMS[0], "assistant_msg": "unicorn | B | C"},
    ]
    write_items(tmp_path / "a.json", [ITEMS[0], *bad, ITEMS[2]])
    found = read_puzzle_file(tmp_path / "a.json")
    assert found.puzzles == (PUZZLES[0], PUZZLES[2])
    assert [line.split(",")[0].split(":")[:2] for line in found.failures] == [
        ["a.json", " item 1"],
        ["a.json", " item 2 has neither 'user_msg' nor 'question'; its keys are ['text']"],
        ["a.json", " item 3 must be an object with the key 'user_msg'"],
        ["a.json", " item 4"],
    ]
    assert read_puzzle_file(tmp_path / "a.json", None).puzzles == found.puzzles


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", "{}", "must hold a list"),
        ("a.json", "[]", "holds no items"),
        ("a.jsonl", "{", "not valid JSON"),
        ("a.parquet", "x", "not a readable parquet file"),
        ("a.txt", "x", "must end in .json, .jsonl or .parquet"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        read_puzzle_file(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_puzzle_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train_data.json", "train"),
        ("train-00000-of-00001.parquet", "train"),
        ("x.test.jsonl", "test"),
        ("VAL.json", "val"),
        ("validation.json", "val"),
        ("reasoning_train.json", "reasoning"),
        ("train_test.json", ""),
        ("latest.json", ""),
        ("data.json", ""),
    ],
)
def test_splits_in_names(name, split):
    assert split_in_name(name) == split


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "puzzles"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return folder


def test_from_the_hub(hub_folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub_folder.parent / "cache")
    found = read_hub(str(hub_folder))
    assert [(part.name, part.split) for part in found] == [("train", "train"), ("test", "test")]
    assert found[0].puzzles == PUZZLES


def test_a_broken_file_of_the_hub_is_no_traceback(hub_folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub_folder.parent / "cache")
    (hub_folder / "train.jsonl").write_text('{"user_msg": "a"\n')
    with pytest.raises(ConnectionError, match="the data set cannot be loaded"):
        read_hub(str(hub_folder))


def test_offline_the_message_says_what_to_do():
    with pytest.raises(ConnectionError, match="from_hub=nobody/nothing: the data set cannot be .*their folder"):
        read_hub("nobody/nothing")


# ---------------------------------------------------------------------------------------------------- the command


def test_given_splits_of_local_files(made, tmp_path):
    files = [made / "train" / "train_data.json", made / "test" / "test_data.json"]
    assert run(*files, "--out", tmp_path) == 0
    assert (tmp_path / "train" / "train_data.json").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "test" / "test_data.json").read_bytes() == files[1].read_bytes()
    assert (tmp_path / "rl" / "train.parquet").read_bytes() == (made / "rl" / "train.parquet").read_bytes()
    assert manifest(tmp_path)["plan"]["split"] == "given"


def test_one_file_is_split_anew_by_context_where_no_donor_is_named(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    plain = [{key: item[key] for key in ("system_msg", "user_msg", "assistant_msg")} for item in items]
    path = tmp_path / "puzzles.json"
    path.write_text(json.dumps(plain))
    assert run(path, "--out", tmp_path / "out") == 0
    leaks = manifest(tmp_path / "out")["leaks"]["train/test"]
    assert leaks["leaks"] is False
    assert leaks["donors_from_context"] > 0
    assert run(path, "--out", tmp_path / "out", "--split", "tissue") == 1
    assert run(path, "--out", tmp_path / "out", "--split", "given") == 1


def test_a_folder_of_puzzle_files_with_reasoning(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for name in ("train", "test", "reasoning"):
        answers = {"reasoning": lambda text: f"<think>because</think>\n<answer>{text}</answer>"}
        change = answers.get(name, lambda text: text)
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({**item, "assistant_msg": change(item["assistant_msg"])}) + "\n" for item in items[:9])
        )
    assert run(tmp_path, "--out", tmp_path / "out") == 0
    traces = load_puzzles(tmp_path / "out" / "reasoning" / "reasoning_data.json").puzzles
    assert traces[0].meta["reasoning"] == "because"
    assert set(manifest(tmp_path / "out")["leaks"]) == {"train/test", "reasoning/test"}
    assert sorted(path.name for path in (tmp_path / "out" / "rl").iterdir()) == ["test.parquet", "train.parquet"]


def test_items_that_cannot_be_read(made, tmp_path, capsys):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    (tmp_path / "train.json").write_text(json.dumps([*items[:5], {"user_msg": "x"}]))
    (tmp_path / "test.json").write_text(json.dumps(items[5:8]))
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    assert "bad   train.json: item 5" in capsys.readouterr().out
    assert run(tmp_path, "--out", tmp_path / "out", "--skip-bad") == 0
    assert manifest(tmp_path / "out")["failures"][0].startswith("train.json: item 5")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("b.json", "[", "not valid JSON"), ("b.json", "[]", "no items"), ("b.parquet", "x", "not a readable parquet")],
)
def test_a_puzzle_file_that_cannot_be_read_does_not_stop_the_others(made, tmp_path, capsys, name, content, said):
    (tmp_path / "a.json").write_bytes((made / "train" / "train_data.json").read_bytes())
    (tmp_path / name).write_text(content)
    files = [tmp_path / "a.json", tmp_path / name, "--out", tmp_path / "out"]
    assert run(*files) == 1
    captured = capsys.readouterr()
    assert f"bad   {name}: " in captured.out and said in captured.out
    assert "pass --skip-bad to accept that" in captured.err
    assert run(*files, "--skip-bad") == 0
    found = manifest(tmp_path / "out")
    assert said in found["failures"][0] and "write it again" in found["failures"][0]
    assert {part["name"]: part["puzzles"] for part in found["sources"]} == {"a.json": 52, name: 0}
    (tmp_path / "a.json").unlink()
    assert run(tmp_path / name, "--out", tmp_path / "out", "--skip-bad") == 1
    assert "there are no puzzles" in capsys.readouterr().err


def test_a_test_side_that_cannot_be_read_does_not_make_another(made, tmp_path):
    (tmp_path / "train.json").write_bytes((made / "train" / "train_data.json").read_bytes())
    (tmp_path / "test.json").write_text("[")
    assert run(tmp_path, "--out", tmp_path / "out", "--skip-bad") == 0
    assert manifest(tmp_path / "out")["plan"]["split"] == "given"
    assert set(manifest(tmp_path / "out")["splits"]) == {"train"}


def test_when_no_item_can_be_read_the_reasons_are_shown(made, tmp_path, capsys):
    items = [{"user_msg": f"x{number}", "assistant_msg": "a"} for number in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(items))
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out.count("bad   train.json: item") == 20
    assert "and 10 more" in captured.out
    assert "there are no puzzles" in captured.err


def test_from_hub(made, tmp_path, monkeypatch):
    import datasets

    rows = {side: json.loads((made / side / f"{side}_data.json").read_bytes()) for side in ("train", "test")}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or rows)
    assert run("--from-hub", "ncbi/CellPuzzles", "--out", tmp_path) == 0
    assert asked == ["ncbi/CellPuzzles"]
    assert (tmp_path / "train" / "train_data.json").read_bytes() == (made / "train" / "train_data.json").read_bytes()
    assert manifest(tmp_path)["from_hub"] == "ncbi/CellPuzzles"


def test_from_hub_offline(tmp_path, capsys):
    assert run("--from-hub", "ncbi/CellPuzzles", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("cello1 prepare: error: --from-hub ncbi/CellPuzzles: the data set cannot be loaded")
    assert "give their folder instead" in error
    assert len(error.splitlines()) == 1


def test_without_the_package_for_the_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("--from-hub", "ncbi/CellPuzzles", "--out", tmp_path / "out") == 1
    assert "the package datasets is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("dataset_infos.json", "{}", "must hold a list"),
        ("nested.json", "[" * 100_000, "not valid JSON"),
        ("more.jsonl.gz", "x", "unpack it"),
    ],
)
def test_a_stray_file_ends_nothing(made, tmp_path, capsys, name, text, said):
    for side in ("train", "test"):
        shutil.copy(made / side / f"{side}_data.json", tmp_path / f"{side}.json")
    (tmp_path / name).write_text(text)
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert f"bad   {name}: " in printed and said in printed
    assert run(tmp_path, "--out", tmp_path / "out", "--skip-bad") == 0
    found = manifest(tmp_path / "out")
    assert found["plan"]["split"] == "given"
    assert said in found["failures"][0]
    assert {side: part["puzzles"] for side, part in found["splits"].items()} == {"train": 52, "test": 6}


def test_values_that_are_missing_in_an_item(made, tmp_path, capsys):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for item, value in zip(items, (float("nan"), "unknown", "NA", None), strict=False):
        item["donor_id"] = value
    items[5]["cell_ids"] = [float("nan")] * 3
    (tmp_path / "a.json").write_text(json.dumps(items))
    assert run(tmp_path / "a.json", "--out", tmp_path / "out") == 1
    assert capsys.readouterr().out.count("bad   a.json: item 5") == 1
    assert run(tmp_path / "a.json", "--out", tmp_path / "out", "--skip-bad") == 0
    found = manifest(tmp_path / "out")
    assert found["leaks"]["train/test"]["leaks"] is False
    counts = [part["by_donor"].get("not given", 0) for part in found["splits"].values()]
    assert sum(counts) == 4


def test_a_line_that_cannot_be_read_costs_no_other(tmp_path):
    good = json.dumps(puzzle_to_item(Puzzle((("CD3D",), ("MS4A1",)), ("T", "B"), ("T", "B"))))
    twice = good[:-1] + ', "assistant_msg": "B | T"}'
    (tmp_path / "A.JSONL").write_text("\n".join([good, "{half", twice, good, "[" * 100_000]) + "\n")
    found = read_puzzle_file(tmp_path / "A.JSONL")
    assert [puzzle.answer for puzzle in found.puzzles] == [("T", "B")] * 2
    assert [text.split(" is not valid JSON")[0] for text in found.failures] == [f"A.JSONL: line {n}" for n in (2, 3, 5)]
    assert "the key 'assistant_msg' stands twice" in found.failures[1]
