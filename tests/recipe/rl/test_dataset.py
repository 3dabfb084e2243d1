import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402

from recipe.cello1.formats.rl_parquet import iter_parquet, write_rl_parquet  # noqa: E402
from recipe.cello1.formats.rl_rows import puzzle_from_rl_row  # noqa: E402
from recipe.cello1.rl.dataset import PuzzleDataset  # noqa: E402
from recipe.cello1.task.prompt import instruction, messages  # noqa: E402
from recipe.cello1.task.puzzle import Puzzle  # noqa: E402
from tests.helpers.toy_model import build_toy_tokenizer, toy_puzzles  # noqa: E402
from verl.utils.dataset.rl_dataset import collate_fn  # noqa: E402


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


def test_fewer_puzzles_than_a_step_takes(data, tokenizer, tmp_path):
    """verl would divide by the number of steps, when everything is loaded."""
    with pytest.raises(ValueError, match="4 puzzles are left to train on .*data.train_batch_size=5; give more"):
        dataset(data, tokenizer, tmp_path, train_batch_size=5, train_files=str(data), val_files="val.parquet")
    assert len(dataset(data, tokenizer, tmp_path, train_batch_size=5, train_files="t", val_files=str(data))) == 4
    assert len(dataset(data, tokenizer, tmp_path, train_batch_size=4, train_files=str(data))) == 4
    both = {"train_files": str(data), "val_files": str(data)}
    assert len(dataset(data, tokenizer, tmp_path, train_batch_size=5, **both)) == 4, "these may be to validate on"
    passes = {"augmented_epochs": 2, "seed": 1, "train_files": str(data)}
    assert len(dataset(data, tokenizer, tmp_path, train_batch_size=8, **passes)) == 8


def test_unknown_layout(data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="layout must be one of system, user, user_current, inference, got 'sideways'"):
        dataset(data, tokenizer, tmp_path, prompt_layout="sideways")


def test_layout_needs_the_question(data, tokenizer, tmp_path):
    rows = list(iter_parquet(data))
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


@pytest.fixture
def sizes(tmp_path):
    """Eight puzzles of 2, 3 and 4 cells."""
    path = tmp_path / "sizes.parquet"
    mixture = [4, 2, 2, 3, 4, 2, 3, 2]
    write_rl_parquet(path, [toy_puzzles(i + 1, n)[i] for i, n in enumerate(mixture)], "train")
    return path


def n_cells(rows) -> list[int]:
    return [rows[i]["extra_info"]["n_cells"] for i in range(len(rows))]


def pairs(row) -> dict:
    puzzle = puzzle_from_rl_row(row)
    assert row["raw_prompt"] == row["prompt"] == messages(puzzle)
    return {cell[1]: name for cell, name in zip(puzzle.cells, puzzle.answer, strict=True)}


def test_curriculum(sizes, tokenizer, tmp_path):
    assert n_cells(dataset(sizes, tokenizer, tmp_path)) == [4, 2, 2, 3, 4, 2, 3, 2]
    up = dataset(sizes, tokenizer, tmp_path, curriculum="ascending", seed=1)
    assert n_cells(up) == [2, 2, 2, 2, 3, 3, 4, 4]
    assert n_cells(dataset(sizes, tokenizer, tmp_path, curriculum="descending", seed=1)) == [4, 4, 3, 3, 2, 2, 2, 2]
    mixed = n_cells(dataset(sizes, tokenizer, tmp_path, curriculum="mixed", seed=1))
    assert sorted(mixed[:4]) == sorted(mixed[4:]) == [2, 2, 3, 4]
    assert sorted(up[i]["index"] for i in range(8)) == list(range(8))


def test_augmented_passes(sizes, tokenizer, tmp_path, caplog):
    plain = dataset(sizes, tokenizer, tmp_path)
    rows = dataset(sizes, tokenizer, tmp_path, augmented_epochs=3, seed=1)
    assert len(rows) == 24
    assert "one epoch holds 3 passes over 8 puzzles; set trainer.total_epochs=1" in caplog.text
    moved = 0
    orders = [[rows[i]["index"] for i in range(first, first + 8)] for first in (0, 8, 16)]
    assert [sorted(order) for order in orders] == [list(range(8))] * 3
    assert len({tuple(order) for order in orders}) == 3
    for i in range(24):
        row = rows[i]
        original = plain[row["index"]]
        assert row["extra_info"]["copy"] == i // 8
        assert pairs(row) == pairs(original)
        moved += row["prompt"] != original["prompt"]
        assert i >= 8 or row["prompt"] == original["prompt"]
    assert moved > 10
    again = dataset(sizes, tokenizer, tmp_path, augmented_epochs=3, seed=1)
    assert [again[i]["prompt"] for i in range(24)] == [rows[i]["prompt"] for i in range(24)]
    other = dataset(sizes, tokenizer, tmp_path, augmented_epochs=3, seed=2)
    assert [other[i]["prompt"] for i in range(24)] != [rows[i]["prompt"] for i in range(24)]
    with pytest.raises(IndexError, match="index 24 is out of range"):
        rows[24]


def test_each_pass_goes_through_the_sizes_anew_in_the_layout_of_the_run(sizes, tokenizer, tmp_path):
    options = {"augmented_epochs": 2, "curriculum": "ascending", "seed": 1, "prompt_layout": "user"}
    rows = dataset(sizes, tokenizer, tmp_path, **options)
    assert n_cells(rows) == [2, 2, 2, 2, 3, 3, 4, 4] * 2
    assert sorted(rows[i]["index"] for i in range(8, 16)) == list(range(8))
    for i in range(16):
        assert rows[i]["raw_prompt"] == messages(puzzle_from_rl_row(rows[i]), "user")


def test_resumed_data_are_the_same(sizes, tokenizer, tmp_path):
    from torch.utils.data import SequentialSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        rows = dataset(sizes, tokenizer, tmp_path, augmented_epochs=2, curriculum="mixed", seed=1)
        return StatefulDataLoader(rows, batch_size=4, collate_fn=collate_fn, sampler=SequentialSampler(rows))

    whole = [batch["raw_prompt"].tolist() for batch in loader()]
    first = loader()
    iterator = iter(first)
    next(iterator), next(iterator)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [batch["raw_prompt"].tolist() for batch in second] == whole[2:]
    assert len(whole) == 4


def test_validation_data_stay_as_they_are(sizes, data, tokenizer, tmp_path):
    options = {"augmented_epochs": 2, "curriculum": "ascending", "seed": 1, "shuffle": False}
    files = {"train_files": [str(data)], "val_files": str(sizes)}
    rows = dataset(sizes, tokenizer, tmp_path, **options, **files)
    assert n_cells(rows) == [4, 2, 2, 3, 4, 2, 3, 2]
    assert len(dataset(data, tokenizer, tmp_path, **options, **files)) == 8
    with pytest.raises(ValueError, match=r"data\.train_files and data\.val_files are the same"):
        dataset(data, tokenizer, tmp_path, **options, train_files=str(data), val_files=[str(data)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"curriculum": "mixed", "shuffle": True, "seed": 1}, r"data\.curriculum=mixed needs data\.shuffle=false"),
        ({"augmented_epochs": 2, "shuffle": True, "seed": 1}, r"data\.augmented_epochs=2 needs data\.shuffle=false"),
        ({"curriculum": "random", "seed": 1}, r"data\.curriculum must be null or one of ascending, .* got 'random'"),
        ({"curriculum": "mixed"}, r"need data\.seed"),
        ({"augmented_epochs": 2}, r"need data\.seed"),
        ({"augmented_epochs": 0, "seed": 1}, r"data\.augmented_epochs must be null or a positive whole number, got 0"),
        ({"augmented_epochs": 1.5, "seed": 1}, r"data\.augmented_epochs must be null or a positive whole number"),
    ],
)
def test_bad_order_settings(data, tokenizer, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        dataset(data, tokenizer, tmp_path, **options)


def test_augmentation_needs_prompts_that_belong_to_their_questions(data, tokenizer, tmp_path):
    rows = list(iter_parquet(data))
    rows[2]["prompt"] = [{"role": "user", "content": "Which types?"}]
    rows[2]["extra_info"]["prompt_layout"] = None  # not of our making
    pq.write_table(pa.Table.from_pylist(rows), data)
    with pytest.raises(ValueError, match=r"row 2, column 'prompt': .* set data\.prompt_layout"):
        dataset(data, tokenizer, tmp_path, augmented_epochs=2, seed=1)
    assert len(dataset(data, tokenizer, tmp_path, augmented_epochs=2, seed=1, prompt_layout="system")) == 8


def test_an_order_that_makes_the_prompt_too_long_is_not_used(sizes, tokenizer, tmp_path, monkeypatch):
    rows = dataset(sizes, tokenizer, tmp_path, augmented_epochs=2, seed=1)
    plain = dataset(sizes, tokenizer, tmp_path)
    assert any(row["prompt"] != plain[row["index"]]["prompt"] for row in (rows[i] for i in range(8, 16)))
    monkeypatch.setattr(rows, "max_prompt_length", 3)
    for row in (rows[i] for i in range(8, 16)):
        assert row["raw_prompt"] == plain[row["index"]]["raw_prompt"]
        assert row["reward_model"] == plain[row["index"]]["reward_model"]
