import pytest

from recipe.cello1.export import export, latest_step, main


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for step in (2, 10):
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def test_the_last_complete_step_counts_not_the_largest(run):
    assert latest_step(run) == 2


def test_run_without_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint was completed there; train first"):
        latest_step(tmp_path)


def test_step_that_is_not_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has \[2, 10\]"):
        export(run, tmp_path / "out", step=7)


def test_existing_output_is_kept(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it or choose another --out"):
        export(run, out)


def test_failure_of_the_merger_leaves_nothing(run, tmp_path, capsys):
    pytest.importorskip("verl")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 1
    assert "error: verl.model_merger failed on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
