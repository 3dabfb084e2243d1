"""One file to puzzles."""

import json
import re
import shutil
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from recipe.cello1.data import extract
from recipe.cello1.data.context_table import load_context_table
from recipe.cello1.data.expression.reader import CellReader
from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.extract import Job, file_fingerprint, process_file
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.task.genes import top_genes
from tests.helpers.toy_h5ad import N_GENES, toy_adata, write

SMALL = {"sizes": (3, 4), "per_size": 6}


def run(tmp_path, adata, folder="folder", name="toy", suffix=".h5ad", **settings):
    path = write(adata, tmp_path / folder / f"{name}{suffix}")
    return process_file(Job(str(path), name, folder, PuzzleSettings(**{**SMALL, **settings})))


def notes_of(result) -> str:
    return "\n".join(result.notes)


@pytest.fixture
def adata():
    return toy_adata()


# -------------------------------------------------------------------------------------------- what a puzzle is made of


def test_puzzles_are_of_one_donor_with_true_genes_types_and_context(tmp_path, adata):
    result = run(tmp_path, adata)
    assert not result.reason
    assert [puzzle.n_cells for puzzle in result.puzzles] == [3] * 6 + [4] * 6
    genes = dict(zip(adata.obs_names, top_genes(adata.X, adata.var["feature_name"], 50), strict=True))
    for puzzle in result.puzzles:
        cells = adata.obs.loc[puzzle.meta["cell_ids"]]
        assert set(cells["donor_id"]) == {puzzle.meta["donor_id"]}
        assert tuple(cells["cell_type"]) == puzzle.answer
        assert puzzle.candidates == tuple(sorted(puzzle.answer))
        assert puzzle.cells == tuple(genes[name] for name in cells.index)
        assert all(len(cell) == 50 for cell in puzzle.cells)
        number = int(puzzle.meta["donor_id"][-1])
        assert puzzle.context == (
            f"The cell is from a {('male', 'female')[number % 2]} at the {40 + number}-year-old stage, originating "
            "from the skin epidermis. The patient has been diagnosed with melanoma."
        )
        assert (puzzle.meta["dataset"], puzzle.meta["tissue"], puzzle.meta["disease"]) == (
            "toy",
            "skin epidermis",
            "melanoma",
        )
    assert (result.n_cells, result.n_pool) == (600, 600)


@pytest.mark.filterwarnings("ignore:Writing zarr")
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "zarr", "lzf", "layer", "raw"])
def test_however_the_file_is_stored_the_puzzles_are_the_same(tmp_path, adata, form):
    expected = run(tmp_path, adata, "plain").puzzles
    settings, suffix = {}, ".h5ad"
    if form == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif form == "dense":
        adata.X = adata.X.toarray()
    elif form == "zarr":
        suffix = ".zarr"
    elif form == "layer":
        adata.layers["other"], adata.X = adata.X, sp.csr_matrix(adata.shape, dtype="float32")
        settings = {"layer": "other"}
    elif form == "raw":
        adata.raw = adata
        adata = adata[:, :60].copy()
        settings = {"use_raw": True}
    path = tmp_path / "other" / f"toy{suffix}"
    write(adata, path, **({"compression": form} if form == "lzf" else {}))
    found = process_file(Job(str(path), "toy", "other", PuzzleSettings(**SMALL, **settings))).puzzles
    assert list(found) == list(expected)


def test_counts_and_their_logarithm_give_the_same(tmp_path):
    assert run(tmp_path, toy_adata(integer=True), "a").puzzles == run(tmp_path, toy_adata(), "b").puzzles


def test_batches_are_kept_apart_where_there_are_any(tmp_path):
    adata = toy_adata(batches=2)
    result = run(tmp_path, adata)
    for puzzle in result.puzzles:
        assert set(adata.obs.loc[puzzle.meta["cell_ids"], "batch"]) == {puzzle.meta["batch"]}
    assert all("batch" not in p.meta for p in run(tmp_path, adata, batch_column="none").puzzles)


def test_a_puzzle_of_two_tissues_names_both_and_speaks_of_its_first_cell(tmp_path, adata):
    adata.obs["tissue"] = pd.Categorical(["lung", "skin"] * 300)
    mixed = [p for p in run(tmp_path, adata).puzzles if p.meta["tissue"] == "lung | skin"]
    assert mixed
    for puzzle in mixed:
        assert f"from the {adata.obs.loc[puzzle.meta['cell_ids'][0], 'tissue']}." in puzzle.context


def test_extra_fields_of_the_folder(tmp_path, adata):
    adata.obs["ever_smoker"] = "yes"
    adata.obs["tumor_stage"] = "unknown"
    adata.obs["BMI"] = 24.5
    assert run(tmp_path, adata, "copd").puzzles[0].context.endswith("melanoma. The patient is a smoker.")
    assert run(tmp_path, adata, "kidney").puzzles[0].context.endswith("The patient's BMI is 24.5.")
    assert "smoker" not in run(tmp_path, adata, "elsewhere").puzzles[0].context


def test_a_users_fields(tmp_path, adata):
    table = tmp_path / "table.yaml"
    table.write_text("fields: {dose: 'The dose was {value}.'}\ndatasets: {'*': [dose]}\n")
    adata.obs["dose"] = "10 mg"
    found = run(tmp_path, adata, context=load_context_table(table))
    assert found.puzzles[0].context.endswith("The dose was 10 mg.")


# ------------------------------------------------------------------------------------------------------------ variants


def test_single_cells_with_candidates_of_their_donor(tmp_path, adata):
    result = run(tmp_path, adata, variant="single", sizes=(1,), per_size=0)
    assert len(result.puzzles) == 600
    for puzzle in result.puzzles:
        of_donor = adata.obs.loc[adata.obs["donor_id"] == puzzle.meta["donor_id"], "cell_type"]
        assert puzzle.candidates == tuple(sorted(set(of_donor)))
        assert puzzle.answer[0] in puzzle.candidates


def test_single_cells_whose_donor_has_one_type_are_no_question(tmp_path, adata):
    adata.obs["cell_type"] = pd.Categorical(
        np.where(adata.obs["donor_id"] == "donor1", "type 1", adata.obs["cell_type"].astype(str))
    )
    found = run(tmp_path, adata, variant="single", sizes=(1,), per_size=0).puzzles
    assert {p.meta["donor_id"] for p in found} == {f"donor{i}" for i in (0, 2, 3, 4)}
    found = run(tmp_path, adata, variant="single_open", sizes=(1,), per_size=0).puzzles
    assert len(found) == 600


def test_open_ended_puzzles_have_no_candidates(tmp_path, adata):
    assert {p.candidates for p in run(tmp_path, adata, variant="batch_open").puzzles} == {()}


def test_single_cells_of_a_batch_have_the_candidates_of_the_batch(tmp_path):
    adata = toy_adata(batches=40, n_cells=400)
    for puzzle in run(tmp_path, adata, variant="single", sizes=(1,), per_size=50).puzzles:
        same = (adata.obs["donor_id"] == puzzle.meta["donor_id"]) & (adata.obs["batch"] == puzzle.meta["batch"])
        assert puzzle.candidates == tuple(sorted(set(adata.obs.loc[same, "cell_type"])))


# ---------------------------------------------------------------------------------------------------- what is left out


def test_only_cells_in_suspension(tmp_path, adata):
    adata.obs["suspension_type"] = pd.Categorical(["cell", "nucleus"] * 300)
    result = run(tmp_path, adata)
    used = {name for puzzle in result.puzzles for name in puzzle.meta["cell_ids"]}
    assert set(adata.obs.loc[sorted(used), "suspension_type"]) == {"cell"}
    assert "300 of 600 cells left out: their suspension_type is not 'cell'" in notes_of(result)
    assert run(tmp_path, adata, suspension="any").n_pool == 600
    assert run(tmp_path, adata, suspension="nucleus").n_pool == 300


def test_cells_of_other_data_sets_are_left_out(tmp_path, adata):
    for flags in (np.arange(600) >= 100, pd.Categorical(np.where(np.arange(600) >= 100, "True", "False"))):
        adata.obs["is_primary_data"] = flags
        result = run(tmp_path, adata)
        assert "100 of 600 cells left out: is_primary_data is False" in notes_of(result)
        assert "keep_duplicates=True" in notes_of(result)
        assert result.n_pool == 500
        assert run(tmp_path, adata, keep_duplicates=True).n_pool == 600


@pytest.mark.parametrize("form", ["tissue_type", "suffix", "same"])
def test_the_tissue_of_a_cell_culture_gives_nothing_away(tmp_path, adata, form):
    types = adata.obs["cell_type"].astype(str)
    adata.obs["tissue"] = types.map({"suffix": "{} (cell culture)", "same": "{}"}.get(form, "culture of {}").format)
    if form == "tissue_type":
        adata.obs["tissue_type"] = "cell culture"
    for puzzle in run(tmp_path, adata).puzzles:
        assert "type" not in puzzle.context
        assert "originating" not in puzzle.context
        assert "type" in puzzle.meta["tissue"]
    adata.obs["tissue_type"], adata.obs["tissue"] = "tissue", "lung"
    assert all("originating from the lung" in puzzle.context for puzzle in run(tmp_path, adata).puzzles)


def test_lists_are_written_as_lists(tmp_path, adata):
    adata.obs["self_reported_ethnicity"] = "European || Hispanic or Latin American"
    adata.obs["disease"] = "diabetes || asthma || gout"
    for puzzle in run(tmp_path, adata).puzzles:
        assert "with European and Hispanic or Latin American background" in puzzle.context
        assert puzzle.context.endswith("The patient has been diagnosed with diabetes, asthma and gout.")


def test_a_file_of_nuclei_gives_no_puzzles_and_says_so(tmp_path, adata):
    adata.obs["suspension_type"] = "nucleus"
    result = run(tmp_path, adata)
    assert not result.reason
    assert not result.puzzles
    assert "no cells are left" in notes_of(result)


def test_cells_without_donor_or_type(tmp_path, adata):
    donors = adata.obs["donor_id"].astype(object)
    donors.iloc[:100] = np.nan
    donors.iloc[100:150] = "unknown"
    adata.obs["donor_id"] = pd.Categorical(donors)
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type 3": "unknown"})
    result = run(tmp_path, adata)
    assert "cells left out: donor_id names no donor" in notes_of(result)
    assert "cells left out: cell_type names no type" in notes_of(result)
    assert all("unknown" not in p.answer and p.meta["donor_id"] != "unknown" for p in result.puzzles)


def test_types_left_out_on_request(tmp_path, adata):
    result = run(tmp_path, adata, exclude_types=("TYPE [1-3]",))
    assert {name for p in result.puzzles for name in p.answer} <= {f"type {i}" for i in (0, 4, 5, 6, 7, 8, 9)}
    assert "exclude_types= fits 'type 1', 'type 2', 'type 3'" in notes_of(result)


def test_genes_left_out_on_request(tmp_path, adata):
    names = {gene for p in run(tmp_path, adata).puzzles for cell in p.cells for gene in cell}
    assert any(name.startswith("GENE1") for name in names)
    result = run(tmp_path, adata, exclude_genes=("^GENE1",))
    names = {gene for p in result.puzzles for cell in p.cells for gene in cell}
    assert not any(name.startswith("GENE1") for name in names)


def test_columns_of_other_names(tmp_path, adata):
    expected = run(tmp_path, adata).puzzles
    adata.obs = adata.obs.rename(columns={"cell_type": "label", "donor_id": "patient"})
    adata.var_names = adata.var.pop("feature_name").astype(str)
    found = run(tmp_path, adata, type_column="label", donor_column="patient", gene_column="index").puzzles
    assert [p.cells for p in found] == [p.cells for p in expected]


def test_at_most_max_cells_are_drawn_from(tmp_path, adata):
    result = run(tmp_path, adata, max_cells=80)
    assert result.n_pool == 80
    assert len({name for p in result.puzzles for name in p.meta["cell_ids"]}) <= 80
    assert run(tmp_path, adata, max_cells=0).n_pool == 600


def test_poor_cells(tmp_path, adata):
    matrix = adata.X.toarray()
    matrix[:200] = 0  # empty
    matrix[200:300, 10:] = 0  # ten genes at most
    for form, folder in ((sp.csr_matrix, "csr"), (sp.csc_matrix, "csc"), (np.asarray, "dense")):
        adata.X = form(matrix)
        result = run(tmp_path, adata, folder)
        assert len(result.puzzles) == 12
        assert all(cell for p in result.puzzles for cell in p.cells)
        assert "express fewer than min_genes=1" in notes_of(result)
        assert "express fewer than 50 genes: their lists are shorter" in notes_of(result)
        result = run(tmp_path, adata, folder, min_genes=50)
        assert {len(cell) for p in result.puzzles for cell in p.cells} == {50}
        assert len(result.puzzles) == 12


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("rank_by", ["expression", "specificity"])
def test_cells_with_nan_are_left_out(tmp_path, adata, form, rank_by):
    matrix = adata.X.toarray()
    matrix[:300, 5] = np.nan
    adata.X = form(matrix)
    result = run(tmp_path, adata, rank_by=rank_by)
    assert not result.reason
    assert len(result.puzzles) == 12
    assert "drawn cells left out: their values are NaN or infinite" in notes_of(result)
    used = {int(name.rpartition("cell")[2]) for puzzle in result.puzzles for name in puzzle.meta["cell_ids"]}
    assert min(used) >= 300


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_useless_cells_are_replaced_until_there_are_enough_puzzles(tmp_path, form):
    adata = toy_adata(n_cells=3000)
    matrix = adata.X.toarray()
    useless = np.random.default_rng(0).random(3000) < 0.7
    matrix[useless, 1:] = np.nan
    adata.X = form(matrix)
    path = write(adata, tmp_path / "a.h5ad")
    job = Job(str(path), "a", "", PuzzleSettings(sizes=(3, 10), per_size=20))
    result = process_file(job)
    assert [puzzle.n_cells for puzzle in result.puzzles] == [3] * 20 + [10] * 20
    assert "fewer than 20 puzzles" not in notes_of(result)
    assert len({frozenset(puzzle.meta["cell_ids"]) for puzzle in result.puzzles}) == 40
    for puzzle in result.puzzles:
        cells = adata.obs.loc[puzzle.meta["cell_ids"]]
        assert not useless[adata.obs_names.get_indexer(cells.index)].any()
        assert set(cells["donor_id"]) == {puzzle.meta["donor_id"]}
        assert tuple(cells["cell_type"]) == puzzle.answer
    assert process_file(replace(job, threads=3)) == result


def test_cells_with_nothing_left_after_excluding_genes_are_replaced(tmp_path):
    adata = toy_adata(n_cells=3000)
    matrix = adata.X.toarray()
    matrix[::2, 20:] = 0
    adata.X = sp.csr_matrix(matrix)
    result = run(tmp_path, adata, sizes=(9, 10), per_size=20, exclude_genes=("^GENE1?[0-9]$",))
    assert len(result.puzzles) == 40
    assert "drawn cells left out: they express fewer than min_genes=1" in notes_of(result)


def test_a_type_of_useless_cells_only_gives_way_to_others(tmp_path):
    adata = toy_adata(n_cells=3000)
    matrix = adata.X.toarray()
    matrix[(adata.obs["cell_type"] == "type 3").to_numpy()] = 0
    adata.X = matrix
    result = run(tmp_path, adata, sizes=(8, 9, 10), per_size=20)
    assert [puzzle.n_cells for puzzle in result.puzzles] == [8] * 20 + [9] * 20
    assert not any("type 3" in puzzle.answer for puzzle in result.puzzles)
    assert (
        "fewer than 20 puzzles (N=10: 0): no donor (and batch) has more sets of that many cells of different types "
        "among the cells that are left"
    ) in notes_of(result)


def test_every_set_of_useful_cells_is_found(tmp_path):
    adata = toy_adata(n_cells=60, n_donors=1, n_types=3)
    matrix = adata.X.toarray()
    types = adata.obs["cell_type"].astype(str)
    kept = [np.flatnonzero(types == f"type {kind}")[:2] for kind in range(3)]
    matrix[np.setdiff1d(np.arange(60), np.concatenate(kept))] = 0
    adata.X = matrix
    result = run(tmp_path, adata, sizes=(3,), per_size=20)
    assert len({frozenset(puzzle.meta["cell_ids"]) for puzzle in result.puzzles}) == len(result.puzzles) == 8
    assert "fewer than 20 puzzles (N=3: 8)" in notes_of(result)


def test_cells_with_stored_zeros_only(tmp_path, adata):
    adata.X.data[: adata.X.indptr[300]] = 0
    result = run(tmp_path, adata)
    assert len(result.puzzles) == 12
    assert "drawn cells left out: they express fewer than min_genes=1" in notes_of(result)


def test_a_file_of_empty_cells_only(tmp_path, adata):
    adata.X = sp.csr_matrix(adata.shape, dtype="float32")
    result = run(tmp_path, adata)
    assert not result.puzzles
    assert "600 cells left out: they express fewer" in notes_of(result)


def test_fewer_types_than_wanted_is_said(tmp_path, adata):
    result = run(tmp_path, adata, sizes=(4, 11))
    assert [p.n_cells for p in result.puzzles] == [4] * 6
    assert "fewer than 6 puzzles (N=11: 0)" in notes_of(result)


def test_duplicate_and_missing_gene_names_are_said(tmp_path, adata):
    names = adata.var["feature_name"].astype(object).tolist()
    names[5], names[7], names[9] = "GENE4", "GENE4_ENSG00000000999", ""
    adata.var["feature_name"] = names
    result = run(tmp_path, adata)
    assert "1 gene names stand for several columns" in notes_of(result)
    assert "1 genes without a name left out" in notes_of(result)
    assert all(len(set(cell)) == len(cell) == 50 for p in result.puzzles for cell in p.cells)


def test_ensembl_ids_are_refused(tmp_path, adata):
    result = run(tmp_path, adata, gene_column="index")
    assert "120 of 120 gene names are Ensembl ids" in result.reason
    assert result.remedy == "name the column of symbols: gene_column=feature_name"


# ----------------------------------------------------------------------------------------------------------- bad files


def nan_in_x(adata):
    adata.X.data[:] = np.nan


def negative(adata):
    adata.X.data[:] = -1


def pipe(adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type 3": "T | B"})


def case(adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type 3": "TYPE 4"})


def no_column(name):
    def change(adata):
        del adata.obs[name]

    return change


def no_donor(adata):
    adata.obs["donor_id"] = "unknown"


def no_symbols(adata):
    del adata.var["feature_name"]


def comma(adata):
    adata.var["feature_name"] = ["A, B", *adata.var["feature_name"][1:]]


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        (nan_in_x, "NaN or infinity", "layer="),
        (negative, "negative value", "use_raw=True"),
        (pipe, r"'T \| B' contains '\|'", "exclude_types="),
        (case, "'TYPE 4' and 'type 4' differ in case only", "rename"),
        (no_column("donor_id"), "no column 'donor_id'", "donor_column="),
        (no_column("cell_type"), "no column 'cell_type'", "type_column="),
        (no_column("suspension_type"), "no column 'suspension_type'", "suspension='any'"),
        (no_donor, "names no donor", "donor_column="),
        (no_symbols, "no column 'feature_name'", "gene_column="),
        (comma, "separates the genes", "column of symbols"),
    ],
)
def test_bad_files_are_results_with_reason_and_remedy(tmp_path, adata, change, reason, remedy):
    change(adata)
    result = run(tmp_path, adata)
    assert not result.puzzles
    assert re.search(reason, result.reason)
    assert remedy in result.remedy


def test_a_type_that_is_left_out_may_have_any_name(tmp_path, adata):
    pipe(adata)
    assert not run(tmp_path, adata, exclude_types=(r"T \| B",)).reason


def test_a_matrix_of_another_shape(tmp_path, adata):
    path = write(adata, tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = (600, 7)
    result = process_file(Job(str(path), "a", "", PuzzleSettings()))
    assert "its matrix is 600 x 7 for 600 cells and 120 genes" in result.reason


def test_a_file_that_is_gone(tmp_path):
    result = process_file(Job(str(tmp_path / "gone.h5ad"), "gone", "", PuzzleSettings()))
    assert "cannot be read" in result.reason
    assert result.remedy


def test_a_failure_that_nobody_foresaw_is_a_bad_file_too(tmp_path, adata, monkeypatch):
    def fail(*arguments):
        raise IndexError("17")

    monkeypatch.setattr(extract, "draw", fail)
    result = run(tmp_path, adata)
    assert re.fullmatch(r"IndexError in test_extract\.py, line \d+: 17", result.reason)
    assert "report the error" in result.remedy


# --------------------------------------------------------------------------------------------------------- specificity


def test_specificity_brings_markers_to_the_front(tmp_path):
    for puzzle in run(tmp_path, toy_adata(integer=True), rank_by="specificity").puzzles:
        for cell, name in zip(puzzle.cells, puzzle.answer, strict=True):
            assert f"GENE{N_GENES - 1 - int(name[-1])}" in cell[:3]


def test_specificity_is_the_value_against_mean_and_overall_mean(tmp_path, adata):
    path = write(adata, tmp_path / "a.h5ad")
    dense = adata.X.toarray().astype(float)
    mean = dense.mean(axis=0)
    expected = top_genes(dense / (mean + mean.mean()), adata.var["feature_name"], 10)
    with Store(path) as store:
        found = CellReader(store, PuzzleSettings(rank_by="specificity", n_top=10), threads=3)
        assert [genes for _, genes in found.read()] == expected


def test_specificity_of_an_empty_matrix(tmp_path, adata):
    adata.X = sp.csr_matrix(adata.shape, dtype="float32")
    assert not run(tmp_path, adata, rank_by="specificity").reason


# ----------------------------------------------------------------------------------------------------- reproducibility


def test_seed_and_name_decide_not_place_or_threads(tmp_path, adata):
    path = write(adata, tmp_path / "one" / "a.h5ad")
    (tmp_path / "two").mkdir()
    other = shutil.copy(path, tmp_path / "two" / "b.h5ad")

    def puzzles(path, name, seed=1, threads=1):
        return list(process_file(Job(str(path), name, "", PuzzleSettings(**SMALL, seed=seed), threads)).puzzles)

    assert puzzles(path, "a") == puzzles(other, "a", threads=4)
    assert puzzles(path, "a") != puzzles(path, "b")
    assert puzzles(path, "a") != puzzles(path, "a", seed=2)


def test_progress_counts_the_cells_that_are_read(tmp_path, adata):
    seen = []
    path = write(adata, tmp_path / "a.h5ad")
    result = process_file(Job(str(path), "a", "", PuzzleSettings(**SMALL)), seen.append)
    assert sum(seen) == len({name for p in result.puzzles for name in p.meta["cell_ids"]})


@pytest.mark.filterwarnings("ignore:Writing zarr")
def test_fingerprint_of_files_and_folders(tmp_path, adata, monkeypatch):
    monkeypatch.setattr(extract, "_ENDS", 64)
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)))
    first = file_fingerprint(path)
    assert first["bytes"] == 256
    path.write_bytes(bytes(255) + b"x")
    assert file_fingerprint(path) != first
    store = write(adata, tmp_path / "a.zarr")
    first = file_fingerprint(store)
    (store / "more").write_text("x")
    assert file_fingerprint(store)["bytes"] == first["bytes"] + 1
    assert file_fingerprint(store)["sha256_of_ends"] != first["sha256_of_ends"]


# ------------------------------------------------------------------------------------------------------------- records


def test_cell_records_in_the_published_form(tmp_path):
    adata = toy_adata(batches=2)
    path = write(adata, tmp_path / "a.h5ad")
    records = tmp_path / "cells" / "a.json"
    job = Job(str(path), "a", "", PuzzleSettings(**SMALL), records=str(records))
    result = process_file(job)
    found = json.loads(records.read_bytes())
    assert result.n_records == len(found) == 600
    first = found[0]
    cell = adata.obs.iloc[0]
    assert first["cell_index"] == "donor-cell0"
    assert (first["donor_id"], first["cell_type"], first["batch_id"]) == (cell.donor_id, cell.cell_type, "b0")
    genes = top_genes(adata[:1].X, adata.var["feature_name"], 50)[0]
    assert tuple(first["top_expressed_genes"]) == genes
    assert first["context"].endswith(f"melanoma. Top expressed genes are: {', '.join(genes)}.")
    assert (first["tissue"], first["disease"], first["sex"]) == ("skin epidermis", "melanoma", cell.sex)
    assert "self_reported_ethnicity" not in first
    assert list(process_file(Job(str(path), "a", "", PuzzleSettings(**SMALL))).puzzles) == list(result.puzzles)


def test_backed_objects_are_what_is_on_disk(tmp_path, adata):
    path = write(adata, tmp_path / "a.h5ad")
    backed = ad.read_h5ad(path, backed="r")
    assert list(process_file(Job(str(backed.filename), "toy", "folder", PuzzleSettings(**SMALL))).puzzles) == list(
        run(tmp_path, adata).puzzles
    )
    backed.file.close()


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"variant": "double"}, "variant must be one of"),
        ({"rank_by": "name"}, "rank_by must be one of"),
        ({"n_top": 0}, "n_top must be at least 1"),
        ({"max_cells": -1}, "max_cells must be at least 0"),
        ({"min_genes": 60}, "must not be larger than n_top"),
        ({"sizes": ()}, "sizes must be different positive"),
        ({"sizes": (3, 3)}, "sizes must be different positive"),
        ({"variant": "single"}, "have the size 1"),
        ({"layer": "a", "use_raw": True}, "exclude each other"),
        ({"exclude_genes": ("(",)}, "exclude_genes"),
        ({"exclude_types": ("(",)}, "exclude_types: "),
    ],
)
def test_settings_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        PuzzleSettings(**settings)


def test_defaults_are_as_published():
    settings = PuzzleSettings()
    assert settings.sizes == (8, 9, 10, 11, 12, 13, 14, 15)
    assert (settings.per_size, settings.max_cells, settings.n_top) == (40, 20_000, 50)
    assert (settings.suspension, settings.gene_column, settings.rank_by) == ("cell", "feature_name", "expression")
    assert not settings.exclude_genes
