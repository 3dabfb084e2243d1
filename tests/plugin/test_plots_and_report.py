import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import scverse_plugin
from recipe.cello1.task.answer import format_answer
from scverse_plugin._report._genes import Finder
from tests.helpers.browser import layouts
from tests.helpers.project import project_files
from tests.helpers.toy_adata import MARKERS, TYPES, FakeEngine, toy

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(ValueError, match="table must be one of groups, votes, traces, models, got 'x'"):
        scverse_plugin.get.cello1_df(done, table="x")


def test_report_is_self_contained_and_escaped(done, tmp_path):
    path = scverse_plugin.report(done, tmp_path / "a.html")
    html = path.read_text()
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+|http-equiv", "", html)
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html  # what the scripted model says
    assert '<span class="invented">FOXP3</span>' in html
    assert re.search(r'<span class="listed">(MS4A1|NKG7|CD3D|LYZ)</span>', html)
    assert html.count("data:image/png;base64,") == 3
    for name in TYPES:
        assert f": {name}</h3>" in html
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


# ------------------------------------------------------------------------------------------------------------- at size


@pytest.fixture(scope="module")
def large():
    """1,000 groups with long names; the answers are long, too."""
    rng = np.random.default_rng(0)
    genes = [f"GENE{i}" for i in range(500)]
    obs = pd.DataFrame(
        {"g": pd.Categorical([f"cluster {i} of the large atlas" for i in range(1000)]), "tissue": "blood"},
        index=[f"c{i}" for i in range(1000)],
    )
    values = sp.csr_matrix(rng.poisson(0.5, (1000, 500)).astype(np.float32))
    adata = AnnData(values, obs=obs, var=pd.DataFrame(index=genes))
    types = [f"CD{i}-positive, alpha-beta memory T cell of the mucosa" for i in range(12)]

    def answer(puzzle):
        told = [
            f"Cell {i} has {', '.join(cell)} and FOXP3, as is known of such cells"
            for i, cell in enumerate(puzzle.cells)
        ]
        return format_answer(rng.permutation(puzzle.candidates)[: puzzle.n_cells].tolist(), "\n".join(told))

    scverse_plugin.tl.annotate(adata, types, groupby="g", engine=FakeEngine(answer), progress=False, n_votes=4)
    return adata


@pytest.mark.slow
def test_report_of_a_thousand_groups_stays_small(large, tmp_path):
    path = scverse_plugin.report(large, tmp_path / "a.html")
    assert path.stat().st_size < 3_000_000
    html = path.read_text()
    links, anchors = (set(re.findall(pattern, html)) for pattern in (r'href="#([^"]+)"', r'id="([^"]+)"'))
    assert links <= anchors and {f"g{i}" for i in range(1000)} <= links and "puzzles" in links
    assert html.count("</h3>") == 1000 and "cluster 999 of the large atlas" in html
    shown = len(re.findall(r'id="p\d+"', html))
    left = int(re.search(r"(\d+) further puzzles are in the object", html)[1])
    assert shown > 50 and shown + left == int(large.uns["cello1"]["checks"]["n_puzzles"])
    assert "The first 50 of 1000 groups" in html


def test_report_is_a_page_for_everyone(done, tmp_path):
    html = scverse_plugin.report(done, tmp_path / "a.html").read_text()
    assert '<html lang="en">' in html and '<meta name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html and '<nav aria-label="Contents">' in html
    assert '<th scope="col" class="l">group' in html and html.count('<th scope="row">') == 4
    alts = re.findall(r'<img alt="([^"]*)"', html)
    assert len(alts) == 3 and all(len(alt) > 60 for alt in alts)
    assert "4 of 4 groups have a label. The highest support, 1.00, is that of 0 for B cell." in alts[0]
    assert "Most frequent: B cell 20, NK cell 20" in alts[2]


def test_headlines_come_first_then_the_contents_then_the_groups(done, tmp_path):
    html = scverse_plugin.report(done, tmp_path / "a.html").read_text()
    shown = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", html)
    assert shown == [("groups with a label", "4 of 4"), ("support", "1.00"), ("puzzles", "10")]
    order = [html.index(each) for each in ("</dl>", "<nav", 'id="overview"', "<img", 'id="groups"', 'id="parameters"')]
    assert order == sorted(order)
    links = re.search("<nav.*?</nav>", html, re.DOTALL)[0]
    assert re.findall(r'href="#(\w+)"', links) == re.findall(r'<h2 id="(\w+)"', html)


def test_both_reports_have_one_frame():
    """The plugin's and the evaluation's template extend the same one, and write no page of their own."""
    from scverse_plugin._report._html import TEMPLATE

    evaluation = ROOT / "recipe" / "cello1" / "evaluation" / "evaluation.html.j2"
    for path in (TEMPLATE, evaluation):
        text = path.read_text(encoding="utf-8")
        assert text.startswith('{% extends "page.html.j2" %}') and "<html" not in text and "| safe" not in text
    pages = [path for path in project_files() if path.suffix in (".py", ".j2") and "<!doctype" in path.read_text()]
    assert [path.name for path in pages if "tests" not in path.parts] == ["page.html.j2"]


def test_report_is_not_wider_than_the_window(done, large, tmp_path):
    long = done.copy()
    groups = long.uns["cello1"]["groups"]
    groups.loc["0", "group"] = "a_name_without_any_blank_" * 8
    groups.loc["1", "label"] = groups.loc["2", "runner_up"] = "CD4-positive, CD8-negative, " * 4 + "thymocyte"
    pages = [scverse_plugin.report(adata, tmp_path / f"{i}.html") for i, adata in enumerate((long, large))]
    wide = tmp_path / "wide.html"
    for width in (400, 1280):
        wide.write_text(f"<p style='width:{width + 50}px'>wide")
        *found, seen = layouts([*pages, wide], width, tmp_path)
        assert [(each["over"], each["shrunk"]) for each in found] == [(0, 1)] * 2
        assert all(each["tall"] < 400 and 0 < each["head"] < 0.4 for each in found)
        assert seen["over"] > 0  # what the test can see


def test_plots_of_many_groups_have_pages(large):
    for draw in (scverse_plugin.pl.support, scverse_plugin.pl.votes):
        ax = draw(large, show=False)
        assert len(ax.get_yticks()) == 50 and ax.figure.get_size_inches()[1] < 30
        last = draw(large, page=20, show=False)
        assert last.get_yticklabels()[-1].get_text() == "cluster 999 of the large atlas"
        assert "rows 951 to 1000 of 1000" in last.get_title() + last.get_title(loc="left")
        with pytest.raises(ValueError, match=r"page must be a number from 1 to 20 \(50 rows each\), got 21"):
            draw(large, page=21)


def test_labels_stand_outside_the_axes(large):
    ax = scverse_plugin.pl.support(large, show=False)
    ax.figure.draw_without_rendering()
    inside = ax.get_window_extent()
    whole = ax.figure.bbox
    for text in ax.texts:
        box = text.get_window_extent()
        assert inside.x1 <= box.x0 and box.x1 <= whole.x1 + 1


LONG = [
    "CD8-positive, alpha-beta memory T cell, CD45RO-positive",
    "effector memory CD4-positive, alpha-beta T cell, terminally differentiated",
    "conventional dendritic cell",
    "central memory CD4-positive, alpha-beta T cell",
]


@pytest.fixture(scope="module")
def long():
    """Groups and types with names of Cell Ontology length; the first group has no label."""
    adata = toy()
    adata.obs["truth"] = adata.obs["truth"].cat.rename_categories(dict(zip(TYPES, LONG, strict=True)))
    adata.obs["leiden"] = adata.obs["truth"]
    known = {MARKERS[short]: name for short, name in zip(TYPES, LONG, strict=True)}

    def answer(puzzle):
        names = [next(known[gene] for gene in cell if gene in known) for cell in puzzle.cells]
        return "nonsense" if LONG[0] in names else format_answer(names)

    engine = FakeEngine(answer)
    scverse_plugin.tl.annotate(adata, LONG, groupby="leiden", engine=engine, progress=False, puzzle_size=1)
    return adata


def texts_of(figure):
    """Every text that a figure shows."""
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("name", PLOTS)
def test_long_names_stay_inside_the_figure_and_every_text_can_be_read(name, style, long):
    with matplotlib.pyplot.style.context(style):
        figure = PLOTS[name](long, return_fig=True)
        figure.draw_without_rendering()
        whole, shown = figure.bbox, texts_of(figure)
        assert {LONG[1], LONG[2], LONG[3]} <= {text.get_text().removesuffix(" (ok)") for text in shown}
        for text in shown:
            box = text.get_window_extent()
            inside = box.x0 > -2 and box.x1 < whole.x1 + 2 and box.y0 > -2 and box.y1 < whole.y1 + 2
            assert inside, text.get_text()
            if text not in figure.axes[0].texts or name == "support":  # those of a heatmap stand on its cells
                assert abs(light(text.get_color()) - light(figure.get_facecolor())) > 0.5, text.get_text()


def light(colour):
    return sum(to_rgb(colour)) / 3


def test_numbers_of_a_heatmap_stand_out_from_their_cells(long):
    for style in ("default", "dark_background"):
        with matplotlib.pyplot.style.context(style):
            ax = scverse_plugin.pl.votes(long, show=False)
        assert len(ax.texts) == 3
        for text in ax.texts:
            column, row = map(int, text.get_position())
            image = ax.images[0]
            cell = image.cmap(image.norm(image.get_array()[row, column]))[:3]
            assert abs(light(text.get_color()) - light(cell)) > 0.4


def test_groups_without_a_label_are_grey(long):
    ax = scverse_plugin.pl.support(long, show=False)
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    colours = [bar.get_facecolor()[:3] for bar in ax.containers[0]]
    grey = to_rgb("lightgrey")
    assert [name for name, colour in zip(names, colours, strict=True) if colour == grey] == [LONG[0]]
    assert "(no_votes)" in [text.get_text() for text in ax.texts]


HOSTILE = ["$x^$", "a_$b", "\\frac{", "T $\\alpha$ cell"]


def test_names_are_no_formulas(tmp_path, figdir):
    adata = toy()
    adata.obs["leiden"] = adata.obs["leiden"].cat.rename_categories(dict(zip("0123", HOSTILE, strict=True)))
    adata.obs["$ref^$"] = adata.obs["truth"].cat.rename_categories(dict(zip(TYPES, HOSTILE, strict=True)))
    engine = FakeEngine(lambda puzzle: format_answer(list(puzzle.candidates)))
    scverse_plugin.tl.annotate(
        adata, HOSTILE, groupby="leiden", engine=engine, progress=False, key_added="$k^$", min_support=0
    )
    scverse_plugin.pl.confusion(adata, "$ref^$", "$k^$", show=False, save=True)
    for name in ("votes", "support", "umap"):
        getattr(scverse_plugin.pl, name)(adata, "$k^$", show=False, save=True)
    ax = scverse_plugin.pl.votes(adata, "$k^$", show=False)
    assert {tick.get_text() for tick in ax.get_yticklabels()} == set(HOSTILE)
    scverse_plugin.report(adata, tmp_path / "a.html", "$k^$")


def test_cells_without_a_label_are_grey():
    adata = toy()
    engine = FakeEngine(lambda puzzle: format_answer(["B cell"]))
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=engine, progress=False, puzzle_size=1)
    adata.obs.loc[adata.obs["leiden"] == "3", "cello1"] = np.nan
    adata.obs["cello1"] = adata.obs["cello1"].cat.add_categories(["Unassigned"]).fillna("Unassigned")
    axes = scverse_plugin.pl.umap(adata, show=False)
    colours = {tuple(colour) for colour in axes[0].collections[0].get_facecolors().round(3).tolist()}
    assert (0.827, 0.827, 0.827, 1.0) in colours and len(colours) == 2


def test_empty_states_are_said(tmp_path):
    adata = toy()
    engine = FakeEngine(lambda puzzle: "nonsense")
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=engine, progress=False)
    ax = scverse_plugin.pl.votes(adata, show=False)
    assert ax.texts[0].get_text() == "No answer could be read: there are no votes."
    adata.obs["none"] = np.nan
    ax = scverse_plugin.pl.confusion(adata, "none", show=False)
    assert ax.texts[0].get_text() == "No cell has both a label and a reference."


def test_what_is_left_of_an_object_is_drawn(done):
    part = done[done.obs["leiden"].isin(["0", "2"])].copy()
    part.obs["leiden"] = part.obs["leiden"].cat.rename_categories({"2": "renamed"})
    assert scverse_plugin.get.cello1_df(part, table="votes").index.tolist() == ["0"]
    for draw in (scverse_plugin.pl.votes, scverse_plugin.pl.support):
        assert [tick.get_text() for tick in draw(part, show=False).get_yticklabels()] == ["0"]
    ax = scverse_plugin.pl.confusion(part, "truth", show=False)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["B cell", "T/NK cell"]
    assert len(scverse_plugin.pl.umap(part, show=False)[0].collections[0].get_offsets()) == 40
    del part.obs["leiden"]  # nothing says which groups are left: the stored table is drawn whole
    assert len(scverse_plugin.pl.support(part, show=False).get_yticks()) == 4
    part.obs["leiden"] = pd.Categorical(["renamed"] * part.n_obs)
    with pytest.raises(ValueError, match="adata no longer has cells of the groups"):
        scverse_plugin.get.cello1_df(part[part.obs["leiden"] == "renamed"].copy(), table="votes")


@pytest.mark.parametrize("name", ["votes", "support", "umap"])  # confusion says so in its place
def test_an_object_without_cells_is_refused_with_a_sentence(done, name):
    with pytest.raises(ValueError, match="adata (has no cells|no longer has cells)"):
        PLOTS[name](done[:0].copy(), show=False)


@pytest.mark.parametrize("column", ["cello1", "cello1_support"])
def test_an_embedding_of_labels_that_are_gone_is_refused(done, column, tmp_path):
    adata = done.copy()
    del adata.obs[column]
    with pytest.raises(ValueError, match=f"key: adata.obs has no column '{column}' any more; run annotate again"):
        scverse_plugin.pl.umap(adata, show=False)
    html = scverse_plugin.report(adata, tmp_path / "a.html").read_text()  # the rest of the evidence is there
    assert 'id="umap"' not in html and 'id="votes"' in html


@pytest.mark.parametrize("n", [0, 1])
def test_an_embedding_of_too_few_dimensions_is_refused(done, n, tmp_path):
    adata = done.copy()
    adata.obsm["X_umap"] = adata.obsm["X_umap"][:, :n]
    with pytest.raises(ValueError, match=rf"basis: adata.obsm\['X_umap'\] has the shape \(80, {n}\)"):
        scverse_plugin.pl.umap(adata, show=False)
    assert 'id="umap"' not in scverse_plugin.report(adata, tmp_path / "a.html").read_text()


def test_the_report_has_matplotlibs_own_colours_in_any_style(done, tmp_path):
    """The page inverts pictures where it is dark, so that they must be light."""
    pages = []
    for style in ("default", "dark_background"):
        with matplotlib.pyplot.style.context(style):
            pages.append(scverse_plugin.report(done, tmp_path / "a.html").read_text())
    assert pages[0] == pages[1]
