"""Puzzles that others made: every form of the published files, and what is wrong with others."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.cello1.data.published import read_hub, read_puzzle_file, split_in_name
from recipe.cello1.formats.atomic import write_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.task.prompt import VARIANTS
from recipe.cello1.task.puzzle import Puzzle
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
    with pytest.raises(ConnectionError, match="--from-hub nobody/nothing: the data set cannot be .*their folder"):
        read_hub("nobody/nothing")
