"""What a run that was stopped finds done."""

import os

from recipe.cello1.data import prepare as prepare_data
from recipe.cello1.data import workers
from recipe.cello1.data.extract import process_file
from tests.helpers.prepare_runs import FEW, content, run


def count_calls(monkeypatch) -> list[str]:
    seen = []

    def counted(job, progress=None):
        seen.append(job.name)
        return process_file(job, progress)

    monkeypatch.setattr(workers, "process_file", counted)
    return seen


def test_files_that_are_done_are_not_done_again(folder, tmp_path, monkeypatch, capsys):
    seen = count_calls(monkeypatch)
    assert run(folder, "--out", tmp_path, *FEW) == 0
    first = content(tmp_path)
    assert run(folder, "--out", tmp_path, *FEW) == 0
    assert len(seen) == 3
    assert content(tmp_path) == first
    assert "3 of 3 files were done before" in capsys.readouterr().err
    assert run(folder, "--out", tmp_path, *FEW, "--fresh") == 0
    assert len(seen) == 6
    assert run(folder, "--out", tmp_path, *FEW, "--top-genes", "40") == 0
    assert len(seen) == 9
    os.utime(folder / "lung" / "file0.h5ad")
    assert run(folder, "--out", tmp_path, *FEW, "--top-genes", "40") == 0
    assert seen[9:] == ["lung/file0"]
    (tmp_path / ".parts" / "lung" / "file1.json").write_text("{}")
    assert run(folder, "--out", tmp_path, *FEW, "--top-genes", "40", "--raw") == 0
    assert len(seen) == 13  # all, for the records


def test_interrupted_it_goes_on_and_gives_the_same_bytes(folder, made, tmp_path, monkeypatch):
    done = []

    def fails(job, progress=None):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.name)
        return process_file(job, progress)

    monkeypatch.setattr(workers, "process_file", fails)
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 130
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    seen = count_calls(monkeypatch)
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0
    assert len(seen) == 1
    assert content(tmp_path) == content(made)


def test_records_of_an_interrupted_run_with_other_settings_are_made_again(folder, made, tmp_path, monkeypatch):
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "save_part", killed)
        assert run(folder, "--out", tmp_path, "--raw", *FEW, "--top-genes", "20") == 130
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0
    assert content(tmp_path) == content(made)
