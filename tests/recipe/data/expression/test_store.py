import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from recipe.cello1.data.expression.store import BadFileError, Store, make_labels
from recipe.cello1.task.sampling import sample_puzzles
from tests.helpers.toy_h5ad import toy_adata, write


@pytest.mark.parametrize(
    "values",
    [
        pd.Categorical(["b", None, "a", "unknown", "b"]),
        np.array(["b", "nan", "a", "", "b"], dtype=object),
        np.array(["b", "NA", "a", "None", "b"]),
        [b"b", None, b"a", float("nan"), b"b"],
    ],
)
def test_labels_of_text(values):
    labels = make_labels(values)
    assert labels.categories == ("a", "b")
    assert labels.codes.tolist() == [1, -1, 0, -1, 1]
    assert [labels.value(row) for row in range(5)] == ["b", "", "a", "", "b"]
    assert len(labels.take(np.array([0, 2]))) == 2


def test_labels_of_numbers():
    labels = make_labels(np.array([24.5, np.nan, 3.0]))
    assert [labels.value(row) for row in range(3)] == ["24.5", "", "3.0"]
    for values in (np.array([23.45], np.float32), pd.Categorical(np.array([23.45], np.float32))):
        assert make_labels(values).categories == ("23.45",)
    assert make_labels(np.array([True, False])).categories == ("False", "True")


def test_labels_serve_the_sampler_as_categories():
    labels = make_labels(pd.Categorical(["b", "a", "unknown"]))
    (puzzle,) = sample_puzzles(labels, None, sizes=[2], n_per_size=1, rng=0)
    assert puzzle.candidates == ("a", "b")


@pytest.fixture(params=["a.h5ad", "a.zarr"])
def path(request, tmp_path):
    adata = toy_adata(n_cells=40)
    adata.obs["BMI"] = np.linspace(20, 30, 40)
    adata.obs["nullable"] = pd.array([True, None] * 20, dtype="boolean")
    adata.obs["text"] = pd.array(["x", None] * 20, dtype="string")
    adata.layers["counts"] = adata.X
    adata.raw = adata[:, :100].copy()
    with ad.settings.override(allow_write_nullable_strings=True):
        return write(adata[:, 50:].copy(), tmp_path / request.param)


@pytest.mark.filterwarnings("ignore")
def test_tables(path):
    with Store(path) as store:
        assert store.n_obs == 40
        assert {"cell_type", "donor_id", "BMI"} <= set(store.columns())
        assert store.labels("suspension_type").categories == ("cell",)
        assert store.labels("BMI").value(0) == "20.0"
        assert [store.labels("nullable").value(i) for i in (0, 1)] == ["True", ""]
        assert [store.labels("text").value(i) for i in (0, 1)] == ["x", ""]
        assert store.labels("index").value(3) == "donor-cell3"
        assert store.cell_ids(np.array([3, 39])) == (["donor-cell3", "donor-cell39"], 0)
        assert store.gene_names("feature_name")[:2] == ["GENE50", "GENE51"]
        assert store.gene_names("index")[0] == "ENSG00000000050"
        assert len(store.gene_names("feature_name", raw=True)) == 100
        with pytest.raises(KeyError, match="nothing"):
            store.labels("nothing")


@pytest.mark.filterwarnings("ignore")
def test_matrices(path):
    with Store(path) as store:
        assert store.matrix().attrs["shape"][1] == 70
        assert store.matrix(layer="counts").attrs["shape"][1] == 70
        assert store.matrix(use_raw=True).attrs["shape"][1] == 100
        with pytest.raises(BadFileError, match=r"has no layer 'a'; choose another --layer, it has \['counts'\]"):
            store.matrix(layer="a")
        with pytest.raises(ValueError, match="exclude each other"):
            store.matrix(layer="counts", use_raw=True)


def test_what_is_not_there(tmp_path):
    adata = toy_adata(n_cells=10)
    adata.layers["counts"] = adata.X
    adata.X = None
    with Store(write(adata, tmp_path / "a.h5ad")) as store:
        with pytest.raises(BadFileError, match=r"has no X; choose a --layer, it has \['counts'\]"):
            store.matrix()
        for read in (store.matrix, lambda use_raw: store.gene_names("index", raw=use_raw)):
            with pytest.raises(BadFileError, match="has no raw; leave --use-raw out"):
                read(use_raw=True)
        with pytest.raises(
            BadFileError, match=r"no column 'symbol' .*--gene-column, it has \['feature_name', 'index'\]"
        ):
            store.gene_names("symbol")


def test_names_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.cello1.data.expression.store._NAME_BLOCK", 7)
    with Store(write(toy_adata(n_cells=40), tmp_path / "a.h5ad")) as store:
        rows = np.array([0, 6, 7, 30, 39])
        assert store.cell_ids(rows) == ([f"donor-cell{row}" for row in rows], 0)
        assert store.cell_ids(np.array([], dtype=int)) == ([], 0)


@pytest.mark.filterwarnings("ignore:Observation names are not unique", "ignore:Writing zarr")
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_names_that_repeat_have_the_row_added(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("recipe.cello1.data.expression.store._NAME_BLOCK", 7)
    adata = toy_adata(n_cells=40)
    adata.obs_names = ["a", "b", *adata.obs_names[2:30], "b", "a", "a", *adata.obs_names[33:]]
    with Store(write(adata, tmp_path / f"a{suffix}")) as store:
        assert store.cell_ids(np.array([1, 6, 30])) == (["b#1", "donor-cell6#6", "b#30"], 2)
        assert store.cell_ids(np.array([6])) == (["donor-cell6#6"], 2)


def test_an_index_with_a_mask(tmp_path):
    path = write(toy_adata(n_cells=4), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        for table in ("obs", "var"):
            name = file[table].attrs["_index"]
            values = file[table][name][:]
            del file[table][name]
            group = file[table].create_group(name)
            group.attrs.update({"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"})
            for key, found in (("values", values), ("mask", np.zeros(len(values), dtype=bool))):
                group[key] = found
            group["values"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    with Store(path) as store:
        assert store.n_obs == 4
        assert store.cell_ids(np.array([1, 3])) == (["donor-cell1", "donor-cell3"], 0)
        assert store.gene_names("index")[0] == "ENSG00000000000"


def test_categories_as_anndata_0_7_wrote_them(tmp_path):
    path = write(toy_adata(n_cells=10), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/tissue"]
        file["obs/__categories/tissue"] = np.array(["blood", "lung"], dtype=h5py.string_dtype())
        file["obs/tissue"] = np.array([0, 1, -1] * 3 + [0], dtype="int8")
        file["obs/tissue"].attrs["categories"] = file["obs/__categories/tissue"].ref
    with Store(path) as store:
        assert "__categories" not in store.columns()
        assert [store.labels("tissue").value(i) for i in range(3)] == ["blood", "lung", ""]


def test_files_that_cannot_be_opened(tmp_path):
    path = write(toy_adata(n_cells=10), tmp_path / "a.h5ad")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFileError, match="HDF5 file cannot be read .*fetch or write it again"):
        Store(path)
    path.write_text("not HDF5")
    with pytest.raises(BadFileError, match="HDF5 file cannot be read"):
        Store(path)
    (tmp_path / "b.zarr").mkdir()
    with pytest.raises(BadFileError, match="zarr store cannot be read"):
        Store(tmp_path / "b.zarr")


def test_without_the_package_for_zarr(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(BadFileError, match="zarr is not installed; pip install zarr"):
        Store(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda file: file.pop("obs"), "has no table 'obs'"),
        (lambda file: file.pop("var"), "has no table 'var'"),
        (lambda file: (file.pop("obs"), file.__setitem__("obs", np.zeros(3))), "format of anndata before 0.7"),
        (lambda file: file["obs"].attrs.__setitem__("_index", "lost"), "index of obs cannot be read"),
    ],
)
def test_files_that_are_not_anndata(tmp_path, change, match):
    path = write(toy_adata(n_cells=10), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(BadFileError, match=match):
        Store(path)


def test_a_file_without_cells(tmp_path):
    with pytest.raises(BadFileError, match="has no cells"):
        Store(write(toy_adata(n_cells=5)[:0].copy(), tmp_path / "a.h5ad"))


def test_a_damaged_column(tmp_path):
    path = write(toy_adata(n_cells=10), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/tissue/codes"]
    with Store(path) as store, pytest.raises(BadFileError, match="column 'tissue' of obs cannot be read"):
        store.labels("tissue")
