"""Every store that anndata writes, whatever its options, gives the same puzzles, and the plugin reads it, too."""

import sys
from importlib.util import find_spec

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from recipe.cello1.data.extract import Job, process_file
from recipe.cello1.data.settings import PuzzleSettings
from scverse_plugin._files import read_object
from tests.helpers.toy_h5ad import toy_adata

SETTINGS = {"sizes": (3,), "per_size": 4}
KINDS = ("h5ad", "zarr")

pytestmark = pytest.mark.filterwarnings("ignore")


def base() -> ad.AnnData:
    return toy_adata(1, n_cells=80, n_donors=2, integer=True)


def puzzles_of(path, **more):
    result = process_file(Job(str(path), "a", "", PuzzleSettings(**SETTINGS, **more)))
    assert not result.reason, result.reason
    return [(puzzle.cells, puzzle.answer, puzzle.context, puzzle.meta) for puzzle in result.puzzles]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "a.h5ad"
    base().write_h5ad(path)
    return puzzles_of(path)


def as_text(adata, dtype):
    for column in adata.obs:
        adata.obs[column] = adata.obs[column].astype(str).astype(dtype)
    adata.var["feature_name"] = adata.var["feature_name"].astype(dtype)


def with_missing_text(adata):
    as_text(adata, "string")
    adata.obs["self_reported_ethnicity"] = pd.array([pd.NA] * adata.n_obs, dtype="string")


def index_as_text(adata):
    adata.obs.index = pd.Index(adata.obs.index.astype("string"))
    adata.var.index = pd.Index(adata.var.index.astype("string"))


def categories(adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories(["never"]).cat.as_ordered()
    adata.var["feature_name"] = pd.Categorical(adata.var["feature_name"])


CHANGES = {
    "csr": lambda adata: None,
    "csc": lambda adata: setattr(adata, "X", sp.csc_matrix(adata.X)),
    "csr array": lambda adata: setattr(adata, "X", sp.csr_array(adata.X)),
    "dense": lambda adata: setattr(adata, "X", adata.X.toarray()),
    "dense, column by column": lambda adata: setattr(adata, "X", np.asfortranarray(adata.X.toarray())),
    "big endian": lambda adata: setattr(adata, "X", adata.X.toarray().astype(">f8")),
    "float64": lambda adata: setattr(adata, "X", adata.X.astype(np.float64)),
    "integers": lambda adata: setattr(adata, "X", adata.X.astype(np.uint16)),
    "text": lambda adata: as_text(adata, object),
    "text that may be missing": with_missing_text,
    "index that may be missing": index_as_text,
    "categories": categories,
}


def store(adata, path, **options):
    getattr(adata, f"write_{path.suffix[1:]}")(path, **options)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.slow
def test_objects(tmp_path, wanted, change, kind):
    adata = base()
    CHANGES[change](adata)
    with ad.settings.override(allow_write_nullable_strings=True):
        path = store(adata, tmp_path / f"a.{kind}", convert_strings_to_categoricals=False)
    assert puzzles_of(path) == wanted
    assert read_object(path).obs["cell_type"].astype(str).tolist() == base().obs["cell_type"].astype(str).tolist()


OPTIONS = {
    "gzip": ("h5ad", {"compression": "gzip", "compression_opts": 9}),
    "lzf": ("h5ad", {"compression": "lzf"}),
    "as dense": ("h5ad", {"as_dense": ["X"]}),
    "small chunks": ("zarr", {"chunks": (7, 11)}),
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.slow
def test_options_of_the_writers(tmp_path, wanted, option, dense):
    kind, options = OPTIONS[option]
    adata = base()
    if dense or option == "small chunks":
        adata.X = adata.X.toarray()
    if dense and option == "as dense":
        options = {}
    path = store(adata, tmp_path / f"a.{kind}", **options)
    assert puzzles_of(path) == wanted and read_object(path).shape == adata.shape


@pytest.mark.parametrize(
    ("setting", "value", "kind"),
    [
        ("zarr_write_format", 2, "zarr"),
        ("zarr_write_format", 3, "zarr"),
        ("auto_shard_zarr_v3", True, "zarr"),
        ("write_csr_csc_indices_with_min_possible_dtype", True, "zarr"),
        ("write_csr_csc_indices_with_min_possible_dtype", True, "h5ad"),
    ],
)
@pytest.mark.slow
def test_settings_of_anndata(tmp_path, wanted, setting, value, kind):
    if setting not in dir(ad.settings):
        pytest.skip(f"this anndata has no {setting}")
    more = {"zarr_write_format": 3} if setting == "auto_shard_zarr_v3" else {}
    with ad.settings.override(**more, **{setting: value}):
        path = store(base(), tmp_path / f"a.{kind}")
    assert puzzles_of(path) == wanted and read_object(path).shape == base().shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matrix", [sp.csr_matrix, sp.csc_matrix, lambda found: found.toarray()])
@pytest.mark.slow
def test_layers_and_raw(tmp_path, wanted, matrix, kind):
    adata = base()
    adata.raw = ad.AnnData(matrix(adata.X), obs=adata.obs, var=adata.var)
    adata.layers["counts"] = matrix(adata.X)
    adata.X = None
    path = store(adata, tmp_path / f"layer.{kind}")
    assert puzzles_of(path, layer="counts") == wanted
    del adata.layers["counts"]
    path = store(adata[:, :30].copy(), tmp_path / f"raw.{kind}")
    assert puzzles_of(path, use_raw=True) == wanted and read_object(path).raw.shape == adata.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["int8", "int64", "float32", "float64", "Int64", "bool", "boolean", "category"])
@pytest.mark.slow
def test_donors_that_are_no_text(tmp_path, wanted, dtype, kind):
    adata = base()
    numbers = adata.obs["donor_id"].astype(str).str[-1].astype(int)
    adata.obs["donor_id"] = pd.Categorical(numbers) if dtype == "category" else numbers.astype(dtype)
    found = puzzles_of(store(adata, tmp_path / f"a.{kind}"))
    assert [puzzle[:3] for puzzle in found] == [puzzle[:3] for puzzle in wanted]
    names = ("False", "True") if "bool" in dtype else ("0", "1")
    assert [puzzle[3]["donor_id"] for puzzle in found] == [names[int(p[3]["donor_id"][-1])] for p in wanted]


# ------------------------------------------------------------------------------------------------ filters of others


def compressed_by(path, number):
    """Have the types of a file say that they were compressed by some filter."""
    with h5py.File(path, "r+") as file:
        codes = file["obs/cell_type/codes"]
        attributes, values = dict(codes.attrs), codes[:]
        del file["obs/cell_type/codes"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((len(values),))
        properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (1,))
        space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
        made = h5py.h5d.create(file["obs/cell_type"].id, b"codes", kind, space, properties)
        made.write_direct_chunk((0,), values.tobytes(), 0)
        file["obs/cell_type/codes"].attrs.update(attributes)


def test_a_filter_that_is_lacking_is_named_by_its_package(tmp_path):
    path = store(base(), tmp_path / "a.h5ad")
    compressed_by(path, 32015)
    if h5py.h5z.filter_avail(32015) or find_spec("hdf5plugin"):
        pytest.skip("the filter is there")
    result = process_file(Job(str(path), "a", "", PuzzleSettings(**SETTINGS)))
    assert "pip install hdf5plugin" in result.remedy and not result.puzzles
    with pytest.raises(ValueError, match=r"a.h5ad cannot be read .*pip install hdf5plugin"):
        read_object(path)


def test_hdf5plugin_is_imported_where_a_file_needs_it_and_only_there(tmp_path, monkeypatch):
    (tmp_path / "hdf5plugin.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hdf5plugin", raising=False)
    path = store(base(), tmp_path / "a.h5ad", compression="gzip")
    read_object(path)
    assert "hdf5plugin" not in sys.modules
    compressed_by(path, 32099)  # nobody's
    with pytest.raises(ValueError, match="cannot be read"):
        read_object(path)
    assert sys.modules.pop("hdf5plugin").__file__ == str(tmp_path / "hdf5plugin.py")


@pytest.mark.parametrize("name", ["zstd", "blosc", "lz4", "bshuf"])
def test_filters_of_hdf5plugin(tmp_path, wanted, name):
    plugin = pytest.importorskip("hdf5plugin")
    path = store(base(), tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:  # numbers alone: HDF5's Blosc ends the process that writes texts with it
        for name_of in [key for key in ("X/data", "X/indices", "X/indptr", "obs/cell_type/codes") if key in file]:
            values, attributes = file[name_of][:], dict(file[name_of].attrs)
            del file[name_of]
            made = file.create_dataset(name_of, data=values, chunks=True, compression=plugin.FILTERS[name])
            made.attrs.update(attributes)
    assert puzzles_of(path) == wanted and read_object(path).shape == base().shape
