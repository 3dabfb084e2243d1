"""Top-k over blocks: exact, with the tie rule, against a naive sort and against recipe.cello1.task.genes."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from recipe.cello1.data.expression.matrix import Block
from recipe.cello1.data.expression.selection import SPOILED, column_sums, top_symbols
from recipe.cello1.data.expression.store import BadFileError
from recipe.cello1.task.gene_names import gene_table
from recipe.cello1.task.genes import top_genes

DTYPES = ["float32", "float64"]  # matrix.py turns all others into these
FEW = st.integers(0, 3)  # so that ties are the rule


def block_of(matrix: np.ndarray, kind: str) -> Block:
    rows = np.arange(len(matrix))
    if kind == "dense":
        return Block(rows, matrix)
    csr = sp.csr_array(matrix)
    return Block(rows, csr.data, csr.indices, csr.indptr.astype(np.int64))


def listed(matrix, names, n_top, kind="sparse", exclude=(), weights=None) -> list[tuple[str, ...]]:
    genes = gene_table(names, exclude)
    ids, counts = top_symbols(block_of(matrix, kind), genes, n_top, weights)
    assert ((ids >= 0).sum(axis=1) == counts).all()
    return [tuple(genes.names[i] for i in row[:count]) for row, count in zip(ids, counts, strict=True)]


def naive(matrix, names, n_top) -> list[tuple[str, ...]]:
    """Sort all columns by value, then by place; each name once; no zeros."""
    found = []
    for row in matrix.tolist():
        order = sorted(range(len(row)), key=lambda column: (-row[column], column))
        once = dict.fromkeys(names[column] for column in order if row[column] > 0)
        found.append(tuple(once)[:n_top])
    return found


@st.composite
def matrices(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=40))
    elements = st.one_of(FEW.map(float), st.floats(0, 1e6, width=32 if dtype == "float32" else 64))
    return draw(arrays(dtype, shape, elements=elements))


@given(matrices(), st.integers(1, 12), st.sampled_from(["sparse", "dense"]))
@pytest.mark.slow
def test_equals_a_naive_sort(matrix, n_top, kind):
    names = [f"G{i}" for i in range(matrix.shape[1])]
    assert listed(matrix, names, n_top, kind) == naive(matrix, names, n_top)


@given(matrices(), st.integers(1, 5), st.sampled_from(["sparse", "dense"]), st.data())
def test_a_repeated_symbol_counts_once_with_its_largest_value(matrix, n_top, kind, data):
    names = data.draw(st.lists(st.sampled_from("ABCDEF"), min_size=matrix.shape[1], max_size=matrix.shape[1]))
    assume(len(names) <= 20 * len(set(names)))  # more columns a symbol are refused: see test_gene_names.py
    assert listed(matrix, names, n_top, kind) == naive(matrix, names, n_top)


@given(matrices(), st.integers(1, 12))
def test_equals_the_selection_for_matrices_in_memory(matrix, n_top):
    names = [f"G{i}" for i in range(matrix.shape[1])]
    assert listed(matrix, names, n_top) == top_genes(matrix, names, n_top)


@given(matrices(), st.integers(1, 5), st.sampled_from(["sparse", "dense"]))
def test_excluded_genes_make_room_for_the_next(matrix, n_top, kind):
    names = [f"{'XY'[i % 2]}{i}" for i in range(matrix.shape[1])]
    kept = [i for i, name in enumerate(names) if name[0] == "X"]
    assert listed(matrix, names, n_top, kind, exclude=["^Y"]) == naive(matrix[:, kept], [names[i] for i in kept], n_top)


def counts(rng) -> np.ndarray:
    return rng.poisson(rng.gamma(0.5, 2, 1500), size=(4, 1500))


def clumped(rng) -> np.ndarray:
    """Large values at places that are dealt to the same few groups, so that the bound on them says little."""
    values = rng.random((4, 1500))
    values[:, np.arange(1500) % 80 < 20] += 1
    return values


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["sparse", "dense"]),
    st.booleans(),
    st.sampled_from([counts, lambda rng: rng.random((4, 1500)), clumped, lambda rng: np.ones((4, 1500))]),
    st.sampled_from([1, 50, 200, 400]),
)
def test_long_rows_where_most_entries_need_no_look(seed, kind, repeats, draw, n_top):
    matrix = draw(np.random.default_rng(seed)).astype("float32")
    names = [f"G{i % 1400 if repeats else i}" for i in range(1500)]
    assert listed(matrix, names, n_top, kind) == naive(matrix, names, n_top)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_weights_decide_the_order(kind):
    matrix = np.array([[3.0, 2.0, 1.0, 0.0]])
    assert listed(matrix, "ABCD", 3, kind, weights=np.array([1.0, 1.0, 9.0, 9.0])) == [("C", "A", "B")]


def test_stored_zeros_are_not_expressed():
    block = Block(np.arange(1), np.array([0.0, 2.0]), np.array([0, 2], dtype="int32"), np.array([0, 2]))
    genes = gene_table("ABC")
    ids, counts = top_symbols(block, genes, 3)
    assert ids.tolist() == [[2, -1, -1]]
    assert counts.tolist() == [1]


def test_unordered_and_repeated_entries_are_put_in_order_and_added_up():
    columns = np.array([2, 0, 2, 1, 0], dtype="int32")
    block = Block(np.arange(2), np.array([1.0, 5.0, 2.0, 3.0, 1.0]), columns, np.array([0, 3, 5]))
    ids, _ = top_symbols(block, gene_table("ABC"), 3)
    assert ids.tolist() == [[0, 2, -1], [1, 0, -1]]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_negative_values_cannot_be_ranked(kind):
    matrix = np.array([[1.0, 2.0], [-1.0, 2.0]], dtype="float32")
    with pytest.raises(BadFileError, match="negative value in row 1") as caught:
        listed(matrix, "AB", 2, kind)
    assert "layer= or use_raw=True" in caught.value.remedy
    with pytest.raises(BadFileError, match="negative value"):
        column_sums(block_of(matrix, kind), 2)


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_marked(kind, value):
    matrix = np.array([[1.0, 2.0], [value, 2.0], [3.0, 1.0]], dtype="float32")
    ids, counts = top_symbols(block_of(matrix, kind), gene_table("AB"), 2)
    assert counts.tolist() == [2, SPOILED, 2]
    assert ids[[0, 2]].tolist() == [[1, 0], [0, 1]]
    sums, n_cells = column_sums(block_of(matrix, kind), 2)
    assert (sums.tolist(), n_cells) == ([4.0, 3.0], 2)


@pytest.mark.parametrize("columns", [[0, 7], [-1, 1], [7, 0]])
def test_columns_that_do_not_exist(columns):
    block = Block(np.arange(1), np.ones(2), np.array(columns, dtype="int32"), np.array([0, 2]))
    with pytest.raises(BadFileError, match="a gene index outside its shape"):
        top_symbols(block, gene_table("ABC"), 2)
    with pytest.raises(BadFileError, match="a gene index outside its shape"):
        column_sums(block, 3)


@given(matrices())
def test_column_sums(matrix):
    expected = matrix.astype(float).sum(axis=0)
    for kind in ("sparse", "dense"):
        sums, n_cells = column_sums(block_of(matrix, kind), matrix.shape[1])
        np.testing.assert_allclose(sums, expected)
        assert n_cells == len(matrix)
