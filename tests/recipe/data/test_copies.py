"""Cells and puzzles that several inputs have are used once."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from recipe.cello1.data import copies, workers
from recipe.cello1.data.extract import Job, process_file
from recipe.cello1.data.settings import PuzzleSettings
from tests.helpers.prepare_runs import FEW, build, content, manifest, run
from tests.helpers.toy_h5ad import toy_adata, write

pytestmark = pytest.mark.filterwarnings("ignore")


def small(seed=0, **options) -> ad.AnnData:
    return toy_adata(seed, n_cells=200, n_donors=3, **options)


def inputs(out) -> dict:
    return {entry["name"]: entry for entry in manifest(out)["inputs"]}


def normalised(adata):
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray() / adata.X.sum(axis=1) * 1e4))


def ids_as_numbers(adata):
    adata.obs["donor_id"] = adata.obs["donor_id"].astype(str).str[-1].astype(float)


REWRITTEN = {
    "compressed": ("b.h5ad", lambda adata: None, {"compression": "gzip"}),
    "zarr": ("b.zarr", lambda adata: None, {}),
    "dense": ("b.h5ad", lambda adata: setattr(adata, "X", adata.X.toarray()), {}),
    "columns": ("b.h5ad", lambda adata: setattr(adata, "X", sp.csc_matrix(adata.X)), {}),
    "float64": ("b.h5ad", lambda adata: setattr(adata, "X", adata.X.astype(np.float64)), {}),
    "normalised": ("b.h5ad", normalised, {}),
    "donors as numbers": ("b.h5ad", ids_as_numbers, {}),
    "other types": ("b.h5ad", lambda adata: adata.obs.__setitem__("cell_type", adata.obs["sex"]), {}),
    "order of cells": ("b.h5ad", lambda adata: adata[::-1].copy(), {}),
    "order of genes": ("b.h5ad", lambda adata: adata[:, ::-1].copy(), {}),
    "some cells": ("b.h5ad", lambda adata: adata[20:90].copy(), {}),
    "some genes": ("b.h5ad", lambda adata: adata[:, 5:].copy(), {}),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_a_rewritten_copy_is_used_once(tmp_path, capsys, how):
    name, change, options = REWRITTEN[how]
    first, other = small(integer=True), small(integer=True)
    if how == "donors as numbers":
        first.obs["donor_id"] = first.obs["donor_id"].astype(str).str[-1].astype(int)
    write(first, tmp_path / "in" / "a.h5ad")
    other = other if (changed := change(other)) is None else changed
    write(other, tmp_path / "in" / name, **options)
    build(tmp_path / "in", tmp_path / "out", "--raw")
    entries = inputs(tmp_path / "out").values()
    assert [(entry["status"], entry.get("copy_of")) for entry in entries] == [("used", None), ("copy", "a")]
    said = capsys.readouterr().out
    assert "note  b: it has the cells of a and no others, so they are used once (keep them with --keep-dup" in said
    assert "2 files: 1 used, 0 bad, 1 copies" in said
    assert not (tmp_path / "out" / "cells" / "b.json").exists()
    build(tmp_path / "in", tmp_path / "kept", "--keep-duplicates")
    assert [entry["status"] for entry in inputs(tmp_path / "kept").values()] == ["used", "used"]


def test_of_a_file_with_more_cells_the_others_are_used(tmp_path, capsys):
    part = small(1)
    write(part, tmp_path / "in" / "a.h5ad")
    write(ad.concat([part, small(2, donor_prefix="x")], merge="same"), tmp_path / "in" / "b.h5ad")
    write(ad.concat([small(3, donor_prefix="y")] * 2, merge="same"), tmp_path / "in" / "c.h5ad")
    made = build(tmp_path / "in", tmp_path / "out", "--raw", "--per-size", "40")
    assert {puzzle.meta["donor_id"][0] for puzzle in made if puzzle.meta["dataset"] == "b"} == {"x"}
    said = capsys.readouterr().out
    assert "note  b: 200 of 400 cells left out: a has them, too (keep them with --keep-duplicates)" in said
    assert "note  c: 200 of 400 cells left out: the file has them twice (keep them with --keep-duplicates)" in said
    assert [entry["cells_drawn_from"] for entry in inputs(tmp_path / "out").values()] == [200, 200, 200]
    for name in "abc":
        assert len(json.loads((tmp_path / "out" / "cells" / f"{name}.json").read_bytes())) == 200
    # As if the first file had never been there, and back again.
    (tmp_path / "in" / "a.h5ad").rename(tmp_path / "a.h5ad")
    build(tmp_path / "in", tmp_path / "out", "--raw", "--per-size", "40")
    assert len(json.loads((tmp_path / "out" / "cells" / "b.json").read_bytes())) == 400
    (tmp_path / "a.h5ad").rename(tmp_path / "in" / "a.h5ad")
    build(tmp_path / "in", tmp_path / "out", "--raw", "--per-size", "40")
    build(tmp_path / "in", tmp_path / "fresh", "--raw", "--per-size", "40", "--workers", "2")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["puzzles", "records"])
def test_a_resumed_run_reads_no_file_with_repeats_again(tmp_path, monkeypatch, raw):
    part, seen = small(1), []
    write(part, tmp_path / "in" / "a.h5ad")
    write(ad.concat([part, small(2, donor_prefix="x")], merge="same"), tmp_path / "in" / "b.h5ad")
    write(part, tmp_path / "in" / "c.h5ad", compression="gzip")
    monkeypatch.setattr(workers, "process_file", lambda job, done: (seen.append(job.name), process_file(job, done))[1])
    build(tmp_path / "in", tmp_path / "out", *raw)
    first = content(tmp_path / "out")
    assert seen == ["a", "b", "c", "b"]
    for _ in range(2):
        build(tmp_path / "in", tmp_path / "out", *raw)
        assert len(seen) == 4 and content(tmp_path / "out") == first


@pytest.mark.parametrize("n_rows", [200, 90])
def test_cells_that_a_file_no_longer_has_are_used_from_the_next(tmp_path, n_rows):
    part = small(1)
    write(part, tmp_path / "in" / "a.h5ad")
    write(part, tmp_path / "in" / "b.h5ad", compression="gzip")
    build(tmp_path / "in", tmp_path / "out", "--raw")
    part = part[:n_rows].copy()
    part.obs["is_primary_data"] = False
    write(part, tmp_path / "in" / "a.h5ad")
    made = build(tmp_path / "in", tmp_path / "out", "--raw")
    assert {puzzle.meta["dataset"] for puzzle in made} == {"b"}
    assert [entry["status"] for entry in inputs(tmp_path / "out").values()] == ["used", "used"]
    build(tmp_path / "in", tmp_path / "fresh", "--raw")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("damage", [b"", b"no array", None])
def test_a_file_whose_kept_cells_are_damaged_is_read_again(tmp_path, monkeypatch, damage):
    seen = []
    write(small(1), tmp_path / "in" / "a.h5ad")
    write(small(1), tmp_path / "in" / "b.h5ad", compression="gzip")
    monkeypatch.setattr(workers, "process_file", lambda job, done: (seen.append(job.name), process_file(job, done))[1])
    build(tmp_path / "in", tmp_path / "out")
    first, kept = content(tmp_path / "out"), tmp_path / "out" / ".parts" / "a.npy"
    kept.unlink() if damage is None else kept.write_bytes(damage)
    build(tmp_path / "in", tmp_path / "out")
    assert seen == ["a", "b", "a"] and content(tmp_path / "out") == first


def test_a_file_that_cannot_be_compared_is_used_and_that_is_said(tmp_path, monkeypatch, capsys):
    write(small(1), tmp_path / "in" / "a.h5ad")
    write(small(1), tmp_path / "in" / "b.h5ad", compression="gzip")

    def odd(*arguments):
        raise KeyError("odd")

    monkeypatch.setattr(copies, "CellReader", odd)  # the files are read with that of another module
    build(tmp_path / "in", tmp_path / "out")
    assert "note  b: cells that it may share with a are kept: KeyError in test_copies.py" in capsys.readouterr().out
    found = inputs(tmp_path / "out")
    assert [entry["status"] for entry in found.values()] == ["used", "used"]
    assert "KeyError" in found["b"]["notes"][-1]


@pytest.mark.parametrize("n_names", [0, 3])
def test_no_file_is_opened_for_a_few_names_in_common(tmp_path, monkeypatch, n_names):
    for i in range(3):
        adata = small(i)
        adata.obs_names = [f"cell {row if row < n_names else row + 1000 * i}" for row in range(adata.n_obs)]
        write(adata, tmp_path / "in" / f"{i}.h5ad")
    monkeypatch.setattr(copies, "Store", None)  # opening one would be said in a note
    build(tmp_path / "in", tmp_path / "out")
    assert [entry["cells_drawn_from"] for entry in inputs(tmp_path / "out").values()] == [200] * 3
    assert not any("are kept" in note for entry in inputs(tmp_path / "out").values() for note in entry["notes"])


@pytest.mark.parametrize("n_same", [10, 120, 180, 199])
def test_of_row_numbers_only_the_same_cells_are_left_out(tmp_path, n_same):
    """However few cells are others: none of them is left out."""
    mixed = ad.concat([small(1)[:n_same], small(2)[n_same:]], merge="same")
    for name, adata in {"a": small(1), "b": mixed}.items():
        adata.obs["donor_id"] = "one donor"
        adata.obs_names = [str(row) for row in range(adata.n_obs)]
        write(adata, tmp_path / "in" / f"{name}.h5ad")
    build(tmp_path / "in", tmp_path / "out", "--raw", "--split", "none")
    records = json.loads((tmp_path / "out" / "cells" / "b.json").read_bytes())
    left = {record["cell_index"] for record in records}
    assert left == {str(row) for row in range(n_same, 200)}


def test_a_copy_of_a_file_that_cannot_be_used_is_used(tmp_path):
    bad = small()
    bad.var["feature_name"] = [str(row) for row in range(bad.n_vars)]
    write(bad, tmp_path / "in" / "a.h5ad")
    write(small(), tmp_path / "in" / "b.h5ad")
    assert run(tmp_path / "in", "--out", tmp_path / "out", *FEW) == 1
    assert {name: entry["status"] for name, entry in inputs(tmp_path / "out").items()} == {"a": "bad", "b": "used"}


@pytest.mark.parametrize("names", ["row numbers", "barcodes", "few genes"])
def test_cells_that_only_share_a_name_are_different_cells(tmp_path, names):
    """Donor and name are the same in all files; in the last case a list has all genes that there are."""
    for i in range(3):
        adata = small(i)
        if names == "row numbers":
            adata.obs_names = [str(row) for row in range(adata.n_obs)]
        if names == "barcodes":  # some of them are in each library
            adata.obs_names = [f"ACGT{row if row < 20 else row + 1000 * i:08d}-1" for row in range(adata.n_obs)]
        if names == "few genes":
            adata = adata[:, 60:75].copy()
        write(adata, tmp_path / "in" / f"{i}.h5ad")
    build(tmp_path / "in", tmp_path / "out")
    assert [entry["cells_drawn_from"] for entry in inputs(tmp_path / "out").values()] == [200] * 3


def test_copies_of_puzzle_files_are_used_once(made, tmp_path, capsys):
    place = tmp_path / "in"
    place.mkdir()
    shutil.copy(made / "train" / "train_data.json", place / "a.json")
    shutil.copy(made / "train" / "train_data.json", place / "a (1).json")
    items = json.loads((place / "a.json").read_bytes())
    (place / "b.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items[:5]))
    (place / "a_test.json").write_text(json.dumps(items[:3]))  # another side: the audit says what it shares
    assert run(place, "--out", tmp_path / "out", "--quiet", "--split", "none") == 0
    said = capsys.readouterr().out
    n_items = len(items)
    kept = "(keep them with --keep-duplicates)"
    assert f"note  a.json: {n_items} of {n_items} puzzles left out: a (1).json has them, too {kept}" in said
    assert f"note  b.jsonl: 5 of 5 puzzles left out: a (1).json has them, too {kept}" in said
    assert manifest(tmp_path / "out")["splits"]["train"]["puzzles"] == n_items + 3
    assert run(place, "--out", tmp_path / "out", "--quiet", "--split", "none", "--keep-duplicates") == 0
    assert "left out" not in capsys.readouterr().out
    assert manifest(tmp_path / "out")["splits"]["train"]["puzzles"] == 2 * n_items + 5 + 3


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_puzzles_are_used_once_in_whatever_order_their_files_come(made, tmp_path, capsys, order):
    items = json.loads((made / "train" / "train_data.json").read_bytes())[:12]
    parts = {"a": items[:4], "b": items[2:8] + items[7:8], "c": items}
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    files = [tmp_path / f"{name}.json" for name in order]
    assert run(*files, "--out", tmp_path / "out", "--quiet", "--split", "none") == 0
    assert manifest(tmp_path / "out")["splits"]["train"]["puzzles"] == len(items)
    said = capsys.readouterr().out
    assert "b.json: 1 of 7 puzzles left out: the file has them twice" in said or order[0] == "c"


def test_a_copy_that_is_damaged_besides_is_listed_as_bad(made, tmp_path, capsys):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps(items))
    (tmp_path / "in" / "b.jsonl").write_text(f"{json.dumps(items[0])}\n{{bad\n")
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--quiet", "--split", "none") == 1
    said = capsys.readouterr().out
    assert "note  b.jsonl: 1 of 1 puzzles left out: a.json has them, too" in said
    assert "bad   b.jsonl: line 2" in said


def test_a_file_that_is_given_twice_is_used_once(tmp_path):
    path = write(small(), tmp_path / "in" / "a.h5ad")
    shutil.copy(path, tmp_path / "a.h5ad")
    assert run(path, path.parent, tmp_path / "a.h5ad", "--out", tmp_path / "out", *FEW) == 0
    assert [entry["status"] for entry in manifest(tmp_path / "out")["inputs"]] == ["used", "copy", "copy"]


def test_files_whose_cells_all_have_one_name_take_no_time(tmp_path):
    n = 200_000  # compared each with each, they would take minutes
    jobs = [Job(str(tmp_path / f"{name}.h5ad"), name, "", PuzzleSettings()) for name in "ab"]
    (tmp_path / ".parts").mkdir()
    for job in jobs:
        np.save(
            tmp_path / ".parts" / f"{job.name}.npy", np.stack([np.full(n, 7, np.uint64), np.arange(n, dtype=np.uint64)])
        )
    again, copied, notes = copies.repeated_cells(tmp_path, jobs)
    assert (again, copied, list(notes)) == ([], [], ["a", "b"])  # there are no such files to compare
