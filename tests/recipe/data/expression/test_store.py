import contextlib
import shutil
import subprocess
import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from recipe.cello1.data.expression.reader import CellReader, GeneLists
from recipe.cello1.data.expression.store import Store
from recipe.cello1.formats.stores import BadFileError, missing_chunks, reading
from scverse_plugin._files import read_object
from tests.helpers.toy_h5ad import toy_adata, write


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
        with pytest.raises(BadFileError, match=r"has no layer 'a'; choose another layer=, it has \['counts'\]"):
            store.matrix(layer="a")
        with pytest.raises(ValueError, match="exclude each other"):
            store.matrix(layer="counts", use_raw=True)


def test_what_is_not_there(tmp_path):
    adata = toy_adata(n_cells=10)
    adata.layers["counts"] = adata.X
    adata.X = None
    with Store(write(adata, tmp_path / "a.h5ad")) as store:
        with pytest.raises(BadFileError, match=r"has no X; choose a layer=, it has \['counts'\]"):
            store.matrix()
        for read in (store.matrix, lambda use_raw: store.gene_names("index", raw=use_raw)):
            with pytest.raises(BadFileError, match="has no raw; leave use_raw=True out"):
                read(use_raw=True)
        with pytest.raises(
            BadFileError, match=r"no column 'symbol' .*gene_column=, it has \['feature_name', 'index'\]"
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
    (tmp_path / "b.zarr").mkdir()
    with pytest.raises(BadFileError, match="it is a folder, but not a zarr store"):
        Store(tmp_path / "b.zarr")


def test_without_the_package_for_zarr(tmp_path, monkeypatch):
    (tmp_path / "a.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(BadFileError, match="zarr is not installed; pip install zarr"):
        Store(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda file: file.pop("obs"), "has no table 'obs'"),
        (lambda file: file.pop("var"), "has no table 'var'"),
        (lambda file: (file.pop("obs"), file.__setitem__("obs", np.zeros(3))), "table 'obs' has no columns"),
        (lambda file: file.create_group("mod/rna"), "is MuData .h5mu. with the modalities rna; write one of them"),
        (lambda file: file.move("obs", "matrix"), "is a 10x matrix"),
        (lambda file: file.move("obs", "row_attrs"), "is a loom file .*convert it"),
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


# ------------------------------------------------------------------------------------------- files of other writers


def old_table(adata: ad.AnnData, table: str) -> tuple[np.ndarray, dict[str, list[str]]]:
    """A table as anndata before 0.7 wrote it: records, the categories in uns."""
    frame = getattr(adata, table)
    columns = {"index": frame.index.to_numpy().astype("S")}
    names = {}
    for name in frame:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            columns[name], names[f"{name}_categories"] = (
                frame[name].cat.codes.to_numpy(),
                list(frame[name].cat.categories),
            )
        else:
            columns[name] = frame[name].to_numpy().astype("S")
    records = np.empty(len(frame), dtype=[(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        records[name] = values
    return records, names


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.filterwarnings("ignore")
def test_files_of_anndata_before_0_7(tmp_path, suffix):
    import zarr

    adata = toy_adata(n_cells=40)
    path = write(adata, tmp_path / f"a{suffix}")
    with contextlib.ExitStack() as stack:
        if suffix == ".h5ad":
            file = stack.enter_context(h5py.File(path, "a"))
        else:
            with ad.settings.override(zarr_write_format=2):
                shutil.rmtree(path)
                file = zarr.open_group(write(adata, path), mode="a", use_consolidated=False)
        for table in ("obs", "var"):
            records, names = old_table(adata, table)
            del file[table]
            for key, values in {
                table: records,
                **{f"uns/{name}": np.array(own, "S") for name, own in names.items()},
            }.items():
                if suffix == ".h5ad":
                    file[key] = values
                else:
                    file.create_array(key, data=values)
    with Store(path) as store:
        assert store.labels("cell_type").categories == tuple(sorted(adata.obs["cell_type"].unique()))
        assert [store.labels("donor_id").value(i) for i in range(40)] == adata.obs["donor_id"].tolist()
        assert store.cell_ids(np.array([3])) == (["donor-cell3"], 0)
        assert store.gene_names("feature_name") == adata.var["feature_name"].tolist()
        assert len(list(CellReader(store, GeneLists()).read())) == 40


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.filterwarnings("ignore")
def test_categories_without_ordered_and_as_a_path(tmp_path, suffix):
    import zarr

    path = write(toy_adata(n_cells=10), tmp_path / f"a{suffix}")
    with contextlib.ExitStack() as stack:
        opened = h5py.File(path, "a") if suffix == ".h5ad" else zarr.open_group(path, mode="a", use_consolidated=False)
        file = stack.enter_context(opened) if suffix == ".h5ad" else opened
        del file["obs/sex"].attrs["ordered"]
        codes = file["obs/tissue/codes"][:]
        del file["obs/tissue"]
        for key, values in {"obs/tissue": codes, "obs/__categories/tissue": np.array(["lung"], "S")}.items():
            if suffix == ".h5ad":
                file[key] = values
            else:
                file.create_array(key, data=values)
        file["obs/tissue"].attrs["categories"] = "__categories/tissue"
    with Store(path) as store:
        assert set(store.labels("sex").categories) == {"female", "male"}
        assert store.labels("tissue").categories == ("lung",)
        assert "__categories" not in store.columns()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_metadata_that_are_not_consolidated_or_old(tmp_path, version):
    import zarr

    with ad.settings.override(zarr_write_format=version):
        path = write(toy_adata(n_cells=10), tmp_path / "a.zarr")
    zarr.consolidate_metadata(str(path))
    group = zarr.open_group(str(path), mode="a", use_consolidated=False)
    group["obs"].create_array("score", data=np.arange(10))
    (path / ".DS_Store").write_text("x")
    with Store(path) as store:
        assert store.labels("score").value(3) == "3"


def remove_chunk(folder):
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".z", "zarr")))
    max(files).unlink()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_a_store_that_was_copied_in_part(tmp_path, version, subtests):
    adata = toy_adata(n_cells=40)
    adata.layers["counts"], adata.raw = adata.X.copy(), adata
    with ad.settings.override(zarr_write_format=version):
        whole = write(adata, tmp_path / "whole.zarr")
    with Store(whole) as store:
        assert CellReader(store, GeneLists()).notes == []
    read_object(whole)
    for number, place in enumerate(
        (
            "X/data",
            "X/indices",
            "X/indptr",
            "layers/counts/data",
            "raw/X/indptr",
            "obs/_index",
            "var/_index",
            "obs/cell_type/categories",
        )
    ):
        path = shutil.copytree(whole, tmp_path / f"{number}.zarr")
        remove_chunk(path / place)
        with subtests.test(place):
            with pytest.raises(BadFileError, match=f"1 chunks of its {place} are missing; copy the whole"):
                Store(path)
            with pytest.raises(ValueError, match=f"1 chunks of its {place} are missing; copy the whole"):
                read_object(path)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_a_category_that_no_cell_has_is_no_sign_of_a_copy_in_part(tmp_path, version):
    adata = toy_adata(n_cells=40)
    adata.obs["lab"] = pd.Categorical(["north"] * 40, categories=["north", "south"])  # all codes 0: no chunk is written
    with ad.settings.override(zarr_write_format=version):
        path = write(adata, tmp_path / "a.zarr")
    with Store(path) as store:
        assert store.labels("lab").value(7) == "north"
        assert "count as 'north'" in store.notes[0]
    assert set(read_object(path).obs["lab"]) == {"north"}


@pytest.mark.filterwarnings("ignore")
def test_chunks_of_the_first_category_may_be_left_out_but_not_in_silence(tmp_path):
    import zarr

    path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    donors = zarr.open_group(str(path), mode="a")["obs/donor_id"]
    values = np.append(np.zeros(20, np.int8), donors["codes"][20:])
    donors.create_array("codes", data=values, chunks=(20,), overwrite=True).attrs.update({"encoding-type": "array"})
    with Store(path) as store:
        assert store.labels("donor_id").value(3) == "donor0"
        assert store.notes == [
            "1 chunks of obs/donor_id are not stored and count as 'donor0': is the store a whole copy?"
        ]


@pytest.mark.filterwarnings("ignore")
def test_a_store_whose_values_are_pickled_is_not_called_damaged(tmp_path):
    with ad.settings.override(zarr_write_format=2):
        path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    meta = path / "obs" / "_index" / ".zarray"
    meta.write_text(meta.read_text().replace("vlen-utf8", "pickle"))
    with pytest.raises(BadFileError, match="object_codec_id.*; it holds what zarr does not read here: write it again"):
        Store(path)


@pytest.mark.filterwarnings("ignore")
def test_a_dense_store_that_was_copied_in_part(tmp_path):
    adata = toy_adata(n_cells=40)
    adata.X = adata.X.toarray()
    path = write(adata, tmp_path / "a.zarr")
    with Store(path) as store:
        assert CellReader(store, GeneLists()).notes == []
    remove_chunk(path / "X")
    with Store(path) as store:
        assert "1 chunks of the matrix are not stored" in CellReader(store, GeneLists()).notes[0]


# ------------------------------------------------------------------------------------------------- gene names of a file


def names_of(path, column="feature_name", **options) -> tuple[list, list]:
    with Store(path) as store:
        reader = CellReader(store, GeneLists(gene_column=column, **options))
        return list(reader.genes.names), reader.notes


def test_a_column_called_index_is_read_before_the_index(tmp_path):
    adata = toy_adata(n_cells=4)
    adata.var["index"] = adata.var.pop("feature_name").to_numpy()
    assert names_of(write(adata, tmp_path / "a.h5ad"), "index")[0][:2] == ["GENE0", "GENE1"]
    adata.var = adata.var.set_index("index")
    adata.var.index.name = "feature_name"
    for column in ("feature_name", "index"):
        assert names_of(write(adata, tmp_path / "b.h5ad"), column)[0][:2] == ["GENE0", "GENE1"]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("column", ["feature_name", "index"])
def test_raw_with_row_numbers_takes_the_names_of_var(tmp_path, first, column):
    adata = toy_adata(n_cells=4)
    raw = adata.copy()
    raw.var = pd.DataFrame(index=[str(i + first) for i in range(raw.n_vars)])
    adata.raw = raw
    if column == "index":
        adata.var_names = adata.var.pop("feature_name").to_numpy()
    names, notes = names_of(write(adata, tmp_path / "a.h5ad"), column, use_raw=True)
    assert names[:2] == ["GENE0", "GENE1"]
    assert notes == ["raw has no gene names of its own: those of var are used, column by column"]
    adata = adata[:, :50].copy()
    with pytest.raises(BadFileError):
        names_of(write(adata, tmp_path / "b.h5ad"), column, use_raw=True)


def test_names_that_are_no_symbols_are_refused_with_the_column_that_has_them(tmp_path):
    adata = toy_adata(n_cells=4)
    adata.var["score"] = np.linspace(0, 1, adata.n_vars)
    with pytest.raises(BadFileError, match="120 of 120 gene names are Ensembl ids.*gene_column=feature_name"):
        names_of(write(adata, tmp_path / "a.h5ad"), "index")
    del adata.var["feature_name"]
    with pytest.raises(BadFileError, match="none found in var"):
        names_of(write(adata, tmp_path / "a.h5ad"), "index")


# ------------------------------------------------------------------------------------------------ causes, remedies


def test_a_file_that_is_open_elsewhere(tmp_path):
    path = write(toy_adata(n_cells=4), tmp_path / "a.h5ad")
    code = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BadFileError, match="another process has it open"):
            Store(path)
        other.communicate(b"\n")
    assert Store(path).n_obs == 4


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("Unable to synchronously open file (unable to lock file, errno = 11)", "another process has it open"),
        ("Can't synchronously read data (required filter 'zstd' is not registered)", "pip install hdf5plugin"),
        ("unable to open file: errno = 13, error message = 'Permission denied'", "permission to read it"),
        ("[Errno 5] Input/output error", "check the drive"),
        ("[Errno 24] Too many open files", "ulimit -n"),
        ("'ascii' codec can't decode byte 0xe9 in position 2: ordinal not in range(128)", "not UTF-8: write it anew"),
        ("truncated file: eof = 5", "damaged"),
    ],
)
def test_each_cause_has_its_remedy(text, remedy):
    with pytest.raises(BadFileError, match=remedy), reading("it"):
        raise OSError(text)


# ----------------------------------------------------------------------------------------- enumerations, missing chunks


@pytest.mark.filterwarnings("ignore")
def test_an_enumeration_is_its_names_not_its_numbers(tmp_path):
    path = write(toy_adata(n_cells=6), tmp_path / "a.h5ad")
    kind = h5py.enum_dtype({"north": 1, "south": 2, "unknown": 7}, basetype="u1")
    with h5py.File(path, "r+") as file:
        file["obs"].create_dataset("site", data=np.array([2, 1, 7, 9, 1, 2]), dtype=kind)
        file["obs"]["flag"] = np.array([True, False] * 3)  # HDF5 has truth values as an enumeration, too
        file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "site", "flag"]
    with Store(path) as store:
        site = store.labels("site")
        assert [site.value(row) for row in range(6)] == ["south", "north", "", "", "north", "south"]
        assert store.labels("flag").categories == ("False", "True")
    obs = read_object(path).obs
    assert obs["site"].astype(object).tolist()[:3] == ["south", "north", "unknown"] and obs["site"].isna()[3]
    assert obs["flag"].tolist() == [True, False] * 3


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_data_and_plugin_say_which_chunks_are_missing(tmp_path, version, monkeypatch):
    adata = toy_adata(n_cells=40)
    adata.X = adata.X.toarray()
    adata.obs["age"] = np.arange(1, 41)
    with ad.settings.override(zarr_write_format=version):
        path = write(adata, tmp_path / "a.zarr")
    said = []
    monkeypatch.setattr("scverse_plugin._files.logg.warning", said.append)
    read_object(path)
    assert said == []
    for place in ("X", "obs/age"):
        remove_chunk(path / place)
    with Store(path) as store:
        assert store.labels("age").value(0) == "0"
        assert store.notes == ["1 chunks of obs/age are not stored and count as 0: is the store a whole copy?"]
    read_object(path)
    assert said == ["1 chunks of X are not stored and count as zeros: is the store a whole copy?"]


def test_chunks_are_counted_by_their_names(tmp_path):
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    made = root.create_array("a/b", shape=(5, 7), chunks=(2, 3), dtype="f4")
    made[:] = 1
    assert missing_chunks(root["a/b"]) == 0
    folder = tmp_path / "a.zarr" / "a" / "b"
    remove_chunk(folder)
    for stray in ("c/0/9", "c/0/00", "c/0/0 (copy)", "notes.txt"):
        (folder / stray).write_bytes(b"x")
    assert missing_chunks(root["a/b"]) == 1
