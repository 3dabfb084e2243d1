import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402

from recipe.cello1.dataset import PuzzleDataset  # noqa: E402
from recipe.cello1.prompt import instruction, messages  # noqa: E402
from recipe.cello1.puzzle import Puzzle  # noqa: E402
from recipe.cello1.rl_parquet import read_rl_parquet, write_rl_parquet  # noqa: E402
from tests.recipe.toy_model import build_toy_tokenizer, toy_puzzles  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return build_toy_tokenizer()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.parquet"
    write_rl_parquet(path, toy_puzzles(4), "train")
    return path


def dataset(path, tokenizer, tmp_path, **options) -> PuzzleDataset:
    settings = {"max_prompt_length": 1000, "filter_overlong_prompts": True, "filter_overlong_prompts_workers": 1}
    config = OmegaConf.create({**settings, "cache_dir": str(tmp_path / "cache"), **options})
    return PuzzleDataset(str(path), tokenizer, config)


def test_rows_are_what_verl_trains_on(data, tokenizer, tmp_path):
    rows = dataset(data, tokenizer, tmp_path)
    assert len(rows) == 4
    assert rows[0]["raw_prompt"] == messages(toy_puzzles(1)[0])
    assert rows[0]["reward_model"]["ground_truth"] == " | ".join(toy_puzzles(1)[0].answer)
    assert rows[3]["index"] == 3


def test_layout_of_the_run_replaces_that_of_the_file(data, tokenizer, tmp_path):
    prompt = dataset(data, tokenizer, tmp_path, prompt_layout="user")[1]["raw_prompt"]
    assert prompt == messages(toy_puzzles(2)[1], "user")
    assert prompt[0]["content"].endswith(instruction(layout="user"))


def test_unknown_layout(data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="layout must be one of system, user, got 'sideways'"):
        dataset(data, tokenizer, tmp_path, prompt_layout="sideways")


def test_layout_needs_the_question(data, tokenizer, tmp_path):
    rows = read_rl_parquet(data)
    for row in rows:
        row["extra_info"] = {"index": row["extra_info"]["index"]}
    pq.write_table(pa.Table.from_pylist(rows), data)
    assert len(dataset(data, tokenizer, tmp_path)) == 4
    with pytest.raises(ValueError, match="row 0, column 'extra_info': has no 'question'"):
        dataset(data, tokenizer, tmp_path, prompt_layout="user")


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer, caplog):
    long = Puzzle((("GENE",) * 300,), ("T cell",), ("T cell",), "The cell is from blood.")
    path = tmp_path / "train.parquet"
    write_rl_parquet(path, [*toy_puzzles(2), long], "train")
    longest = max(len(tokenizer.apply_chat_template(messages(p), return_dict=False)) for p in toy_puzzles(2))
    assert len(dataset(path, tokenizer, tmp_path, max_prompt_length=longest + 20)) == 2
    assert "1 of 3 prompts are longer than data.max_prompt_length" in caplog.text


def test_nothing_left_is_an_error(data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"all 4 prompts .* longer than data.max_prompt_length=3 tokens; raise it"):
        dataset(data, tokenizer, tmp_path, max_prompt_length=3)


def test_missing_file(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.parquet"):
        dataset(tmp_path / "nowhere.parquet", tokenizer, tmp_path)


def test_missing_column(data, tokenizer, tmp_path):
    pq.write_table(pq.read_table(data).drop_columns(["reward_model"]), data)
    with pytest.raises(ValueError, match="has no column 'reward_model'"):
        dataset(data, tokenizer, tmp_path)
