import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.cello1.formats.rl_parquet import CHECKED, check_rl_parquet, iter_parquet, write_rl_parquet
from recipe.cello1.formats.rl_rows import puzzle_from_rl_row
from tests.helpers.toy_model import toy_puzzles


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv(CHECKED, "")
    return tmp_path / "folder" / "train.parquet"


def test_round_trip(path):
    assert write_rl_parquet(path, toy_puzzles(3), "train", layout="user") == 3
    check_rl_parquet(path)
    rows = list(iter_parquet(path))
    assert [puzzle_from_rl_row(row) for row in rows] == toy_puzzles(3)
    assert rows[2]["extra_info"]["prompt_layout"] == "user"
    assert rows[2]["extra_info"]["split"] == "train"


def test_same_puzzles_same_bytes(path, tmp_path):
    write_rl_parquet(path, toy_puzzles(3), "train")
    write_rl_parquet(tmp_path / "again.parquet", toy_puzzles(3), "train")
    assert path.read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_no_puzzles(path):
    with pytest.raises(ValueError, match="no puzzles to write"):
        write_rl_parquet(path, [], "train")
    assert not path.exists()


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match="does not exist; make it with"):
        check_rl_parquet(path)


def test_not_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_text("col\n1\n")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        check_rl_parquet(path)


@pytest.mark.parametrize("column", ["prompt", "reward_model", "data_source"])
def test_missing_column(path, column):
    write_rl_parquet(path, toy_puzzles(1), "train")
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        check_rl_parquet(path)


def test_no_rows(path):
    write_rl_parquet(path, toy_puzzles(1), "train")
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match="has no rows"):
        check_rl_parquet(path)


def test_answer_that_is_not_a_candidate_names_the_row(path):
    write_rl_parquet(path, toy_puzzles(2), "train")
    rows = pq.read_table(path).to_pylist()
    rows[1]["reward_model"]["ground_truth"] = "B cell | unicorn | T cell"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"row 1.*'unicorn'.*not among the candidates"):
        check_rl_parquet(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory can be limited on Linux only")
def test_a_small_file_that_would_fill_the_memory(path, monkeypatch):
    path.parent.mkdir()
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 10_000_000]))
    pq.write_table(pa.table({"prompt": rows}), path)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr("recipe.cello1.formats.machine.free_memory", lambda: 1 << 28)
    with pytest.raises(ValueError, match=r"not a readable parquet file: .*(memory|malloc|alloc)"):
        check_rl_parquet(path)


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video", "Pdf", "SomethingNew"])
@pytest.mark.parametrize("nested", [False, True])
def test_columns_that_datasets_would_fill_from_files(path, kind, nested):
    """verl reads the file with datasets, and an image is whatever path or address its row names."""
    write_rl_parquet(path, toy_puzzles(2), "train")
    table = pq.read_table(path)
    feature = {"_type": kind}
    features = {"data_source": {"dtype": "string", "_type": "Value"}, "images": [feature] if nested else feature}
    for said, match in (
        (json.dumps({"info": {"features": features}}), f"a column of the type {kind}"),
        ("[" * 9**5, "JSON"),
    ):
        pq.write_table(table.replace_schema_metadata({"huggingface": said}), path)
        with pytest.raises(ValueError, match=match):
            check_rl_parquet(path)
    plain = {"a": {"_type": "Value"}, "_type": {"_type": "List", "feature": {"_type": "Value"}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": plain}})}), path)
    check_rl_parquet(path)
