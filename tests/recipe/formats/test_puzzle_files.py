import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.formats import rl_parquet, rl_rows
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.task.prompt import LAYOUTS, VARIANTS, instruction, render_user
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.toy_model import toy_puzzles
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
    rows = [rl_row(puzzle, "test", i, LAYOUTS[i]) for i, puzzle in enumerate(PUZZLES)]
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


CONTEXT = "Context: The cell is from a male, originating from the lung . The patient has been diagnosed with COPD."
QA = {  # as the fork's scripts write one cell: no blank after the context
    "selected_cells": ["AAAC-1"],
    "question": f"{CONTEXT}\n\nCell: SFTPC, SFTPB\n\n{VARIANTS['single_open'].question}",
    "answer": "type II pneumocyte",
    "group": "D1",
    "cell_index": "AAAC-1",
}
LISTED = QA | {
    "question": f"{CONTEXT}\n\nCell: SFTPC, SFTPB\n\n{VARIANTS['single'].question}\nT cell\ntype II pneumocyte"
}


def conversation(item: dict, system: str) -> dict:
    turns = {"system": system, "human": item["question"], "gpt": item["answer"]}
    rest = {key: value for key, value in item.items() if key not in ("question", "answer")}
    return rest | {"conversations": [{"from": who, "value": text} for who, text in turns.items()]}


@pytest.mark.parametrize(("item", "variant"), [(QA, "single_open"), (LISTED, "single")])
def test_single_cell_files_of_the_fork(tmp_path, item, variant):
    texts = {"user_msg": item["question"], "assistant_msg": item["answer"]}
    files = {
        "qa.json": item,
        "conversations.jsonl": conversation(item, instruction(variant)),
        "test_llm_data.json": texts | {"system_msg": instruction("single_open")},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content if name.endswith("l") else [content]))
        found = load_puzzles(tmp_path / name, require_gold=True)
        (puzzle,) = found.puzzles
        assert (found.variant, puzzle.answer) == (variant, ("type II pneumocyte",))
        assert puzzle.cells == (("SFTPC", "SFTPB"),)
        assert render_user(puzzle, variant) == item["question"]
        kept = {} if "llm" in name else {key: item[key] for key in ("selected_cells", "group", "cell_index")}
        assert puzzle.meta == kept


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        (
            [{"from": "user", "value": USER}],
            "item 0, key 'conversations': must hold one turn each of system, human, gpt",
        ),
        ([{"from": "human", "value": USER}] * 2, "must hold one turn each"),
        ("text", "must hold one turn each"),
        ([{"from": "human"}], "item 0, key 'user_msg': must be a str, got NoneType"),
    ],
)
def test_conversations_that_are_none(tmp_path, turns, match):
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(ValueError, match=f"c.jsonl: .*{match}" if "item" not in match else f"c.jsonl: {match}"):
        load_puzzles(tmp_path / "c.jsonl")


def test_instruction_of_the_first_upload_is_read(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([ITEM | {"system_msg": instruction(layout="user")}]))
    assert "You must output exactly" in path.read_text()
    assert load_puzzles(path).puzzles == [PUZZLE]


def counted(monkeypatch) -> dict[str, int]:
    """Count puzzles that are made and rows that are checked from now on."""
    counts = {"puzzles": 0, "rows": 0}
    make, check = Puzzle.__post_init__, rl_rows.check_rl_row

    def count(key, function):
        def counting(*args):
            counts[key] += 1
            return function(*args)

        return counting

    monkeypatch.setattr(Puzzle, "__post_init__", count("puzzles", make))
    monkeypatch.setattr(rl_rows, "check_rl_row", count("rows", check))
    monkeypatch.setattr(rl_parquet, "check_rl_row", count("rows", check))
    return counts


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.parquet"])
def test_every_item_is_parsed_once(tmp_path, monkeypatch, name):
    ten = toy_puzzles(10)
    write = write_puzzles if "json" in name else lambda path, puzzles: write_rl_parquet(path, puzzles, "train")
    write(tmp_path / name, ten)
    counts = counted(monkeypatch)
    assert load_puzzles(tmp_path / name, require_gold=True).puzzles == ten
    assert counts == {"puzzles": 10, "rows": 0 if "json" in name else 10}


def test_every_row_is_checked_once_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv(rl_parquet.CHECKED, "")
    write_rl_parquet(tmp_path / "d.parquet", toy_puzzles(10), "train")
    counts = counted(monkeypatch)
    for _ in range(3):
        rl_parquet.check_rl_parquet(tmp_path / "d.parquet")
    assert counts == {"puzzles": 10, "rows": 10}
    write_rl_parquet(tmp_path / "d.parquet", toy_puzzles(11), "train")
    rl_parquet.check_rl_parquet(tmp_path / "d.parquet")
    assert counts["rows"] == 21, "another file under the name is checked"


def test_genes_and_types_of_a_file_are_held_once(tmp_path):
    write_puzzles(tmp_path / "d.json", toy_puzzles(3))
    first, *others = load_puzzles(tmp_path / "d.json").puzzles
    for puzzle in others:
        assert puzzle.cells[0][2] is first.cells[0][2]
        assert {id(name) for name in puzzle.answer} <= {id(name) for name in (*puzzle.candidates, *first.candidates)}


@pytest.mark.parametrize("where", ["donor_id", "note"])
def test_nan_is_what_tables_write_for_nothing(tmp_path, where):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([ITEM | {where: float("nan")}]))  # as the published scripts do
    (puzzle,) = load_puzzles(path).puzzles
    assert puzzle == PUZZLE and where not in puzzle.meta
    write_puzzles(tmp_path / "again.json", [puzzle])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[" * 100_000, "d.json is not valid JSON: maximum recursion depth"),
        (json.dumps([ITEM, ITEM])[:-9], "d.json is not valid JSON: "),
        (
            json.dumps([ITEM, ITEM | {"x": [1, {"y": float("inf")}]}]),
            "d.json: item 1, key 'x': holds NaN or an infinite",
        ),
        (json.dumps([ITEM | {"x": float("-inf")}]), "d.json: item 0, key 'x': holds NaN or an infinite number"),
        (json.dumps([ITEM])[:-2] + ', "x": ' + "[" * 600 + "]" * 600 + "}]", "d.json: item 0: is nested too deeply"),
        (
            json.dumps([ITEM, ITEM | {"user_msg": "x" * 10**6}]),
            "d.json: item 1, key 'user_msg': user message must have 3",
        ),
        (json.dumps([{"x" * 10**6: 1}]), "d.json: item 0 has neither"),
        (json.dumps([ITEM | {"answer": "a | " * 10**6 + "b", "assistant_msg": "z"}]), "d.json: item 0: the keys"),
        (json.dumps([USER.replace("ALB", "A" * 10**6)]), "d.json: item 0 must be an object"),
    ],
)
def test_hostile_items_are_named_in_one_line(tmp_path, content, match):
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        load_puzzles(path, require_gold=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


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
