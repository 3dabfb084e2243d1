import re

import numpy as np
import pytest

from recipe.cello1.task.gene_names import (
    GENE_SETS,
    GeneNameError,
    are_row_numbers,
    clean_symbol,
    compile_patterns,
    gene_table,
    specificity,
    symbol_fault,
)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("TBCE_ENSG00000285053", "TBCE"),
        ("Gm1_ENSMUSG00000000001", "Gm1"),
        (" CD3E ", "CD3E"),
        ("HLA-DRA", "HLA-DRA"),
        ("TBCE-ENSG00000285053", "TBCE"),
        ("TBCE.ENSG00000285053.2", "TBCE"),
        ("TBCE (ENSG00000285053)", "TBCE"),
        ("TBCE:ENST00000285053", "TBCE"),
        ("HLA-A ENSG00000285053", "HLA-A"),
        ("A_ENSEMBLE", "A_ENSEMBLE"),
        ("A.ENSA", "A.ENSA"),
        ("CD\u200b3E\ufeff", "CD3E"),
        ("\u00b5G", "\u03bcG"),
        ("nan", ""),
        ("<NA>", ""),
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
    with pytest.raises(ValueError, match=r"exclude_genes: '\(' is not a regular expression .*for example"):
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


GENES = [f"GENE{i}" for i in range(100)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{i}", "100 of 100 gene names are numbers, such as row numbers or Entrez ids (0), not symbols"),
        ("{i}.0", "numbers"),
        ("ENSG{i:011d}.2", "Ensembl ids (ENSG00000000000.2)"),
        ("ENST{i:011d}", "Ensembl ids"),
        ("ensmusg{i:011d}", "Ensembl ids"),
        ("ENSG{i:011d}_PAR_Y", "Ensembl ids"),
        ("FBgn{i:07d}", "FlyBase"),
        ("WBGene{i:08d}", "WormBase"),
        ("NM_{i:06d}.3", "ids of a data base"),
        ("MGI:{i}", "ids of a data base"),
        ("{i}_s_at", "probe ids"),
        ("ILMN_{i:07d}", "probe ids"),
        ("chr1:{i}00-{i}500", "positions in the genome"),
        ("chrX_{i}00_{i}500", "positions in the genome"),
        ("KI270728.1-{i}00-{i}500", "positions in the genome"),
        ("CCDS{i}.1", "ids of a data base"),
        ("Hs.{i}", "ids of a data base"),
        ("entrez_{i}", "ids of a data base"),
        ("P{i:05d}", "names of proteins"),
        ("CD{i}_HUMAN", "names of proteins"),
        ("GRCh38_CD{i}", "symbols behind the name of a genome"),
        ("mm10___Cd{i}", "symbols behind the name of a genome"),
        ("b'CD{i}'", "names in quotes"),
        ('"CD{i}"', "names in quotes"),
        ("feature_{i}", "only number the columns"),
        ("Peak{i}", "only number the columns"),
        ("pc_{i}", "only number the columns"),
        ("{i}e+05", "numbers"),
        ("chr1 {i}00 {i}500", "positions in the genome"),
        ("chr1:{i},000-{i},500", "positions in the genome"),
        ("V{i}", "the 100 gene names only number the columns (V0), not symbols"),
        ("GRCh38_ENSG{i:011d}", "come to 1 symbols (GRCh38_ENSG00000000000 to GRCh38)"),
        ("mm10___ENSMUSG{i:011d}", "come to 1 symbols"),
        ("gene", "100 gene names come to 1 symbols"),
    ],
)
def test_names_that_are_no_symbols(name, said):
    names = [name.format(i=i) for i in range(100)]
    assert said in symbol_fault(names)
    if "come to" not in said and "only number" not in said:
        assert said.split(" of ")[-1][4:] in symbol_fault([*names, *GENES[:40], None, ""])
    with pytest.raises(GeneNameError, match="not symbols|come to") as caught:
        gene_table(names, others=[("n", list(range(100))), ("chr", ["1", "2"] * 50), ("hgnc", GENES), ("id", names)])
    assert caught.value.column == "hgnc"
    with pytest.raises(GeneNameError) as caught:
        gene_table(names, others=[("id", names)])
    assert caught.value.column == ""


@pytest.mark.parametrize(
    "names",
    [
        GENES,
        ["TP53", "RP11-34P13.7", "AC007325.4", "HLA-DRB1", "7SK", "5S_rRNA", "LOC105376575", "MIR1-1", "H2-K1"],
        [*GENES, *[f"ENSG{i:011d}" for i in range(90)]],  # CELLxGENE has the id where there is no symbol
        ["X0"],
        ["X0", "Y1", "X2"],
        [f"GENE{i}_ENSG{i:011d}" for i in range(100)],
        [f"{gene}-{i}" for gene in GENES[:30] for i in range(5)],
        [],
        [None, ""],
    ],
)
def test_names_that_are_symbols(names):
    assert symbol_fault(names) == ""


def test_mouse_symbols_are_written_as_human_ones_on_request():
    names = ["Ins1", "Gcg", float("nan"), "H2.K1", "H2-D1", "mt-Co1", "INS1"]
    table = gene_table(names, ["^MT-"], capitals=True)
    assert table.names == ("INS1", "GCG", "H2-K1", "H2-D1")
    assert table.symbol.tolist() == [0, 1, -1, 2, 3, -1, 0]
    assert gene_table(["Ins1", "Gcg"]).names == ("Ins1", "Gcg")


def test_names_that_r_changed_are_mended():
    names = ["HLA.A", "HLA.DRB1", "MT.CO1", "NKX2.1", "RP11.34P13.7", "AC007325.4", "TP53", "KRTAP5.AS1"]
    table = gene_table(names)
    assert table.names == ("HLA-A", "HLA-DRB1", "MT-CO1", "NKX2-1", "RP11-34P13.7", "AC007325.4", "TP53", "KRTAP5-AS1")
    assert table.notes == ["6 gene names that R had changed are mended (HLA.A is HLA-A)"]


def test_dots_beside_hyphens_are_dots():
    names = ("HLA-A", "RP11-34P13.7", "AC007325.4", "A.B", "MT-CO1")
    assert gene_table(names).names == names
    assert gene_table([*names, "HLA.B"]).names == (*names, "HLA-B")
    assert gene_table(["AC007325.4", "A.B"]).names == ("AC007325.4", "A.B")


def test_repeats_that_were_made_unique_are_remarked_upon():
    table = gene_table(["TBCE", "TBCE-1", "TBCE-2", "MIR1-1", "NKX2-1"])
    assert len(table.names) == 5
    assert table.notes == [
        "2 gene names look like repeats made unique (TBCE-1 beside TBCE): they count as genes of their own"
    ]


def test_repeats_that_r_made_unique_are_remarked_upon_too():
    assert gene_table(["TBCE", "TBCE.1", "AC007325.4"]).notes[0].startswith("1 gene names look like repeats")


@pytest.mark.parametrize("n_ids", [0, 50, 1_500])
def test_ids_among_symbols_are_remarked_upon(n_ids):
    table = gene_table([f"AB{i}" for i in range(2 * n_ids or 9)] + [f"ENSG{i:011d}" for i in range(n_ids)])
    assert table.ids == pytest.approx(1 / 3 if n_ids else 0, abs=0.03)  # of many by a sample
    note = f"{table.ids:.0%} of the gene names are ids, not symbols: they are listed as they are"
    assert table.notes == [note] * bool(n_ids)


@pytest.mark.parametrize(("first", "said"), [(0, True), (1, True), (2, False)])
def test_row_numbers(first, said):
    assert are_row_numbers([str(i) for i in range(first, first + 9)]) is said
    assert not are_row_numbers(["0", "2"])


def test_specificity():
    assert specificity(np.array([2.0, 6.0]), 2).tolist() == [1 / 3, 1 / 5]
    assert specificity(np.zeros(2), 0).tolist() == [1, 1]


def test_of_many_names_those_of_a_kind_are_counted_whatever_their_order():
    names = [f"AB{i}" if i % 3 else f"ENSG{i:011d}" for i in range(6_000)]
    assert symbol_fault(names) == ""
    names = [f"AB{i}" if i % 3 == 0 else f"ENSG{i:011d}" for i in range(6_000)]
    assert symbol_fault(names).startswith("4,000 of 6,000 gene names are Ensembl ids")


@pytest.mark.parametrize("start", ["rna_", "gene:", "Human-"])
def test_symbols_behind_one_word_are_none(start):
    letters = [f"{a}{b}X" for a in "ABCD" for b in "EFGH"]
    assert f"16 of 16 gene names begin with '{start}'" in symbol_fault([start + text for text in letters])
    assert symbol_fault([*letters, *(start + text for text in letters)]) == ""
    assert symbol_fault([start + text for text in letters[:8]]) == ""  # as few as a panel of HLA-A, HLA-B ... has
    assert "FlyBase, WormBase or TAIR ids" in symbol_fault([f"AT1G{i:05d}" for i in range(16)])
