"""The whole command: which files are found, and what becomes of each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from recipe.cello1.data.prepare import build_parser
from recipe.cello1.formats.atomic import held
from recipe.cello1.task.text import in_options
from tests.helpers.prepare_runs import FEW, NAMES, ROOT, build, content, manifest, run
from tests.helpers.toy_h5ad import toy_adata, write


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
    add("empty", "note: express fewer than min_genes=1", x(slice(0, 60), 0))
    add("twice", "note: 1 gene names stand for several columns", twice)
    add("donornan", "note: 50 of 200 cells left out: donor_id names no donor", donor_nan)
    add("pipe", "bad: 'T|B' contains '|'", pipe)
    add("truncated", "bad: HDF5 file cannot be read", lambda adata: None)
    path = root / "truncated.h5ad"
    path.write_bytes(path.read_bytes()[:5000])
    return expected


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.slow
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
            assert in_options(f"bad   {name}: {entry['reason']}; {entry['remedy']}", build_parser()) in captured.out
            assert not list(out.rglob(f"{name}*"))
        else:
            assert len(read_puzzles_of(out, name)) == 20
        if kind == "note":
            assert any(text in note for note in entry["notes"])
            assert in_options(f"note  {text}", build_parser()).removeprefix("note  ") in captured.out
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
    assert used == ["a", "b", *sorted(NAMES)]
    copies = {name: entry["copy_of"] for name, entry in entries.items() if entry["status"] == "copy"}
    assert copies == {"file0": "lung/file0", "file1": "lung/file1", "b.h5ad": "b"}  # the last is given twice
    bad = [name for name, entry in entries.items() if entry["status"] == "bad"]
    assert bad == ["a.zarr"]
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


@pytest.mark.filterwarnings("ignore:Writing zarr")
def test_zarr_and_several_inputs(folder, tmp_path):
    write(toy_adata(9, n_cells=200, donor_prefix="z"), tmp_path / "in" / "z.zarr")
    assert run(tmp_path / "in", folder / "lung" / "file0.h5ad", "--out", tmp_path / "out", *FEW) == 0
    assert [entry["name"] for entry in manifest(tmp_path / "out")["inputs"]] == ["z", "file0"]


# --------------------------------------------------------------------------------------- copies, other kinds, two runs


def test_copies_and_hard_links_do_not_multiply_cells(tmp_path, capsys):
    place = tmp_path / "in"
    first = write(toy_adata(n_cells=200), place / "b.h5ad")
    (place / "sub").mkdir()
    shutil.copy(first, place / "sub" / "copy.h5ad")
    os.link(first, place / "c.h5ad")
    write(toy_adata(n_cells=200, donor_prefix="Donor"), place / "z.h5ad")  # of the same size
    build(place, tmp_path / "out")
    entries = manifest(tmp_path / "out")["inputs"]
    assert [(entry["name"], entry["status"]) for entry in entries] == [
        ("b", "used"),
        ("z", "used"),
        ("c", "copy"),
        ("sub/copy", "copy"),
    ]
    assert {entry.get("copy_of") for entry in entries[2:]} == {"b"}
    said = capsys.readouterr().out
    assert "note  c: same content as b, so it is used once" in said
    assert "4 files: 2 used, 0 bad, 2 copies" in said
    assert (place / "z.h5ad").stat().st_size == first.stat().st_size


@pytest.mark.filterwarnings("ignore")
def test_copies_of_zarr_stores(tmp_path):
    place = tmp_path / "in"
    first = write(toy_adata(n_cells=200), place / "a.zarr")
    shutil.copytree(first, place / "b.zarr")
    shutil.copytree(first, place / "c.zarr")
    part = next(path for path in sorted((place / "c.zarr" / "X").rglob("*")) if path.is_file())
    part.write_bytes(part.read_bytes()[:-1] + b" ")
    assert run(place, "--out", tmp_path / "out", *FEW) == 1
    statuses = {entry["name"]: entry["status"] for entry in manifest(tmp_path / "out")["inputs"]}
    assert statuses.pop("c") != "copy"
    assert statuses == {"a": "used", "b": "copy"}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("b.h5ad.gz", "unpack it"),
        ("b.H5AD.zst", "unpack it"),
        ("deep/b.zarr.zip", "unpack it"),
        ("b.h5mu", "mudata['NAME']"),
        ("b.loom", "convert it to h5ad"),
        ("b.h5", "convert it to h5ad"),
    ],
)
def test_files_of_other_kinds_are_named(folder, tmp_path, capsys, name, remedy):
    place = tmp_path / "in"
    (place / name).parent.mkdir(parents=True)
    (place / name).write_bytes(b"x")
    (place / "README.md").write_text("x")
    shutil.copy(folder / "lung" / "file0.h5ad", place / "a.h5ad")
    assert run(place, "--out", tmp_path / "out", *FEW) == 1
    said = capsys.readouterr()
    assert f"bad   {name}: " in said.out and remedy in said.out
    assert run(place, "--out", tmp_path / "out", *FEW, "--skip-bad") == 0
    assert [entry["status"] for entry in manifest(tmp_path / "out")["inputs"]] == ["used", "bad"]
    assert run(place / name, "--out", tmp_path / "out", *FEW) == 1
    assert remedy in capsys.readouterr().err
    (place / "a.h5ad").unlink()
    assert run(place, "--out", tmp_path / "out", *FEW) == 1
    assert remedy in capsys.readouterr().err


def test_a_name_that_is_too_long_and_a_folder_that_cannot_be_read(folder, tmp_path, capsys, monkeypatch):
    place, name = tmp_path / "in", "é" * 105
    (place / "private").mkdir(parents=True)
    for target in ("a", name):
        (place / f"{target}.h5ad").write_bytes((folder / "lung" / "file0.h5ad").read_bytes())
    listed = Path.iterdir

    def refuse(path):
        if path.name == "private":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert run(place, "--out", tmp_path / "out", *FEW, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert f"bad   {name}: its name has more than 200 bytes" in said
    assert "bad   private: the folder cannot be read" in said
    assert [entry["status"] for entry in manifest(tmp_path / "out")["inputs"]] == ["used", "bad", "bad"]


def test_the_longest_name_can_be_written(folder, tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    shutil.copy(folder / "lung" / "file0.h5ad", place / f"{'x' * 200}.h5ad")
    assert run(place, "--out", tmp_path / "out", "--raw", *FEW) == 0


def test_of_two_runs_in_one_folder_one_says_why_not(folder, tmp_path, capsys):
    with held(tmp_path / "out" / "manifest.json"):
        assert run(folder, "--out", tmp_path / "out", *FEW) == 1
    assert "another run is writing to" in capsys.readouterr().err
    assert content(tmp_path / "out") == {}
    build(folder, tmp_path / "out")
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "out" / ".manifest.json.lock").symlink_to(precious)
    assert run(folder, "--out", tmp_path / "out", *FEW) == 1
    assert precious.read_text() == "kept"


def test_what_is_assumed_of_the_values_is_said(folder, tmp_path, capsys):
    build(folder, tmp_path)
    assert "note  values are taken for expression (counts or log-normalised)" in capsys.readouterr().out
