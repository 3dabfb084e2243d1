import re

import numpy as np
import pytest

from recipe.cello1.task.genes import (
    GENE_SETS,
    GeneNameError,
    clean_symbol,
    compile_patterns,
    gene_table,
    share_of_ensembl_ids,
)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("TBCE_ENSG00000285053", "TBCE"),
        ("Gm1_ENSMUSG00000000001", "Gm1"),
        (" CD3E ", "CD3E"),
        ("HLA-DRA", "HLA-DRA"),
        ("A_ENSEMBLE", "A_ENSEMBLE"),
        ("ENSG00000285053", "ENSG00000285053"),
        (None, ""),
        (float("nan"), ""),
        ("", ""),
    ],
)
def test_clean_symbol(name, symbol):
    assert clean_symbol(name) == symbol


def test_table_joins_columns_of_one_symbol_and_leaves_out_what_it_should():
    table = gene_table(["A", "B_ENSG00000000001", None, "MT-CO1", "B_ENSG00000000002"], ["^mt-"])
    assert table.names == ("A", "B")
    assert table.symbol.tolist() == [0, 1, -1, -1, 1]
    assert table.repeated.tolist() == [False, True]
    assert (table.n_excluded, table.n_unnamed) == (1, 1)
    assert table.symbol.dtype == np.int32


@pytest.mark.parametrize("gene", ["MT-CO1", "mt-Nd1", "RPL13A", "RPS4X", "RPS4Y1", "RPL22L1", "RPL36AL", "RPLP0"])
def test_housekeeping_has(gene):
    assert fits(gene)


@pytest.mark.parametrize(
    "gene", ["RPSA", "RPL21P28", "MALAT1", "NEAT1", "EEF1A1", "TMSB4X", "B2M", "MTRNR2L12", "Rps2"]
)
def test_housekeeping_has_too(gene):
    assert fits(gene)


@pytest.mark.parametrize("gene", ["RPS6KA1", "RPS19BP1", "MTOR", "MT1X", "CD3E", "ACTA2", "FTCD", "UBASH3A", "RPLX"])
def test_housekeeping_has_not(gene):
    assert not fits(gene)


def fits(gene: str) -> bool:
    return any(pattern.search(gene) for pattern in compile_patterns(["housekeeping"]))


def test_every_shipped_pattern_compiles():
    for patterns in GENE_SETS.values():
        for pattern in patterns:
            re.compile(pattern)


def test_a_pattern_that_is_none():
    with pytest.raises(ValueError, match=r"--exclude-genes '\(' is not a regular expression .*for example"):
        compile_patterns(["("])


@pytest.mark.parametrize(
    ("names", "exclude", "match"),
    [
        (["A, B", "C"], (), "separates the genes"),
        (["A\nB"], (), "line break"),
        (["A", "B"], ["."], "all of its genes are left out"),
        ([None, ""], (), "none of its genes has a name"),
    ],
)
def test_names_that_cannot_be_used(names, exclude, match):
    with pytest.raises(GeneNameError, match=match) as caught:
        gene_table(names, exclude)
    assert caught.value.remedy


def test_share_of_ensembl_ids():
    assert share_of_ensembl_ids(["ENSG00000000003", "ENSMUSG00000000001.4", "CD3E", "ENSA"]) == 0.5
