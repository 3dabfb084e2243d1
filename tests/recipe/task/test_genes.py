import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recipe.cello1.task.genes import expression, top_genes

NAMES = ["A", "B", "C", "D"]
FORMATS = {
    "dense": np.asarray,
    "csr_matrix": sp.csr_matrix,
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "coo_array": sp.coo_array,
}


def plain_top(row, names, n_top):
    """The definition, word for word."""
    expressed = [(-float(value), position) for position, value in enumerate(row) if value > 0]
    return tuple(names[position] for _, position in sorted(expressed)[:n_top])


@pytest.mark.parametrize("convert", FORMATS.values(), ids=FORMATS.keys())
def test_descending_ties_in_column_order_zeros_never(convert):
    matrix = np.array([[1.0, 3.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
    found = top_genes(convert(matrix), NAMES, 2)
    assert found == [("B", "D"), ("A", "B"), (), ("B", "D")]
    assert top_genes(convert(matrix), NAMES, None)[0] == ("B", "D", "A")


@given(
    st.integers(1, 6).flatmap(
        lambda n: hnp.arrays(
            st.sampled_from([np.dtype("uint8"), np.dtype("int32"), np.dtype("float32"), np.dtype("float64")]),
            st.tuples(st.integers(0, 5), st.just(n)),
            elements=st.integers(0, 3),
        )
    ),
    st.one_of(st.none(), st.integers(1, 7)),
)
def test_every_format_gives_what_the_definition_says(matrix, n_top):
    names = [f"G{i}" for i in range(matrix.shape[1])]
    expected = [plain_top(row, names, n_top) for row in matrix]
    for convert in FORMATS.values():
        assert top_genes(convert(matrix), names, n_top) == expected


def test_unordered_and_repeated_entries_of_a_sparse_matrix_are_understood_and_left_alone():
    matrix = sp.csr_array((np.array([1.0, 1.0, 1.0, 3.0]), np.array([3, 1, 1, 0]), np.array([0, 4])), shape=(1, 4))
    before = matrix.data.copy(), matrix.indices.copy()
    assert top_genes(matrix, NAMES, 3) == [("A", "B", "D")]
    assert np.array_equal(matrix.data, before[0])
    assert np.array_equal(matrix.indices, before[1])


def test_names_are_plain_strings():
    found = top_genes(np.ones((1, 2)), np.array(["A", "B"]), 2)
    assert all(type(name) is str for name in found[0])


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (-0.5, "negative values.*use_raw=")],
)
def test_unusable_values(convert, value, message):
    with pytest.raises(ValueError, match=message):
        top_genes(convert(np.array([[1.0, value]])), ["A", "B"], 2)


@pytest.mark.parametrize("n_top", [0, -1, 1.5, True, "3"])
def test_unusable_n_top(n_top):
    with pytest.raises(ValueError, match="n_top must be a positive integer"):
        top_genes(np.ones((1, 2)), ["A", "B"], n_top)


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for 2 gene names"):
        top_genes(np.ones((2, 3)), ["A", "B"], 1)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        top_genes(np.ones(3), ["A", "B", "C"], 1)


def test_repeated_gene_names_are_refused():
    with pytest.raises(ValueError, match="var_names_make_unique"):
        top_genes(np.ones((1, 2)), ["A", "A"], 1)


def test_text_is_no_expression():
    with pytest.raises(ValueError, match="must hold numbers"):
        top_genes(np.array([["a", "b"]]), ["A", "B"], 1)


class TestExpression:
    @pytest.fixture
    def adata(self):
        anndata = pytest.importorskip("anndata")
        adata = anndata.AnnData(np.array([[1.0, 0.0, 2.0]], dtype=np.float32))
        adata.var_names = ["A", "B", "C"]
        adata.raw = adata.copy()
        adata = adata[:, :2].copy()
        adata.layers["counts"] = sp.csr_matrix(np.array([[0.0, 7.0]], dtype=np.float32))
        return adata

    def test_takes_what_is_asked_for(self, adata):
        assert top_genes(*expression(adata), 3) == [("A",)]
        assert top_genes(*expression(adata, use_raw=True), 3) == [("C", "A")]
        assert top_genes(*expression(adata, layer="counts"), 3) == [("B",)]

    def test_says_what_is_missing(self, adata):
        with pytest.raises(ValueError, match=r"no layer 'x'; it has \['counts'\]"):
            expression(adata, layer="x")
        with pytest.raises(ValueError, match="choose one"):
            expression(adata, layer="counts", use_raw=True)
        adata.raw = None
        with pytest.raises(ValueError, match="raw is None; set use_raw=False"):
            expression(adata, use_raw=True)
        adata.X = None
        with pytest.raises(ValueError, match=r"X is None; name a layer instead, it has \['counts'\]"):
            expression(adata)
