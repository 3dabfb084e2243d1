import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.task.prompt import LAYOUTS
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.toy_puzzles import ITEM, PUZZLE, USER, puzzles

PUZZLES = [PUZZLE, Puzzle((("CD3D",), ("MS4A1",)), ("B cell", "T cell"), ("T cell", "B cell"), "A donor.")]


@given(puzzle=puzzles(), suffix=st.sampled_from([".json", ".jsonl"]))
def test_json_round_trip(puzzle, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / f"p{suffix}"
    write_puzzles(path, [puzzle, puzzle])
    first, second = load_puzzles(path).puzzles
    assert first == second == puzzle
    assert first.meta == puzzle.meta
    text = path.read_bytes()
    write_puzzles(path, [first, second])
    assert path.read_bytes() == text


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.parquet"])
def test_every_format_of_data(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        write_rl_parquet(path, PUZZLES, "test")
    else:
        write_puzzles(path, PUZZLES)
    assert load_puzzles(path).puzzles == PUZZLES


def test_puzzle_items_in_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    items = [puzzle_to_item(puzzle) for puzzle in PUZZLES]
    pq.write_table(pa.Table.from_pylist([{**items[0], "note": "a"}, *items[1:]]), path)
    assert load_puzzles(path).puzzles == PUZZLES
    pq.write_table(pa.Table.from_pylist([{**items[0], "assistant_msg": None}, *items[1:]]), path)
    assert [puzzle.answer for puzzle in load_puzzles(path).puzzles] == [None] + [p.answer for p in PUZZLES[1:]]


def test_rows_say_how_they_are_asked(tmp_path):
    own = [Puzzle(puzzle.cells, (), puzzle.answer, puzzle.context) for puzzle in PUZZLES]
    write_rl_parquet(tmp_path / "d.parquet", own, "test", "user", "batch_open")
    for asked in ((), ("batch_open", "user")):
        found = load_puzzles(tmp_path / "d.parquet", *asked)
        assert (found.puzzles, found.variant, found.layout) == (own, "batch_open", "user")
    with pytest.raises(ValueError, match="d.parquet: its rows have variant 'batch_open', and 'batch' is asked for"):
        load_puzzles(tmp_path / "d.parquet", "batch")


def test_rows_must_agree(tmp_path):
    rows = [rl_row(puzzle, "test", i, layout) for i, (puzzle, layout) in enumerate(zip(PUZZLES, LAYOUTS, strict=True))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"prompt_layout 'system' \(row 0\) and 'user' \(row 1\); split them"):
        load_puzzles(tmp_path / "d.parquet")


def test_items_do_not_say_how_they_are_asked(tmp_path):
    write_puzzles(tmp_path / "d.json", PUZZLES)
    for asked, expected in (((), ("batch", "system")), ((None, "user"), ("batch", "user"))):
        found = load_puzzles(tmp_path / "d.json", *asked)
        assert (found.variant, found.layout) == expected


def test_gold_is_optional(tmp_path):
    blind = [Puzzle(puzzle.cells, puzzle.candidates, None, puzzle.context) for puzzle in PUZZLES]
    write_puzzles(tmp_path / "d.json", blind)
    assert load_puzzles(tmp_path / "d.json").puzzles == blind


def test_file_errors_name_the_file(tmp_path):
    path = tmp_path / "puzzles.json"
    with pytest.raises(FileNotFoundError):
        load_puzzles(path, require_gold=True)
    with pytest.raises(ValueError, match="puzzles.txt must end in .json, .jsonl or .parquet"):
        load_puzzles(path.with_suffix(".txt"))
    path.write_text("[]")
    with pytest.raises(ValueError, match="puzzles.json holds no items"):
        load_puzzles(path, require_gold=True)
    path.write_text(json.dumps([ITEM, {"user_msg": USER}]))
    with pytest.raises(ValueError, match="puzzles.json: item 1 has neither 'assistant_msg' nor 'answer'"):
        load_puzzles(path, require_gold=True)


def test_real_items_are_read():
    folder = os.environ.get("CELLO1_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data"
    path = Path(folder) / "cellpuzzles_unseen_melanoma.json"
    if not path.is_file():
        pytest.skip(f"third-party {path.name} is not here; set CELLO1_SHARED_DATA to the folder that holds it")
    for item, puzzle in zip(read_items(path), load_puzzles(path).puzzles, strict=True):
        assert puzzle.meta == {"id": item["id"]}
        written = puzzle_to_item(puzzle)
        assert written["user_msg"] == item["user_msg"]
        assert written["system_msg"] == item["system_msg"]
        assert written["assistant_msg"] == item["answer"]
