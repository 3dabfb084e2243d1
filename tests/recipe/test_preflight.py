import subprocess
import sys
from pathlib import Path

import pytest

from recipe.cello1 import preflight
from recipe.cello1.preflight import check_model, main, rl_data
from recipe.cello1.records import write_puzzles
from recipe.cello1.rl_parquet import read_rl_parquet, write_rl_parquet
from tests.recipe.toy_model import toy_puzzles


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.parquet"
    write_rl_parquet(path, toy_puzzles(2), "train")
    return path


def arguments(model, train, val, out) -> list[str]:
    return ["--model", str(model), "--train", str(train), "--val", str(val), "--out", str(out)]


def test_prints_the_files_to_train_on(model, data, tmp_path, capsys):
    assert main(arguments(model, data, data, tmp_path)) == 0
    assert capsys.readouterr().out.splitlines() == [str(data), str(data)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_puzzle_json_is_converted(tmp_path, suffix):
    source = tmp_path / f"puzzles{suffix}"
    write_puzzles(source, toy_puzzles(3))
    target = rl_data(str(source), "val", tmp_path / "out", "user")
    assert target == tmp_path / "out" / "val.parquet"
    assert [row["extra_info"]["prompt_layout"] for row in read_rl_parquet(target)] == ["user"] * 3


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_incomplete_model(model, missing):
    (model / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"not a complete Hugging Face model: it has no "):
        check_model(str(model))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "~/model"])
def test_folder_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder"):
        check_model(name)


def test_hub_id_that_cannot_be_looked_up():
    with pytest.raises(FileNotFoundError, match="neither a folder nor in the local cache"):
        check_model("nobody-at-all/no-such-model")


@pytest.mark.parametrize("bad", ["missing.parquet", "missing.json"])
def test_missing_data_is_one_line_and_a_code(model, data, tmp_path, capsys, bad):
    assert main(arguments(model, tmp_path / bad, data, tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and bad in err and err.count("\n") == 1


def test_empty_dataset(model, data, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    assert main(arguments(model, empty, data, tmp_path)) == 2
    assert "error:" in capsys.readouterr().err


PLATFORM = "from recipe.cello1.preflight import check_platform; check_platform()"


def test_unknown_platform_says_so():
    pytest.importorskip("verl")
    result = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['VERL_PLATFORM'] = 'cpu'; import verl\n"
         f"os.environ['VERL_PLATFORM'] = 'abacus'\n{PLATFORM}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "VERL_PLATFORM=abacus: no installed verl plugin registers it" in result.stderr


def test_broken_plugin_is_loud(tmp_path):
    """Its own error comes up, although verl swallows it."""
    pytest.importorskip("verl")
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nbroken = broken_platform\n")
    (tmp_path / "broken_platform.py").write_text("import a_module_that_is_not_there\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import os; os.environ['VERL_PLATFORM'] = 'cpu'; {PLATFORM}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "the verl plugin broken (broken_platform) cannot be loaded" in result.stderr
    assert "a_module_that_is_not_there" in result.stderr


def test_cpu_training_without_the_vllm_plugin(monkeypatch):
    pytest.importorskip("verl")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(preflight, "entry_points", lambda group, **_: [])
    monkeypatch.setattr("verl.plugin.platform.PlatformRegistry.get", lambda name: object())
    with pytest.raises(ValueError, match="lacks the vLLM plugin cello1_cpu"):
        preflight.check_platform()
