"""Reading rows: every way a matrix may be stored gives the same rows as the matrix in memory."""

import tracemalloc

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.cello1.data.expression import matrix as module
from recipe.cello1.data.expression import vectors
from recipe.cello1.data.expression.matrix import map_blocks, open_matrix
from recipe.cello1.data.expression.store import BadFileError, Store

N, G = 53, 31


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    rng = np.random.default_rng(1)
    found = rng.poisson(0.7, size=(N, G)).astype("float32")
    found[[0, 17, 52]] = 0  # empty rows, at the ends too
    return found


def adata_of(matrix) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(matrix.shape[0])])
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])]))


def rows_of(store: Store, rows=None, threads=1) -> tuple[np.ndarray, np.ndarray]:
    """Read through the module; returns row numbers and dense values."""
    matrix = open_matrix(store.matrix(), store.file)

    def to_dense(block):
        if block.indices is None:
            return block.rows, block.values
        assert block.indices.dtype == np.int32
        shape = (len(block.rows), matrix.shape[1])
        return block.rows, sp.csr_array((block.values, block.indices, block.indptr), shape=shape).toarray()

    parts = list(map_blocks(matrix, to_dense, rows, threads))
    if not parts:
        return np.empty(0, int), np.empty((0, matrix.shape[1]))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


SOME_ROWS = [
    None,
    np.arange(N),
    np.array([0]),
    np.array([52]),
    np.array([3, 4, 5, 20, 51]),
    np.arange(0, N, 7),
    np.array([], dtype=int),
]
FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that every file has several."""
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 60)
    monkeypatch.setattr(module, "PLAIN_ENTRIES", 40)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(module, "DENSE_ENTRIES", 5 * G)
    monkeypatch.setattr(module, "CSC_ENTRIES", 200)
    monkeypatch.setattr(module, "CSC_STEP", 70)
    monkeypatch.setattr(vectors, "SPAN", 40)


class Counted:
    """Counts the values that are read."""

    def __init__(self, vector):
        self.vector, self.dtype, self.count = vector, vector.dtype, 0

    def gather(self, starts, stops):
        self.count += int((stops - starts).sum())
        return self.vector.gather(starts, stops)


def test_the_sums_of_a_csc_matrix_take_one_pass(tmp_path, dense):
    adata_of(sp.csc_matrix(dense)).write_h5ad(tmp_path / "a.h5ad")
    with Store(tmp_path / "a.h5ad") as store:
        matrix = open_matrix(store.matrix(), store.file)
        matrix.values = Counted(matrix.values)
        sums, n_cells = matrix.column_sums()
    np.testing.assert_array_equal(sums, dense.sum(axis=0))
    assert n_cells == N
    assert matrix.values.count == np.count_nonzero(dense)
    spoiled = dense.copy()
    spoiled[[4, 20], [G - 1, 3]] = np.nan
    adata_of(sp.csc_matrix(spoiled)).write_h5ad(tmp_path / "b.h5ad")
    with Store(tmp_path / "b.h5ad") as store:
        sums, n_cells = open_matrix(store.matrix(), store.file).column_sums()
    np.testing.assert_array_equal(sums, np.delete(dense, [4, 20], axis=0).sum(axis=0))
    assert n_cells == N - 2


def test_csc_blocks_keep_to_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CSC_ENTRIES", 40_000)
    monkeypatch.setattr(module, "CSC_STEP", 10_000)
    rng = np.random.default_rng(0)
    values = rng.poisson(0.02, size=(1000, 600)).astype(np.int64)
    values[:100] = 1 + rng.poisson(1.0, size=(100, 600))  # the first rows have fifty times as much as the others
    adata_of(sp.csc_matrix(values)).write_h5ad(tmp_path / "a.h5ad")
    with Store(tmp_path / "a.h5ad") as store:
        matrix = open_matrix(store.matrix(), store.file)
        sizes = [len(plan().values) for plan in matrix.plans(np.arange(100))]
        assert sum(sizes) == 60_000 and max(sizes) <= 40_000
        plan = next(matrix.plans(np.arange(100)))
        tracemalloc.start()
        block = plan()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert block.values.dtype == np.float64
    assert peak < matrix.block_bytes


def check(path, dense, threads=1):
    with Store(path) as store:
        for wanted in SOME_ROWS:
            rows, values = rows_of(store, wanted, threads)
            expected = np.arange(N) if wanted is None else wanted
            np.testing.assert_array_equal(rows, expected)
            np.testing.assert_array_equal(values, dense[expected])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
@pytest.mark.parametrize("form", FORMS)
def test_h5ad(tmp_path, dense, form, compression, threads):
    path = tmp_path / "a.h5ad"
    adata_of(FORMS[form](dense)).write_h5ad(path, compression=compression)
    check(path, dense, threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.slow
def test_zarr(tmp_path, dense, form, version, threads):
    ad.settings.zarr_write_format = version
    try:
        adata_of(FORMS[form](dense)).write_zarr(tmp_path / "a.zarr")
    finally:
        ad.settings.reset("zarr_write_format")
    check(tmp_path / "a.zarr", dense, threads)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "int32", "uint8", "bool", ">f4", ">i4"])
@pytest.mark.parametrize("form", ["csr", "dense"])
def test_types_of_values(tmp_path, dense, dtype, form):
    values = (dense > 0).astype(dtype) if dtype == "bool" else dense.astype(dtype)
    path = tmp_path / "a.h5ad"
    adata_of(sp.csr_matrix(dense) if form == "csr" else dense).write_h5ad(path)
    with h5py.File(path, "a") as file:
        name = "X/data" if form == "csr" else "X"
        stored = file[name][:]
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = (stored > 0).astype(dtype) if dtype == "bool" else stored.astype(dtype)
        file[name].attrs.update(attributes)
    check(path, np.asarray(values, dtype="float64"))


@pytest.mark.parametrize("index", ["uint8", "int64", "int32"])
def test_types_of_indices(tmp_path, dense, index):
    csr = sp.csr_matrix(dense)
    path = tmp_path / "a.h5ad"
    adata_of(csr).write_h5ad(path)
    with h5py.File(path, "a") as file:
        for name, kind in (("indices", index), ("indptr", "int64" if index == "uint8" else index)):
            del file["X"][name]
            file["X"].create_dataset(name, data=getattr(csr, name).astype(kind), chunks=(16,), compression="gzip")
    check(path, dense)


def stored_as(path, dense, **options) -> None:
    """A CSR file whose vectors are stored in a way that anndata need not choose."""
    csr = sp.csr_matrix(dense)
    with h5py.File(path, "w", userblock_size=options.pop("userblock_size", 0)) as file:
        write_elem(file, "obs", pd.DataFrame(index=[f"c{i}" for i in range(N)]))
        write_elem(file, "var", pd.DataFrame(index=[f"g{i}" for i in range(G)]))
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": csr.shape})
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(csr, name), **options)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"compression": "gzip", "chunks": (7,)}, "RawVector"),
        ({"compression": "gzip", "shuffle": True, "chunks": (50,)}, "RawVector"),
        ({"compression": "gzip", "chunks": (10_000,), "maxshape": (None,)}, "RawVector"),  # larger than its data
        ({"chunks": (13,)}, "RawVector"),
        ({}, "RawVector"),
        ({"compression": "lzf", "chunks": (13,)}, "SlicedVector"),
        ({"compression": "gzip", "fletcher32": True, "chunks": (13,)}, "SlicedVector"),
        ({"compression": "gzip", "chunks": (13,), "userblock_size": 512}, "SlicedVector"),
    ],
)
def test_layouts_of_hdf5(tmp_path, dense, options, kind):
    path = tmp_path / "a.h5ad"
    stored_as(path, dense, **options)
    with Store(path) as store:
        assert type(open_matrix(store.matrix(), store.file).values).__name__ == kind
    check(path, dense)
    check(path, dense, threads=4)


@pytest.mark.parametrize("order", ["forwards", "backwards", "last three first"])
def test_chunks_are_read_at_once_only_where_they_lie_one_behind_the_other(tmp_path, dense, order, monkeypatch):
    path = tmp_path / "a.h5ad"
    stored_as(path, dense, chunks=(8,))
    with h5py.File(path, "a") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            new = file["X"].create_dataset(name, values.shape, values.dtype, chunks=(8,))
            starts = np.arange(0, len(values), 8)
            if order == "last three first":
                starts = np.roll(starts, 3)
            for start in starts[::-1] if order == "backwards" else starts:
                new[start : start + 8] = values[start : start + 8]
                file.flush()  # h5py writes a chunk when it leaves its cache, so that this decides where it lies
    reads = []
    read = vectors.RawVector._read_into
    monkeypatch.setattr(
        vectors.RawVector, "_read_into", lambda self, part, at: reads.append(len(part)) or read(self, part, at)
    )
    check(path, dense)
    assert (max(reads) > 8 * 4) == (order != "backwards")


def test_a_chunk_that_was_never_written_reads_as_hdf5_has_it(tmp_path, dense):
    path = tmp_path / "a.h5ad"
    stored_as(path, dense, chunks=(8,), compression="gzip")
    with h5py.File(path, "a") as file:
        size = file["X/data"].size
        del file["X/data"]
        file["X"].create_dataset("data", (size,), "f4", chunks=(8,), compression="gzip", fillvalue=0)
    check(path, np.zeros_like(dense))


@settings(max_examples=30)
@given(st.data())
def test_any_rows(tmp_path_factory, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dense = rng.poisson(0.5, size=(N, G)).astype("float32")
    path = tmp_path_factory.mktemp("any") / "a.h5ad"
    stored_as(path, dense, compression="gzip", chunks=(data.draw(st.integers(1, 50)),))
    wanted = np.array(sorted(data.draw(st.sets(st.integers(0, N - 1)))), dtype=np.int64)
    with Store(path) as store:
        rows, values = rows_of(store, wanted)
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_array_equal(values, dense[wanted])


def test_only_the_chunks_of_chosen_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 256)
    path = tmp_path / "a.h5ad"
    n, per_row = 400, 20
    csr = sp.csr_matrix(np.tile(np.arange(1, per_row + 1, dtype="float32"), (n, 1)))
    adata_of(csr).write_h5ad(path)
    with h5py.File(path, "a") as file:
        for name in ("data", "indices"):
            del file["X"][name]
            file["X"].create_dataset(name, data=getattr(csr, name), chunks=(5 * per_row,), compression="gzip")
    read = []
    inflate = vectors.RawVector._inflate
    monkeypatch.setattr(
        vectors.RawVector, "_inflate", lambda self, number, n: read.append((number, n)) or inflate(self, number, n)
    )
    with Store(path) as store:
        rows_of(store, np.array([0, 1, 203]))
    # Of 80 chunks each, two: of the first two rows of the first, of the fourth row of the 41st what precedes its end.
    assert sorted(read) == [(0, 40), (0, 40), (40, 80), (40, 80)]


@pytest.mark.parametrize("compression", ["gzip", None])
def test_damaged_data(tmp_path, dense, compression):
    path = tmp_path / "a.h5ad"
    stored_as(path, dense, compression=compression, chunks=(40,) if compression else None)
    with h5py.File(path) as file:
        data = file["X/data"].id
        address = data.get_chunk_info(1).byte_offset if compression else data.get_offset()
        size = data.get_chunk_info(1).size if compression else None
    if compression:
        with open(path, "r+b") as file:
            file.seek(address)
            file.write(b"\xff" * size)
        with Store(path) as store, pytest.raises(BadFileError, match="compressed chunk .* cannot be read"):
            rows_of(store)
    else:
        with Store(path) as store:
            matrix = open_matrix(store.matrix(), store.file)
            with open(path, "r+b") as file:
                file.truncate(address + 8)
            with pytest.raises(BadFileError, match="ends before its matrix does; the file is damaged"):
                list(map_blocks(matrix, lambda block: block))


def change_x(path, change) -> None:
    with h5py.File(path, "a") as file:
        change(file["X"])


def drop(name):
    def change(group):
        del group[name]

    return change


def swap(name, values):
    def change(group):
        del group[name]
        group[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.attrs.pop("encoding-type"), "stored as 'something unknown'"),
        (lambda x: x.attrs.__setitem__("encoding-type", "coo_matrix"), "stored as 'coo_matrix'"),
        (lambda x: x.attrs.pop("shape"), "stored as 'csr_matrix'"),
        (drop("indices"), "sparse matrix cannot be read"),
        (swap("indptr", np.arange(4)), "row pointers"),
        (swap("indptr", np.r_[np.zeros(N), 10**6].astype(int)), "row pointers"),
        (swap("data", np.array([b"a"] * 9)), "not numbers"),
    ],
)
def test_files_that_are_no_matrix(tmp_path, dense, change, match):
    path = tmp_path / "a.h5ad"
    stored_as(path, dense)
    change_x(path, change)
    with Store(path) as store, pytest.raises(BadFileError, match=match) as caught:
        open_matrix(store.matrix(), store.file)
    assert caught.value.remedy


def test_csc_that_names_rows_it_does_not_have(tmp_path, dense):
    path = tmp_path / "a.h5ad"
    adata_of(sp.csc_matrix(dense)).write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X/indices"][0] = N + 5
    with Store(path) as store, pytest.raises(BadFileError, match="row indices outside its shape"):
        rows_of(store)


def test_a_matrix_of_three_dimensions(tmp_path, dense):
    path = tmp_path / "a.h5ad"
    adata_of(dense).write_h5ad(path)
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = np.zeros((N, G, 2))
    with Store(path) as store, pytest.raises(BadFileError, match="has the shape"):
        open_matrix(store.matrix(), store.file)


def test_memory_decides_the_threads(tmp_path, dense, monkeypatch):
    path = tmp_path / "a.h5ad"
    adata_of(dense).write_h5ad(path)
    monkeypatch.setattr(module, "MEMORY", 1)

    def refuse(*args):
        raise AssertionError("threads were used")

    monkeypatch.setattr(module, "ThreadPoolExecutor", refuse)
    check(path, dense, threads=8)


def test_an_error_in_a_thread_is_raised(tmp_path, dense):
    path = tmp_path / "a.h5ad"
    adata_of(dense).write_h5ad(path)

    def fail(block):
        if block.rows[0] > 20:
            raise BadFileError("no", "yes")
        return 0

    with Store(path) as store, pytest.raises(BadFileError, match="no; yes"):
        list(map_blocks(open_matrix(store.matrix(), store.file), fail, None, 4))


def test_chosen_rows_of_large_chunks_are_read_in_spans_of_bounded_size():
    class Recorder:
        """A stored array of one chunk, as zarr makes them for a million cells."""

        dtype, shape, chunks = np.dtype("float32"), (1000,), (1000,)
        spans: list[int] = []

        def __getitem__(self, part):
            self.spans.append(part.stop - part.start)
            return np.arange(part.start, part.stop, dtype="float32")

    starts = np.arange(0, 1000, 15)
    found = vectors.open_vector(Recorder(), None).gather(starts, starts + 5)
    np.testing.assert_array_equal(found, (starts[:, None] + np.arange(5)).ravel())
    assert max(Recorder.spans) <= vectors.SPAN
    assert len(Recorder.spans) < len(starts)
