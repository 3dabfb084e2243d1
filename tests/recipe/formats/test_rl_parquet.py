import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.cello1.formats.rl_parquet import read_rl_parquet, write_rl_parquet
from recipe.cello1.formats.rl_rows import puzzle_from_rl_row
from tests.helpers.toy_model import toy_puzzles


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "train.parquet"


def test_round_trip(path):
    assert write_rl_parquet(path, toy_puzzles(3), "train", layout="user") == 3
    rows = read_rl_parquet(path)
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
        read_rl_parquet(path)


def test_not_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_text("col\n1\n")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        read_rl_parquet(path)


@pytest.mark.parametrize("column", ["prompt", "reward_model", "data_source"])
def test_missing_column(path, column):
    write_rl_parquet(path, toy_puzzles(1), "train")
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        read_rl_parquet(path)


def test_no_rows(path):
    write_rl_parquet(path, toy_puzzles(1), "train")
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(ValueError, match="has no rows"):
        read_rl_parquet(path)


def test_answer_that_is_not_a_candidate_names_the_row(path):
    write_rl_parquet(path, toy_puzzles(2), "train")
    rows = pq.read_table(path).to_pylist()
    rows[1]["reward_model"]["ground_truth"] = "B cell | unicorn | T cell"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"row 1.*'unicorn'.*not among the candidates"):
        read_rl_parquet(path)
