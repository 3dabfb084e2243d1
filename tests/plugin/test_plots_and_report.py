import re

import matplotlib
import pytest
import scanpy as sc
from matplotlib.figure import Figure

import scverse_plugin
from scverse_plugin._report._genes import Finder
from tests.helpers.toy_adata import TYPES, FakeEngine, toy

PLOTS = {
    "votes": lambda adata, **kw: scverse_plugin.pl.votes(adata, **kw),
    "support": lambda adata, **kw: scverse_plugin.pl.support(adata, **kw),
    "confusion": lambda adata, **kw: scverse_plugin.pl.confusion(adata, "truth", **kw),
    "umap": lambda adata, **kw: scverse_plugin.pl.umap(adata, **kw),
}


@pytest.fixture(scope="module")
def done():
    adata = toy()
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=FakeEngine(), progress=False)
    return adata


@pytest.fixture
def figdir(tmp_path):
    before = sc.settings.figdir  # a property that cannot be deleted, as monkeypatch would
    sc.settings.figdir = tmp_path
    yield
    sc.settings.figdir = before


@pytest.fixture(autouse=True)
def closed():
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", PLOTS)
def test_plots_keep_to_the_convention(done, name, tmp_path, figdir):
    before = set(done.uns)
    assert isinstance(PLOTS[name](done, return_fig=True), Figure)
    axes = PLOTS[name](done, show=False, save="_x.png")
    assert (tmp_path / f"cello1_{name}_x.png").stat().st_size > 1000
    assert (len(axes) == 2) if name == "umap" else axes.figure
    assert PLOTS[name](done, show=True) is None
    given = matplotlib.pyplot.subplots(1, 2)[1]
    found = PLOTS[name](done, ax=given if name == "umap" else given[0])
    assert (found[0] if name == "umap" else found) is given[0]
    assert set(done.uns) == before  # drawing does not change the object


def test_heatmap_shows_the_support(done):
    ax = scverse_plugin.pl.votes(done, show=False)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1", "2", "3"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == sorted(TYPES)
    assert ax.images[0].get_array().tolist() == scverse_plugin.get.cello1_df(done, table="votes").to_numpy().tolist()


def test_plots_name_what_is_missing(done):
    with pytest.raises(ValueError, match=r"reference: adata.obs has no column 'x'; it has \['truth'"):
        scverse_plugin.pl.confusion(done, "x")
    with pytest.raises(ValueError, match=r"basis: adata.obsm has no 'tsne' or 'X_tsne'; compute it first"):
        scverse_plugin.pl.umap(done, basis="tsne")
    with pytest.raises(ValueError, match="ax must be two axes"):
        scverse_plugin.pl.umap(done, ax=[matplotlib.pyplot.gca()])
    with pytest.raises(ValueError, match="table must be one of groups, votes, traces, got 'x'"):
        scverse_plugin.get.cello1_df(done, table="x")


def test_report_is_self_contained_and_escaped(done, tmp_path):
    path = scverse_plugin.report(done, tmp_path / "a.html")
    html = path.read_text()
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", html)
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html  # what the scripted model says
    assert "<span class=invented>FOXP3</span>" in html
    assert re.search(r"<span class=listed>(MS4A1|NKG7|CD3D|LYZ)</span>", html)
    assert html.count("data:image/png;base64,") == 3
    for name in TYPES:
        assert f": {name}</h2>" in html
    with pytest.raises(ValueError, match="must end in .html"):
        scverse_plugin.report(done, tmp_path / "a.txt")


def test_report_without_reasoning_and_without_answers(tmp_path):
    adata = toy()
    engine = FakeEngine(lambda puzzle: "<script>alert(1)</script>")
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=engine, progress=False)
    html = scverse_plugin.report(adata, tmp_path / "a.html").read_text()
    assert "<script" not in html and "no_votes" in html
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=engine, progress=False, store_reasoning=False)
    assert "reasoning" not in adata.uns["cello1"]["traces"]
    assert "no_votes" in scverse_plugin.report(adata, tmp_path / "a.html").read_text()


def test_genes_of_a_reasoning():
    text = "CD3D and FOXP3, with HLA-DRA.1; a cat, CD8 T cell, NK cell, XYZ12 and MARCH1. Cell 2: B2M"
    found = list(Finder({"CD3D", "B2M", "FOXP3", "cat", "HLA-DRA.1", "NK"}, ["NK cell", "T"])(text, {"CD3D", "B2M"}))
    assert [(m.gene, m.in_prompt) for m in found] == [
        ("CD3D", True),
        ("FOXP3", False),
        ("HLA-DRA.1", False),
        ("XYZ12", False),
        ("MARCH1", False),
        ("B2M", True),
    ]
    assert all(text[m.start : m.stop] == m.gene for m in found)


@pytest.mark.parametrize(
    "word", ["ALB", "INS", "GCG", "GNLY", "CD19", "CD3E", "CD8A", "Cd3d", "Lyz", "C1orf56", "HLA-DRA"]
)
def test_genes_that_the_data_lack_are_marked_too(word):
    found = list(Finder({"LYZ", "CST3"}, ["NK cell"])(f"The cell has {word}, a marker.", {"CST3"}))
    assert [(m.gene, m.in_prompt) for m in found] == [(word, False)]


def test_plain_words_are_no_genes():
    text = "NOT a T cell: CD8 and CD45RO, MHC, TCR and RNA. Was the Cell2 of COVID-19 type Th17? THE BEST. IgG, DNA, NK"
    assert not list(Finder({"LYZ", "CST3", "cat"}, ["NK cell"])(text, {"CST3"}))


def test_report_counts_the_genes_that_are_made_up(done, tmp_path):
    html = scverse_plugin.report(done, tmp_path / "a.html").read_text()
    # The scripted model names one listed gene and FOXP3 in each of ten puzzles.
    assert html.count("10 of 20 genes in the reasoning are not in the prompt") == len(TYPES)
