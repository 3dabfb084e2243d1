"""The whole command: what it writes, every option, every refusal."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from recipe.cello1.data import leaks, options, workers
from recipe.cello1.data import prepare as prepare_data
from recipe.cello1.data.extract import FileResult, Job, process_file
from recipe.cello1.data.settings import Settings
from recipe.cello1.formats.items import item_to_puzzle
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.formats.rl_parquet import read_rl_parquet
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.genes import top_genes
from recipe.cello1.task.prompt import VARIANTS, messages, render_user
from recipe.cello1.task.scoring import score_answer
from tests.helpers.cli import command
from tests.helpers.toy_h5ad import toy_adata, write

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("CELLO1_SHARED_DATA") or ROOT.parent / "shared" / "data")
REAL = SHARED / "cellpuzzles_unseen_melanoma.json"
FEW = ["--sizes", "3-4", "--per-size", "10", "--quiet", "--workers", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three good files in two folders."""
    root = tmp_path_factory.mktemp("input")
    for i, place in enumerate(("lung", "lung", "kidney")):
        adata = toy_adata(i, n_cells=300, donor_prefix=f"d{i}_")
        adata.obs["tissue"] = f"{place} {i}"
        write(adata, root / place / f"file{i}.h5ad", compression="gzip")
    return root


def run(*arguments) -> int:
    words = [str(argument) for argument in arguments]
    return command("prepare audit")(words[1:]) if words[:1] == ["audit"] else command("prepare")(words)


def content(out: Path, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Hash of every file, hidden ones left out."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    names = {path.relative_to(out).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not name.startswith(".") and name not in besides
    }


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_bytes())


# -------------------------------------------------------------------------------------------------------------- output


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert run(folder, "--out", out, "--raw", *FEW) == 0
    return out


def test_files(made):
    assert set(content(made)) == {
        "manifest.json",
        "leak_audit.json",
        "left_out.json",
        "rl/train.parquet",
        "rl/test.parquet",
        "train/train_data.json",
        "train/train_raw_data.json",
        "test/test_data.json",
        *(f"{side}/{name}_{side}.json" for side in ("train", "test") for name in NAMES),
        *(f"train/{name}_train_raw.json" for name in NAMES),
        *(f"cells/{name}.json" for name in NAMES),
    }


NAMES = ("lung/file0", "lung/file1", "kidney/file2")


def test_merged_files_are_the_single_ones_joined(made):
    for side in ("train", "test"):
        merged = json.loads((made / side / f"{side}_data.json").read_bytes())
        alone = [json.loads((made / side / f"{name}_{side}.json").read_bytes()) for name in sorted(NAMES)]
        assert merged == [item for part in alone for item in part]
    assert len(json.loads((made / "train/train_data.json").read_bytes())) == 52
    assert len(json.loads((made / "test/test_data.json").read_bytes())) == 6
    assert len(json.loads((made / "left_out.json").read_bytes())) == 2


def test_items_have_the_published_keys_and_bytes_of_write_puzzles(made, tmp_path):
    path = made / "train" / "train_data.json"
    item = json.loads(path.read_bytes())[0]
    assert list(item)[:3] == ["system_msg", "user_msg", "assistant_msg"]
    puzzles = load_puzzles(path).puzzles
    write_puzzles(tmp_path / "again.json", puzzles)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_every_puzzle_is_solved_by_its_answer(made):
    for side in ("train", "test"):
        for puzzle in load_puzzles(made / side / f"{side}_data.json").puzzles:
            assert score_answer(format_answer(puzzle.answer), " | ".join(puzzle.answer)).score == 1.0


def test_parquet_is_what_verl_reads(made):
    rows = read_rl_parquet(made / "rl" / "train.parquet")
    puzzles = load_puzzles(made / "train" / "train_data.json").puzzles
    assert [row["prompt"] for row in rows] == [messages(puzzle) for puzzle in puzzles]
    assert [row["extra_info"]["index"] for row in rows] == list(range(52))
    assert rows[0]["extra_info"]["split"] == "train"
    assert rows[0]["extra_info"]["tissue"] == "kidney 2"


def test_raw_form(made):
    raw = json.loads((made / "train" / "train_raw_data.json").read_bytes())
    puzzles = load_puzzles(made / "train" / "train_data.json").puzzles
    assert [list(item) for item in raw] == [["selected_cells", "question", "answer", "group"]] * len(puzzles)
    assert raw[0]["selected_cells"] == puzzles[0].meta["cell_ids"]
    assert raw[0]["question"] == render_user(puzzles[0])
    assert raw[0]["group"] == puzzles[0].meta["donor_id"]
    assert len(json.loads((made / "cells" / "lung" / "file0.json").read_bytes())) == 300


def test_manifest(made):
    found = manifest(made)
    assert found["files"] == {name: value for name, value in content(made).items() if name != "manifest.json"}
    assert found["settings"]["seed"] == 1
    assert found["settings"]["sizes"] == [3, 4]
    assert found["plan"]["split"] == "donor"
    assert {entry["name"]: entry["status"] for entry in found["inputs"]} == dict.fromkeys(NAMES, "used")
    assert all(entry["cells"] == 300 and len(entry["sha256_of_ends"]) == 64 for entry in found["inputs"])
    assert found["splits"]["train"]["by_n_cells"] == {"3": 26, "4": 26}
    assert set(found["splits"]["train"]["by_tissue"]) <= {"lung 0", "lung 1", "kidney 2"}
    assert sum(found["splits"]["test"]["by_disease"].values()) == 6
    assert sum(found["splits"]["train"]["by_type"].values()) == 26 * 7
    assert found["leaks"]["train/test"]["leaks"] is False
    assert set(found["versions"]) >= {"python", "numpy", "h5py", "anndata"}
    assert str(made) not in json.dumps(found)


def test_the_default_split_leaks_nothing(made):
    found = json.loads((made / "leak_audit.json").read_bytes())
    shared = {
        name: found["audits"]["train/test"][name]["shared"] for name in ("cells", "donors", "puzzles", "reordered")
    }
    assert shared == dict.fromkeys(shared, 0)
    assert run("audit", made / "train/train_data.json", made / "test/test_data.json", "--fail-on-leak") == 0


# ----------------------------------------------------------------------------------------------------- reproducibility


def test_same_seed_same_bytes_whatever_the_workers_and_threads(folder, made, tmp_path):
    arguments = ["--sizes", "3-4", "--per-size", "10", "--quiet", "--raw"]
    assert run(folder, "--out", tmp_path / "b", *arguments, "--workers", "3", "--threads", "2") == 0
    assert content(tmp_path / "b") == content(made)


def test_another_seed_gives_other_puzzles(folder, made, tmp_path):
    assert run(folder, "--out", tmp_path, "--raw", *FEW, "--seed", "2") == 0
    assert content(tmp_path)["train/train_data.json"] != content(made)["train/train_data.json"]


@pytest.mark.integration
def test_a_ray_cluster_gives_the_same_bytes(folder, made, tmp_path):
    pytest.importorskip("ray")
    assert run(folder, "--out", tmp_path, "--raw", *FEW, "--ray-address", "local") == 0
    assert content(tmp_path) == content(made)


def test_a_ray_cluster_that_is_not_there(folder, tmp_path, capsys, monkeypatch):
    ray = pytest.importorskip("ray")

    def refuse(**options):
        assert options["address"] == "ray://nowhere:1"
        raise ConnectionError("no")

    monkeypatch.setattr(ray, "init", refuse)
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "ray://nowhere:1") == 1
    assert "no Ray cluster can be reached there" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ resuming


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


def test_files_of_an_earlier_run_are_not_left_behind(folder, tmp_path):
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0
    (tmp_path / "mine.txt").write_text("kept")
    assert run(folder / "lung", "--out", tmp_path, *FEW) == 0
    assert not (tmp_path / "train" / "kidney" / "file2_train.json").exists()
    assert not (tmp_path / "train" / "train_raw_data.json").exists()
    assert (tmp_path / "mine.txt").exists()
    assert set(manifest(tmp_path)["files"]) | {"manifest.json", "mine.txt"} == set(content(tmp_path))


@pytest.mark.parametrize("key", ["files", "stale_files"])
def test_a_manifest_cannot_have_other_files_removed(folder, tmp_path, key):
    out, outside = tmp_path / "out", tmp_path / "train"
    for place in (out / "train", out / "deep", outside):
        place.mkdir(parents=True)
    kept = [
        tmp_path / "x.json",
        outside / "a_train.json",
        out / "mine.json",
        out / "train" / "notes.txt",
        out / "a.json",
    ]
    for path in kept:
        path.write_text("mine")
    (out / "linked").symlink_to(tmp_path)
    (out / "val").symlink_to(outside)
    (out / "deep" / "deep.json").mkdir()
    (outside / "b_val.json").write_text("mine")
    stale = out / "train" / "old_train.json"
    stale.write_text("[]")
    names = [
        *("../x.json", "../train/a_train.json", "train/../../x.json", "linked/x.json", "val/b_val.json", "mine.json"),
        *("train/notes.txt", "train", "deep", ".", "", "a.json", str(tmp_path / "x.json"), str(kept[1])),
        "linked/train/../linked_linked.json",
        "deep/deep.json",
        "train/old_train.json",
    ]
    (out / "manifest.json").write_text(
        json.dumps({key: {name: "0" for name in names} if key == "files" else [*names, 3]})
    )
    build(folder, out)
    assert [path for path in (*kept, outside / "b_val.json") if not path.exists()] == []
    assert not stale.exists()
    (out / "manifest.json").write_text("[" * 100_000)
    build(folder, out)


def test_an_interrupted_rebuild_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipe.cello1.data.build.write_rl_parquet", killed)
        assert run(folder / "kidney", "--out", tmp_path, *FEW) == 130
    assert "not finished" in manifest(tmp_path)["error"]
    assert (tmp_path / "train" / "file2_train.json").exists()
    half = tmp_path / "train" / f".train_data.json.{'0' * 32}.tmp"  # as SIGKILL leaves it
    half.write_text("[")
    (tmp_path / ".mine.tmp").write_text("kept")
    assert run(folder / "lung", "--out", tmp_path, *FEW) == 0
    assert not half.exists()
    assert (tmp_path / ".mine.tmp").exists()
    assert set(manifest(tmp_path)["files"]) | {"manifest.json"} == set(content(tmp_path))


def test_links_and_capitals(folder, tmp_path):
    root = tmp_path / "in"
    (root / "a").mkdir(parents=True)
    (root / "a" / "X.H5AD").write_bytes((folder / "lung" / "file0.h5ad").read_bytes())
    (root / "a" / "again").symlink_to(root)
    (root / "b").symlink_to(root / "a")
    (root / "c.h5ad").symlink_to(root / "a" / "X.H5AD")
    build(root, tmp_path / "out")
    assert [entry["name"] for entry in manifest(tmp_path / "out")["inputs"]] == ["c"]
    (root / "c.h5ad").unlink()
    build(root, tmp_path / "out")
    assert [entry["name"] for entry in manifest(tmp_path / "out")["inputs"]] == ["a/X"]


def test_the_folder_of_a_link_decides_the_extra_sentences(tmp_path, monkeypatch):
    adata = toy_adata(n_cells=300)
    adata.obs["ever_smoker"] = "yes"
    stored = write(adata, tmp_path / "store" / "abc.h5ad")
    (tmp_path / "copd" / "sub").mkdir(parents=True)
    (tmp_path / "copd" / "x.h5ad").symlink_to(stored)
    monkeypatch.chdir(tmp_path / "copd" / "sub")
    for place in (tmp_path / "copd", tmp_path / "copd" / "x.h5ad", Path(".."), Path("../x.h5ad")):
        puzzles = build(place, tmp_path / "out")
        assert all(puzzle.context.endswith("The patient is a smoker.") for puzzle in puzzles)


@pytest.mark.parametrize("kills", ["together", "always"])
def test_the_file_that_kills_a_worker_is_found_out(folder, tmp_path, capsys, monkeypatch, kills):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        """Does the work here and now; a process is "killed" by one of the files."""

        def __init__(self, workers, **options):
            self.workers, self.broken = workers, False

        def submit(self, function, job):
            future = Future()
            self.broken |= job.name == "lung/file1" and (kills == "always" or self.workers > 1)
            if self.broken:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(process_file(job))
            return future

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    status = run(folder, "--out", tmp_path, *FEW[:-1], "2")
    captured = capsys.readouterr()
    entries = {entry["name"]: entry for entry in manifest(tmp_path)["inputs"]}
    assert len(entries) == 3
    assert "lung/file1" in captured.err and "each of these is tried again alone" in captured.err
    bad = [name for name, entry in entries.items() if entry["status"] == "bad"]
    if kills == "always":
        assert (status, bad) == (1, ["lung/file1"])
        assert "the process that worked on it alone was killed" in entries["lung/file1"]["reason"]
        assert "bad   lung/file1" in captured.out
    else:
        assert (status, bad) == (0, [])


class FakeRay:
    """Does the work here and now; what comes of one of the files may be given."""

    def __init__(self, error: str = "", *arguments):
        self.exceptions = pytest.importorskip("ray").exceptions
        self.error = getattr(self.exceptions, error)(*arguments) if error else None
        self.jobs = {}

    def is_initialized(self) -> bool:
        return True

    def remote(self, function):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self.submit))

    def submit(self, job) -> str:
        self.jobs[job.name] = job
        return job.name

    def wait(self, waiting, num_returns):
        return waiting[:num_returns], waiting[num_returns:]

    def get(self, name):
        if self.error and name == "lung/file1":
            raise self.error
        with contextlib.chdir("/"):  # where the cluster was started
            return process_file(self.jobs[name])


@pytest.mark.parametrize("error", [("WorkerCrashedError",), ("OutOfMemoryError", "too much")])
def test_a_file_that_kills_its_process_on_ray_is_bad(folder, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setitem(sys.modules, "ray", FakeRay(*error))
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "auto") == 1
    entries = {entry["name"]: entry for entry in manifest(tmp_path)["inputs"]}
    assert [name for name, entry in entries.items() if entry["status"] == "bad"] == ["lung/file1"]
    assert "was killed, for want of memory" in entries["lung/file1"]["reason"]
    assert "more memory" in entries["lung/file1"]["remedy"]
    assert "3 files: 2 used, 1 bad" in capsys.readouterr().out
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "auto", "--skip-bad") == 0


def test_a_ray_cluster_that_is_lost(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay("RaySystemError", "gone"))
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "auto", "--skip-bad") == 1
    assert "the Ray cluster lost the task" in capsys.readouterr().err


def test_relative_paths_hold_on_a_cluster_too(folder, made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.chdir(folder.parent)
    arguments = [os.path.relpath(folder), "--out", os.path.relpath(tmp_path), "--raw", *FEW, "--ray-address", "auto"]
    assert run(*arguments) == 0
    assert content(tmp_path) == content(made)


@pytest.mark.integration
def test_a_file_that_kills_its_process_on_a_real_cluster_is_bad(folder, tmp_path, monkeypatch):
    pytest.importorskip("ray")

    def killed(job, progress=None):
        if job.name == "lung/file1":
            os.kill(os.getpid(), signal.SIGKILL)
        return process_file(job, progress)

    monkeypatch.setattr(workers, "process_file", killed)
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "local", "--skip-bad") == 0
    assert [entry["status"] for entry in manifest(tmp_path)["inputs"]] == ["used", "used", "bad"]


# ----------------------------------------------------------------------------------------------------------- bad files


def spoil(root: Path) -> dict[str, str]:
    """One file for each thing that may be wrong; returns what is to be said of each."""
    expected = {}

    def add(name, said, change):
        adata = toy_adata(n_cells=200, donor_prefix=name)
        adata = change(adata) or adata
        write(adata, root / f"{name}.h5ad")
        expected[name] = said

    def x(rows, value):
        def change(adata):
            matrix = adata.X.toarray()
            matrix[rows] = value
            adata.X = sp.csr_matrix(matrix)

        return change

    def few_genes(adata):
        matrix = adata.X.toarray()
        matrix[:, 30:] = 0
        adata.X = sp.csr_matrix(matrix)

    def no_symbols(adata):
        del adata.var["feature_name"]

    def no_donors(adata):
        del adata.obs["donor_id"]

    def donor_nan(adata):
        donors = adata.obs["donor_id"].astype(object)
        donors.iloc[:50] = np.nan
        adata.obs["donor_id"] = pd.Categorical(donors)

    def twice(adata):
        adata.var["feature_name"] = ["GENE1", *adata.var["feature_name"][1:]]

    def pipe(adata):
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type 2": "T|B"})

    add("good", "", lambda adata: None)
    add("symbols", "bad: var has no column 'feature_name'", no_symbols)
    add("donors", "bad: obs has no column 'donor_id'", no_donors)
    add("nan", "bad: NaN or infinity", x(slice(None), np.nan))
    add("few", "note: express fewer than 50 genes", few_genes)
    add("empty", "note: express fewer than --min-genes 1", x(slice(0, 60), 0))
    add("twice", "note: 1 gene names stand for several columns", twice)
    add("donornan", "note: 50 of 200 cells left out: donor_id names no donor", donor_nan)
    add("pipe", "bad: 'T|B' contains '|'", pipe)
    add("truncated", "bad: HDF5 file cannot be read", lambda adata: None)
    path = root / "truncated.h5ad"
    path.write_bytes(path.read_bytes()[:5000])
    return expected


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_with_everything_that_may_be_wrong(tmp_path, capsys, workers):
    root, out = tmp_path / "in", tmp_path / "out"
    expected = spoil(root)
    assert run(root, "--out", out, *FEW, "--workers", workers) == 1
    captured = capsys.readouterr()
    assert "--skip-bad" in captured.err
    entries = {entry["name"]: entry for entry in manifest(out)["inputs"]}
    for name, said in expected.items():
        kind, _, text = said.partition(": ")
        entry = entries[name]
        assert entry["status"] == ("bad" if kind == "bad" else "used")
        if kind == "bad":
            assert text in entry["reason"]
            assert entry["remedy"]
            assert f"bad   {name}: {entry['reason']}; {entry['remedy']}" in captured.out
            assert not list(out.rglob(f"{name}*"))
        else:
            assert len(read_puzzles_of(out, name)) == 20
        if kind == "note":
            assert any(text in note for note in entry["notes"])
            assert text in captured.out
    assert "10 files: 5 used, 5 bad" in captured.out
    assert not list(out.rglob("*.tmp"))
    assert run(root, "--out", out, *FEW, "--skip-bad") == 0


def read_puzzles_of(out: Path, name: str) -> list:
    sides = [json.loads((out / side / f"{name}_{side}.json").read_bytes()) for side in ("train", "test")]
    left = out / "left_out.json"
    more = [item for item in json.loads(left.read_bytes()) if item["dataset"] == name] if left.exists() else []
    return [item for side in sides for item in side] + more


@pytest.mark.filterwarnings("ignore:Writing zarr")
def test_of_two_files_of_one_name_the_second_is_bad(folder, tmp_path, capsys):
    for name in ("a.h5ad", "a.zarr", "b.h5ad"):
        write(toy_adata(n_cells=200, donor_prefix=name), tmp_path / "in" / name)
    assert run(tmp_path / "in", folder, folder / "lung", tmp_path / "in" / "b.h5ad", "--out", tmp_path, *FEW) == 1
    entries = {entry["name"]: entry for entry in manifest(tmp_path)["inputs"]}
    used = [name for name, entry in entries.items() if entry["status"] == "used"]
    assert used == ["a", "b", *sorted(NAMES), "file0", "file1"]
    bad = [name for name, entry in entries.items() if entry["status"] == "bad"]
    assert bad == ["a.zarr", "b.h5ad"]
    assert "a.h5ad and " in entries["a.zarr"]["reason"] and "both be called 'a'" in entries["a.zarr"]["reason"]
    assert "rename one of them" in entries["a.zarr"]["remedy"]
    assert "bad   a.zarr: " in capsys.readouterr().out
    assert run(tmp_path / "in", "--out", tmp_path, *FEW, "--skip-bad") == 0


def test_a_name_that_is_not_utf8_is_bad(folder, tmp_path):
    place = tmp_path / "in" / os.fsdecode(b"caf\xe9")
    try:
        place.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for name in (place / "a.h5ad", tmp_path / "in" / "b.h5ad"):
        name.write_bytes((folder / "lung" / "file0.h5ad").read_bytes())
    result = subprocess.run(
        [sys.executable, "-m", "recipe.cello1", "prepare", tmp_path / "in", "--out", tmp_path / "out", *FEW],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},  # as a terminal has it
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "bad   caf\\udce9/a: its name, or that of a folder it lies in, is not UTF-8; rename it" in result.stdout
    entries = manifest(tmp_path / "out")["inputs"]
    assert [(entry["name"], entry["status"]) for entry in entries] == [("b", "used"), ("caf\\udce9/a", "bad")]


def test_one_bad_file_alone(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.h5ad").write_text("x")
    assert run(tmp_path / "in", "--out", tmp_path / "out", *FEW) == 1
    assert "none of the files could be used" in capsys.readouterr().err
    found = manifest(tmp_path / "out")
    assert found["error"] == "none of the files could be used"
    assert [entry["status"] for entry in found["inputs"]] == ["bad"]
    assert found["inputs"][0]["reason"] and found["inputs"][0]["remedy"]
    assert "files" not in found
    assert list(content(tmp_path / "out")) == ["manifest.json"]


def test_the_manifest_of_an_earlier_run_does_not_stay_when_a_run_fails(folder, tmp_path):
    build(folder, tmp_path)
    before = manifest(tmp_path)["files"]
    one_donor = write(toy_adata(n_cells=200, n_donors=1), tmp_path / "in" / "a.h5ad")
    assert run(one_donor, "--out", tmp_path, *FEW) == 1
    found = manifest(tmp_path)
    assert "--split puzzle" in found["error"]
    assert [entry["status"] for entry in found["inputs"]] == ["used"]
    assert set(found["stale_files"]) == set(before)
    assert run(one_donor, "--out", tmp_path, *FEW, "--split", "puzzle") == 0
    assert set(manifest(tmp_path)["files"]) | {"manifest.json", "in/a.h5ad"} == set(content(tmp_path))


# ------------------------------------------------------------------------------------------------------------- options


def build(folder, out, *options) -> list:
    assert run(folder, "--out", out, *FEW, *options) == 0
    return load_puzzles(out / "train" / "train_data.json").puzzles


@pytest.mark.parametrize("task", ["batch", "single"])
@pytest.mark.parametrize("candidates", ["given", "open"])
def test_task_and_candidates(folder, tmp_path, task, candidates):
    variant = task + ("_open" if candidates == "open" else "")
    options = ["--task", task, "--candidates", candidates, "--per-size", "12", "--quiet", "--workers", "1"]
    if task == "batch":
        options += ["--sizes", "3"]
    assert run(folder, "--out", tmp_path, *options) == 0
    puzzles = load_puzzles(tmp_path / "train" / "train_data.json", variant).puzzles
    assert {puzzle.n_cells for puzzle in puzzles} == {1 if task == "single" else 3}
    assert all(bool(puzzle.candidates) == (candidates == "given") for puzzle in puzzles)
    rows = read_rl_parquet(tmp_path / "rl" / "train.parquet")
    assert rows[0]["prompt"] == messages(puzzles[0], variant=variant)
    assert variant in VARIANTS


def test_single_cells_are_all_taken_unless_a_number_is_given(folder, tmp_path):
    one = folder / "lung" / "file0.h5ad"
    assert run(one, "--out", tmp_path, "--task", "single", "--quiet") == 0
    assert sum(part["puzzles"] for part in manifest(tmp_path)["splits"].values()) == 300


def test_cells_without_a_puzzle_are_counted(tmp_path):
    adata = toy_adata(n_cells=300)
    adata.obs["donor_id"] = adata.obs["donor_id"].astype(str).where(adata.obs["cell_type"] != "type 1", "solo")
    path = write(adata, tmp_path / "a.h5ad")
    solo = int((adata.obs["donor_id"] == "solo").sum())
    assert run(path, "--out", tmp_path / "out", "--task", "single", "--quiet") == 0
    (note,) = manifest(tmp_path / "out")["inputs"][0]["notes"]
    assert note.startswith(f"{solo} of 300 cells make no puzzle")
    adata.obs["donor_id"] = adata.obs["cell_type"].astype(str)
    path = write(adata, tmp_path / "b.h5ad")
    assert run(path, "--out", tmp_path / "out", "--sizes", "3", "--per-size", "0", "--quiet") == 1
    assert "no puzzle (N=3: 0)" in manifest(tmp_path / "out")["inputs"][0]["notes"][0]


def test_puzzle_options(folder, tmp_path):
    options = (
        "--top-genes",
        "20",
        "--max-cells",
        "150",
        "--exclude-genes",
        "^GENE1",
        "--exclude-genes",
        "housekeeping",
    )
    puzzles = build(folder, tmp_path, *options, "--exclude-types", "type [12]", "--min-genes", "20")
    genes = [cell for puzzle in puzzles for cell in puzzle.cells]
    assert {len(cell) for cell in genes} == {20}
    assert not any(gene.startswith("GENE1") for cell in genes for gene in cell)
    assert not {"type 1", "type 2"} & {name for puzzle in puzzles for name in puzzle.answer}
    assert {entry["cells_drawn_from"] for entry in manifest(tmp_path)["inputs"]} == {150}


def test_columns_layer_raw_and_suspension(tmp_path):
    adata = toy_adata(n_cells=300)
    expected = [tuple(genes) for genes in top_genes(adata.X, adata.var["feature_name"], 50)]
    adata.layers["kept"] = adata.X
    adata.raw = adata
    adata.X = sp.csr_matrix(adata.shape, dtype="float32")
    adata.obs = adata.obs.rename(columns={"cell_type": "label", "donor_id": "patient"})
    adata.obs["run"] = ["r1", "r2"] * 150
    adata.obs["suspension_type"] = "nucleus"
    path = write(adata, tmp_path / "a.h5ad")
    options = ["--type-column", "label", "--donor-column", "patient", "--batch-column", "run", "--suspension", "any"]
    for source in (["--layer", "kept"], ["--use-raw"]):
        puzzles = build(path, tmp_path / source[0], *options, *source, "--sizes", "3")
        assert all(set(puzzle.cells) <= set(expected) for puzzle in puzzles)
        assert {puzzle.meta["batch"] for puzzle in puzzles} == {"r1", "r2"}
    assert run(path, "--out", tmp_path / "i", *FEW, *options, "--use-raw", "--gene-column", "index") == 1  # Ensembl ids
    assert "--gene-column feature_name" in manifest(tmp_path / "i")["inputs"][0]["remedy"]


def test_rank_by(folder, tmp_path):
    by_expression = build(folder, tmp_path / "a")
    by_specificity = build(folder, tmp_path / "b", "--rank-by", "specificity")
    assert [p.meta["cell_ids"] for p in by_expression] == [p.meta["cell_ids"] for p in by_specificity]
    assert [p.cells for p in by_expression] != [p.cells for p in by_specificity]


def test_context_table(tmp_path):
    adata = toy_adata(n_cells=300)
    adata.obs["dose"] = "10 mg"
    path = write(adata, tmp_path / "trial" / "a.h5ad")
    table = tmp_path / "table.yaml"
    table.write_text("fields: {dose: 'The dose was {value}.'}\ndatasets: {trial: [dose]}\n")
    puzzles = build(path, tmp_path / "out", "--context-table", table)
    assert all(puzzle.context.endswith("The dose was 10 mg.") for puzzle in puzzles)
    assert manifest(tmp_path / "out")["settings"]["context"] == table.read_text()


def test_layout(folder, tmp_path):
    puzzles = build(folder, tmp_path, "--layout", "user")
    rows = read_rl_parquet(tmp_path / "rl" / "train.parquet")
    assert rows[0]["prompt"] == messages(puzzles[0], "user")
    assert rows[0]["extra_info"]["prompt_layout"] == "user"


@pytest.mark.parametrize("split", ["donor", "dataset", "tissue"])
def test_splits_by_group(folder, tmp_path, split):
    build(folder, tmp_path, "--split", split)
    key = {"donor": "donor_id", "dataset": "dataset", "tissue": "tissue"}[split]

    def values(name):
        path = tmp_path / name
        return {puzzle.meta[key] for puzzle in load_puzzles(path).puzzles} if path.exists() else set()

    sides = [values(f"{side}/{side}_data.json") for side in ("train", "test")]
    assert not sides[0] & sides[1]
    assert manifest(tmp_path)["leaks"]["train/test"]["leaks"] is False
    assert not values("left_out.json") & sides[0]
    if split != "donor":
        assert any("left_out.json" in note for note in manifest(tmp_path)["notes"])


def two_tissues(folder: Path, donors: dict[str, list[int]]) -> Path:
    """One file whose donors are in the tissues that are said."""
    adata = toy_adata(n_cells=900, n_donors=len({d for own in donors.values() for d in own}))
    where = {d: [tissue for tissue, own in donors.items() if d in own] for own in donors.values() for d in own}
    numbers = adata.obs["donor_id"].astype(str).str.removeprefix("donor").astype(int)
    adata.obs["tissue"] = [where[d][i % len(where[d])] for i, d in enumerate(numbers.tolist())]
    adata.obs["batch"] = adata.obs["tissue"]  # so that each puzzle is of one
    return write(adata, folder / "a.h5ad")


def test_by_tissue_no_donor_is_on_both_sides_either(tmp_path):
    path = two_tissues(tmp_path, {"lung": [0, 1, 2], "blood": [2, 3], "skin": [4], "liver": [5]})
    build(path, tmp_path / "out", "--split", "tissue", "--sizes", "3", "--fail-on-leak")
    for side, other in (("train", "test"), ("test", "train")):
        tissues = {p.meta["tissue"] for p in load_puzzles(tmp_path / "out" / side / f"{side}_data.json").puzzles}
        others = {p.meta["tissue"] for p in load_puzzles(tmp_path / "out" / other / f"{other}_data.json").puzzles}
        assert not {"lung", "blood"} & tissues or not {"lung", "blood"} & others


def test_donors_that_link_all_tissues_are_on_both_sides_and_that_is_said(tmp_path, capsys):
    path = two_tissues(tmp_path, {"lung": [0, 1, 2], "blood": [0, 1, 2]})
    build(path, tmp_path / "out", "--split", "tissue", "--sizes", "3")
    assert "every tissue is linked to every other by donors" in manifest(tmp_path / "out")["notes"][0]
    leaks = manifest(tmp_path / "out")["leaks"]["train/test"]
    assert leaks["donors"]["shared"] > 0
    assert leaks["cells"]["shared"] == 0
    assert "note  every tissue" in capsys.readouterr().out
    assert run(path, "--out", tmp_path / "out", *FEW, "--sizes", "3", "--split", "tissue", "--fail-on-leak") == 1


def test_a_puzzle_that_is_there_several_times_stays_on_one_side(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for name, own in (("train", items), ("more", items[5:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    assert run(tmp_path / "train.json", tmp_path / "more.json", "--out", tmp_path / "out", "--split", "puzzle") == 0
    leaks = manifest(tmp_path / "out")["leaks"]["train/test"]
    assert (leaks["puzzles"]["shared"], leaks["reordered"]["shared"]) == (0, 0)
    (tmp_path / "more.json").rename(tmp_path / "train2.json")
    (tmp_path / "test.json").write_text(json.dumps(items[:5]))
    files = [tmp_path / f"{name}.json" for name in ("train", "train2", "test")]
    assert run(*files, "--out", tmp_path / "out", "--val-size", "10") == 0
    assert manifest(tmp_path / "out")["leaks"]["train/val"]["puzzles"]["shared"] == 0


def test_a_subset_with_its_genes_in_another_order_is_noticed(tmp_path, capsys):
    adata = toy_adata(1, n_cells=600, n_donors=6)
    letters = str.maketrans("0123", "ACGT")
    adata.obs_names = [f"LIB1_{np.base_repr(i, 4).zfill(8).translate(letters)}-1" for i in range(600)]
    write(adata, tmp_path / "in" / "all.h5ad")
    order = np.random.default_rng(0).permutation(adata.n_vars)
    part = adata[adata.obs["cell_type"].isin([f"type {i}" for i in range(4)]), order[: adata.n_vars // 2]].copy()
    write(part, tmp_path / "in" / "subset.h5ad")
    assert run(tmp_path / "in", "--out", tmp_path / "out", *FEW, "--split", "dataset") == 1
    assert "all puzzles belong together" in capsys.readouterr().err
    build(tmp_path / "in", tmp_path / "out", "--fail-on-leak")
    files = []
    for name in ("all", "subset"):
        build(tmp_path / "in" / f"{name}.h5ad", tmp_path / name)
        files.append(tmp_path / name / "train" / "train_data.json")
    assert run("audit", *files, "--out", tmp_path / "audit.json") == 0
    assert json.loads((tmp_path / "audit.json").read_bytes())["cells"]["shared"] > 0


def test_split_by_puzzle_leaks_and_says_so(folder, tmp_path, capsys):
    build(folder, tmp_path, "--split", "puzzle")
    leaks = manifest(tmp_path)["leaks"]["train/test"]
    assert leaks["cells"]["shared"] > 0
    assert leaks["donors"]["shared"] > 0
    assert "leak audit train/test" in capsys.readouterr().out
    assert run(folder, "--out", tmp_path, *FEW, "--split", "puzzle", "--fail-on-leak") == 1
    assert "--fail-on-leak" in capsys.readouterr().err
    assert run(folder, "--out", tmp_path, *FEW, "--split", "donor", "--fail-on-leak") == 0


def test_the_same_donor_in_two_files_is_one_donor(tmp_path):
    for i in range(4):
        write(toy_adata(i, n_cells=200), tmp_path / "in" / f"{i}.h5ad")
    build(tmp_path / "in", tmp_path / "out")
    assert manifest(tmp_path / "out")["leaks"]["train/test"]["leaks"] is False


def test_the_same_cells_in_two_files_under_other_donors_stay_together(tmp_path):
    for name in ("a", "b"):
        write(toy_adata(0, n_cells=200, donor_prefix=name), tmp_path / "in" / f"{name}.h5ad")
    build(tmp_path / "in", tmp_path / "out")
    assert manifest(tmp_path / "out")["leaks"]["train/test"]["leaks"] is False


def test_test_size_and_validation(folder, tmp_path):
    build(folder, tmp_path, "--max-test", "8", "--min-test-per-size", "4", "--val-size", "5")
    counts = {side: part["puzzles"] for side, part in manifest(tmp_path)["splits"].items()}
    assert counts["test"] <= 8
    assert 1 <= counts["val"] <= 10
    assert set(manifest(tmp_path)["leaks"]) == {"train/test", "train/val", "val/test"}
    assert not any(found["leaks"] for found in manifest(tmp_path)["leaks"].values())
    assert len(read_rl_parquet(tmp_path / "rl" / "val.parquet")) == counts["val"]
    assert sum(counts.values()) == 60
    held_out = [note for note in manifest(tmp_path)["notes"] if "left_out.json" in note]
    assert sum(int(note.split()[0]) for note in held_out) == counts.get("left_out", 0)
    build(folder, tmp_path, "--min-test-per-size", "9")
    assert manifest(tmp_path)["splits"]["test"]["by_n_cells"] == {"3": 9, "4": 9}


def test_the_same_cells_under_other_names_with_short_lists(tmp_path, capsys):
    for name in ("a", "b"):
        write(toy_adata(0, n_cells=300, donor_prefix=name), tmp_path / "in" / f"{name}.h5ad")
    flags = ("--top-genes", "25", "--fail-on-leak", "--split", "dataset", "--out", tmp_path / "out")
    assert run(tmp_path / "in", *FEW, *flags) == 1
    capsys.readouterr()
    files = []
    for name in ("a", "b"):
        build(tmp_path / "in" / f"{name}.h5ad", tmp_path / name, "--top-genes", "25")
        files.append(tmp_path / name / "train" / "train_data.json")
    assert run("audit", *files, "--fail-on-leak") == 1


def test_validation_and_test_are_compared_too(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for side, own in (("train", items[:5]), ("val", items[5:9]), ("test", items[5:12])):
        (tmp_path / f"{side}.json").write_text(json.dumps(own))
    assert run(tmp_path, "--out", tmp_path / "out") == 0
    leaks = manifest(tmp_path / "out")["leaks"]
    assert set(leaks) == {"train/test", "train/val", "val/test"}
    assert leaks["val/test"]["puzzles"]["shared"] == 4


def test_nothing_to_compare_is_no_proof(made, tmp_path, capsys):
    files = [made / "train" / "train_data.json", "--split", "given", "--out", tmp_path]
    assert run(*files) == 0
    assert run(*files, "--fail-on-leak") == 1
    assert "there are no two sides to compare" in capsys.readouterr().err


def test_drop_overlap(folder, tmp_path):
    big = ("--sizes", "8", "--per-size", "60")
    build(folder, tmp_path, "--split", "puzzle", "--drop-overlap", "--max-cells", "0", "--sizes", "3")
    leaks = manifest(tmp_path)["leaks"]["train/test"]
    assert leaks["cells"]["shared"] == 0
    one = folder / "lung" / "file0.h5ad"
    assert run(one, "--out", tmp_path / "b", *FEW, *big, "--split", "puzzle", "--drop-overlap") == 1


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cell_names_that_restart_with_each_donor_do_not_link_the_donors(tmp_path):
    adata = toy_adata(n_cells=1000)
    path = write(adata, tmp_path / "unique" / "a.h5ad")
    adata.obs_names = [f"AAAC-{number}" for number in adata.obs.groupby("donor_id", observed=True).cumcount()]
    repeated = write(adata, tmp_path / "repeated" / "a.h5ad")
    build(repeated, tmp_path / "out", "--fail-on-leak", "--raw")
    (note,) = manifest(tmp_path / "out")["inputs"][0]["notes"]
    assert "cell names stand for several cells" in note
    records = json.loads((tmp_path / "out" / "cells" / "a.json").read_bytes())
    assert len({record["cell_index"] for record in records}) == 1000
    raw = json.loads((tmp_path / "out" / "train" / "train_raw_data.json").read_bytes())
    assert {name for item in raw for name in item["selected_cells"]} <= {record["cell_index"] for record in records}
    audits = []
    for place, name in ((path, "b"), (repeated, "c")):
        build(place, tmp_path / name, "--split", "puzzle")
        audits.append(json.loads((tmp_path / name / "leak_audit.json").read_bytes()))
    assert audits[0] == audits[1]


def test_one_donor_cannot_be_split(tmp_path, capsys):
    path = write(toy_adata(n_cells=200, n_donors=1), tmp_path / "a.h5ad")
    assert run(path, "--out", tmp_path / "out", *FEW) == 1
    assert "--split puzzle" in capsys.readouterr().err
    assert run(path, "--out", tmp_path / "out", *FEW, "--split", "puzzle") == 0


def test_progress_is_shown_unless_quiet(folder, tmp_path, capsys):
    few = [argument for argument in FEW if argument != "--quiet"]
    assert run(folder, "--out", tmp_path, *few) == 0
    shown = capsys.readouterr().err
    assert "files: 100%" in shown
    assert "cells:" in shown
    assert run(folder, "--out", tmp_path, *few, "--quiet", "--fresh") == 0
    assert "files:" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Writing zarr")
def test_zarr_and_several_inputs(folder, tmp_path):
    write(toy_adata(9, n_cells=200, donor_prefix="z"), tmp_path / "in" / "z.zarr")
    assert run(tmp_path / "in", folder / "lung" / "file0.h5ad", "--out", tmp_path / "out", *FEW) == 0
    assert [entry["name"] for entry in manifest(tmp_path / "out")["inputs"]] == ["z", "file0"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give either INPUT or --from-hub"),
        (["IN", "--from-hub", "a/b"], "give either INPUT or --from-hub"),
        (["nowhere"], "INPUT nowhere does not exist"),
        (["EMPTY"], "no .h5ad files, .zarr stores or puzzle files"),
        (["IN", "PUZZLES"], "give one kind"),
        (["IN", "--split", "given"], "--split given is for puzzle files"),
        (["PUZZLES", "--raw"], "--raw needs expression files"),
        (["PUZZLES", "--top-genes", "9", "--workers", "1"], "--top-genes, --workers needs expression files"),
        (["--from-hub", "a/b", "--exclude-genes", "x"], "--exclude-genes needs expression files"),
        (["IN", "--max-test", "0"], "--max-test must be at least 1"),
        (["IN", "--workers", "0"], "--workers must be at least 1"),
        (["IN", "--threads", "0"], "--threads must be at least 1"),
        (["IN", "--val-size", "-1"], "--val-size must be at least 0"),
        (["IN", "--task", "single", "--sizes", "3"], "does not go with --task single"),
        (["IN", "--layer", "a", "--use-raw"], "exclude each other"),
        (["IN", "--exclude-genes", "("], "exclude_genes: '('"),
        (["IN", "--seed", "-1"], "--seed must be at least 0"),
        (["IN", "--context-table", "nowhere.yaml"], "nowhere.yaml"),
        (["IN", "--sizes", "11"], "there are no puzzles"),
    ],
)
def test_refusals(folder, made, tmp_path, capsys, arguments, match):
    (tmp_path / "empty").mkdir()
    places = {"IN": str(folder), "EMPTY": str(tmp_path / "empty"), "PUZZLES": str(made / "train" / "train_data.json")}
    assert run(*[places.get(argument, argument) for argument in arguments], "--out", tmp_path / "out", "--quiet") == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.startswith("cello1 prepare: error: ")


@pytest.mark.parametrize("sizes", ["a", "3-", "8-x", "", "-3", "15-8", "3,9-8"])
def test_sizes_that_are_none(sizes):
    with pytest.raises(SystemExit):
        run("x", "--out", "y", f"--sizes={sizes}")


def test_sizes():
    assert options.sizes("8-10,12, 14") == (8, 9, 10, 12, 14)


def test_help_names_every_option_and_runs_as_documented():
    result = subprocess.run(
        [sys.executable, "-m", "recipe.cello1", "prepare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for action in options.make_parser("")._actions:
        assert action.help
        for option in action.option_strings:
            assert option in result.stdout
    assert "audit TRAIN TEST" in result.stdout


def test_every_option_is_used_in_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    for parser in (options.make_parser(""), leaks.build_parser()):
        for action in parser._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f'"{option}"' in text, option


# --------------------------------------------------------------------------------------------------- published puzzles


def test_given_splits_of_local_files(made, tmp_path):
    files = [made / "train" / "train_data.json", made / "test" / "test_data.json"]
    assert run(*files, "--out", tmp_path) == 0
    assert (tmp_path / "train" / "train_data.json").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "test" / "test_data.json").read_bytes() == files[1].read_bytes()
    assert (tmp_path / "rl" / "train.parquet").read_bytes() == (made / "rl" / "train.parquet").read_bytes()
    assert manifest(tmp_path)["plan"]["split"] == "given"


def test_one_file_is_split_anew_by_context_where_no_donor_is_named(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    plain = [{key: item[key] for key in ("system_msg", "user_msg", "assistant_msg")} for item in items]
    path = tmp_path / "puzzles.json"
    path.write_text(json.dumps(plain))
    assert run(path, "--out", tmp_path / "out") == 0
    leaks = manifest(tmp_path / "out")["leaks"]["train/test"]
    assert leaks["leaks"] is False
    assert leaks["donors_from_context"] > 0
    assert run(path, "--out", tmp_path / "out", "--split", "tissue") == 1
    assert run(path, "--out", tmp_path / "out", "--split", "given") == 1


def test_a_folder_of_puzzle_files_with_reasoning(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for name in ("train", "test", "reasoning"):
        answers = {"reasoning": lambda text: f"<think>because</think>\n<answer>{text}</answer>"}
        change = answers.get(name, lambda text: text)
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({**item, "assistant_msg": change(item["assistant_msg"])}) + "\n" for item in items[:9])
        )
    assert run(tmp_path, "--out", tmp_path / "out") == 0
    traces = load_puzzles(tmp_path / "out" / "reasoning" / "reasoning_data.json").puzzles
    assert traces[0].meta["reasoning"] == "because"
    assert set(manifest(tmp_path / "out")["leaks"]) == {"train/test", "reasoning/test"}
    assert sorted(path.name for path in (tmp_path / "out" / "rl").iterdir()) == ["test.parquet", "train.parquet"]


def test_items_that_cannot_be_read(made, tmp_path, capsys):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    (tmp_path / "train.json").write_text(json.dumps([*items[:5], {"user_msg": "x"}]))
    (tmp_path / "test.json").write_text(json.dumps(items[5:8]))
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    assert "bad   train.json: item 5" in capsys.readouterr().out
    assert run(tmp_path, "--out", tmp_path / "out", "--skip-bad") == 0
    assert manifest(tmp_path / "out")["failures"][0].startswith("train.json: item 5")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("b.json", "[", "not valid JSON"), ("b.json", "[]", "no items"), ("b.parquet", "x", "not a readable parquet")],
)
def test_a_puzzle_file_that_cannot_be_read_does_not_stop_the_others(made, tmp_path, capsys, name, content, said):
    (tmp_path / "a.json").write_bytes((made / "train" / "train_data.json").read_bytes())
    (tmp_path / name).write_text(content)
    files = [tmp_path / "a.json", tmp_path / name, "--out", tmp_path / "out"]
    assert run(*files) == 1
    captured = capsys.readouterr()
    assert f"bad   {name}: " in captured.out and said in captured.out
    assert "--skip-bad accepts that" in captured.err
    assert run(*files, "--skip-bad") == 0
    found = manifest(tmp_path / "out")
    assert said in found["failures"][0] and "write it anew" in found["failures"][0]
    assert {part["name"]: part["puzzles"] for part in found["sources"]} == {"a.json": 52, name: 0}
    (tmp_path / "a.json").unlink()
    assert run(tmp_path / name, "--out", tmp_path / "out", "--skip-bad") == 1
    assert "there are no puzzles" in capsys.readouterr().err


def test_a_test_side_that_cannot_be_read_does_not_make_another(made, tmp_path):
    (tmp_path / "train.json").write_bytes((made / "train" / "train_data.json").read_bytes())
    (tmp_path / "test.json").write_text("[")
    assert run(tmp_path, "--out", tmp_path / "out", "--skip-bad") == 0
    assert manifest(tmp_path / "out")["plan"]["split"] == "given"
    assert set(manifest(tmp_path / "out")["splits"]) == {"train"}


def test_when_no_item_can_be_read_the_reasons_are_shown(made, tmp_path, capsys):
    items = [{"user_msg": f"x{number}", "assistant_msg": "a"} for number in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(items))
    assert run(tmp_path, "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out.count("bad   train.json: item") == 20
    assert "and 10 more" in captured.out
    assert "there are no puzzles" in captured.err


def test_from_hub(made, tmp_path, monkeypatch):
    import datasets

    rows = {side: json.loads((made / side / f"{side}_data.json").read_bytes()) for side in ("train", "test")}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or rows)
    assert run("--from-hub", "ncbi/CellPuzzles", "--out", tmp_path) == 0
    assert asked == ["ncbi/CellPuzzles"]
    assert (tmp_path / "train" / "train_data.json").read_bytes() == (made / "train" / "train_data.json").read_bytes()
    assert manifest(tmp_path)["from_hub"] == "ncbi/CellPuzzles"


def test_from_hub_offline(tmp_path, capsys):
    assert run("--from-hub", "ncbi/CellPuzzles", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("cello1 prepare: error: --from-hub ncbi/CellPuzzles: the data set cannot be loaded")
    assert "give their folder instead" in error
    assert len(error.splitlines()) == 1


def test_without_the_package_for_the_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("--from-hub", "ncbi/CellPuzzles", "--out", tmp_path / "out") == 1
    assert "the package datasets is not installed" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- audit


def test_audit_of_two_files(folder, tmp_path, capsys):
    build(folder, tmp_path, "--split", "puzzle")
    files = [tmp_path / "train" / "train_data.json", tmp_path / "rl" / "test.parquet"]
    capsys.readouterr()
    assert run("audit", *files, "--out", tmp_path / "audit.json") == 0
    assert "cells" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_bytes())["cells"]["shared"] > 0
    assert run("audit", *files, "--fail-on-leak") == 1


def test_audit_finds_the_same_cells_in_another_order(made, tmp_path, capsys):
    puzzle = load_puzzles(made / "train" / "train_data.json").puzzles[0]
    order = [1, 0, *range(2, puzzle.n_cells)]
    turned = type(puzzle)(
        tuple(puzzle.cells[i] for i in order), puzzle.candidates, tuple(puzzle.answer[i] for i in order), puzzle.context
    )
    write_puzzles(tmp_path / "test.json", [turned])
    assert run("audit", made / "train" / "train_data.json", tmp_path / "test.json", "--out", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_bytes())
    assert (found["puzzles"]["shared"], found["reordered"]["shared"]) == (0, 1)


def test_audit_needs_every_puzzle(made, tmp_path, capsys):
    (tmp_path / "test.json").write_text('[{"a": 1}, {"b": 2}]')
    assert run("audit", made / "train" / "train_data.json", tmp_path / "test.json") == 1
    assert "(and 1 more); an audit needs every puzzle" in capsys.readouterr().err
    assert run("audit", tmp_path / "gone.json", tmp_path / "test.json") == 1


# -------------------------------------------------------------------------------------------------------- real puzzles


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not here; set CELLO1_SHARED_DATA to its folder")
def test_real_puzzles_come_out_byte_identical_when_their_cells_and_metadata_go_in(tmp_path):
    for number, item in enumerate(json.loads(REAL.read_bytes())):
        real = item_to_puzzle(item)
        genes = sorted({gene for cell in real.cells for gene in cell})
        matrix = np.zeros((real.n_cells, len(genes)), dtype="float32")
        for row, cell in enumerate(real.cells):
            for rank, gene in enumerate(cell):
                matrix[row, genes.index(gene)] = 100 - rank
        import anndata as ad

        sex, stage, tissue, disease = read_sentences(real.context)
        obs = pd.DataFrame(
            {
                "cell_type": real.answer,
                "donor_id": "donor",
                "suspension_type": "cell",
                "sex": sex,
                "development_stage": stage,
                "tissue": tissue,
                "disease": disease,
            },
            index=[f"cell{i}" for i in range(real.n_cells)],
        )
        adata = ad.AnnData(
            sp.csr_matrix(matrix),
            obs=obs,
            var=pd.DataFrame({"feature_name": genes}, index=[f"g{i}" for i in range(len(genes))]),
        )
        path = write(adata, tmp_path / f"{number}.h5ad")
        result: FileResult = process_file(Job(str(path), "real", "", Settings(sizes=(real.n_cells,), per_size=1)))
        (made,) = result.puzzles
        order = [int(name.removeprefix("cell")) for name in made.meta["cell_ids"]]
        back = np.argsort(order).tolist()
        again = type(made)(
            tuple(made.cells[i] for i in back), made.candidates, tuple(made.answer[i] for i in back), made.context
        )
        assert render_user(again) == item["user_msg"]
        assert " | ".join(again.answer) == item["answer"]


def read_sentences(context: str) -> tuple[str, str, str, str]:
    import re

    found = re.fullmatch(
        r"The cell is from a (\w+) at the (.+), originating from the (.+)\. The patient has been diagnosed with (.+)\.",
        context,
    )
    return found.groups()


def test_parquet_columns(made):
    schema = pq.read_schema(made / "rl" / "test.parquet")
    assert schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
