"""Labels without a list of types: named by the model, or taken from the Cell Ontology below a label."""

import io
import logging
import re

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

import scverse_plugin
from recipe.cello1.__main__ import main
from recipe.cello1.engines.protocol import Completion
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.ontology import CellOntology
from recipe.cello1.task.prompt import parse_user
from scverse_plugin.adata import _species
from scverse_plugin.get import cello1_df
from scverse_plugin.tl import _ontology
from tests.helpers.stub_server import Server
from tests.helpers.toy_adata import MARKERS, TYPES, FakeEngine, by_marker, toy
from tests.helpers.toy_ontology import TERMS

TRUTH = ["B cell", "NK cell", "T cell", "monocyte"]
# Everyday names, and one that no ontology has.
EVERYDAY = {"MS4A1": "B-cells", "NKG7": "Killer thing", "CD3D": "T lymphocytes", "LYZ": "Monocytes"}
CELL_LINE = re.compile(r"^(?:Cell|Cluster) \d+: (.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def small_ontology(monkeypatch):
    monkeypatch.setattr(_ontology, "load_ontology", lambda: CellOntology(TERMS, "made up"))


@pytest.fixture
def log(monkeypatch):
    """What scanpy shows at the verbosity it comes with: warnings."""
    found = io.StringIO()

    def write(self, level, msg, **_):
        if level >= logging.WARNING:
            found.write(f"{msg}\n")

    monkeypatch.setattr(sc.logging._RootLogger, "log", write)
    return found


def is_open(text):
    return "Name the cell type of each" in text


def marker(genes):
    return next(gene for gene in genes.split(", ") if gene.upper() in EVERYDAY).upper()


def free_text(text, names):
    return format_answer([names[marker(genes)] for genes in CELL_LINE.findall(text)], "seen")


class Namer:
    """Answers open-ended puzzles with everyday names, closed ones by the markers."""

    name, model, fingerprint, constraint = "fake", "toy", "f", ""

    def __init__(self, names=EVERYDAY, closed=by_marker):
        self.names, self.closed, self.open, self.candidates = names, closed, [], []

    def generate(self, requests, sampling):
        for position, request in enumerate(requests):
            text = request.messages[-1]["content"]
            if is_open(text):
                self.open.append(request)
                yield position, Completion(free_text(text, self.names), "stop", 5, 50)
            else:
                puzzle = parse_user(text)
                self.candidates.append(puzzle.candidates)
                yield position, Completion(self.closed(puzzle), "stop", 5, 50)

    def close(self):
        pass


def four():
    adata = toy(types=["B cell", "NK cell", "T/NK cell", "monocyte"], n_per_group=6)
    return adata


def free(adata=None, engine=None, **options):
    adata, engine = four() if adata is None else adata, engine or Namer()
    options = {"tissue": "blood", "groupby": "leiden", "n_votes": 2, "progress": False} | options
    found = scverse_plugin.tl.annotate(adata, None, engine=engine, **options)
    return (adata if found is None else found), engine


def t_as_marker(puzzle):
    """T cells carry CD3D, which the toy's engine calls T/NK cells."""
    named = {"MS4A1": "B cell", "CD3D": "T cell", "LYZ": "monocyte"}
    left = list(puzzle.candidates)
    found = []
    for cell in puzzle.cells:
        name = next((named[gene] for gene in cell if gene in named), left[0])
        name = name if name in left else left[0]
        left.remove(name)
        found.append(name)
    return format_answer(found)


# ------------------------------------------------------------------------------------------------ types that are named


def test_an_open_answer_that_cannot_be_read_is_shown(log):
    engine = Namer()
    engine.generate = lambda requests, sampling: (
        (i, Completion("1. B cells\n2. NK", "stop", 5, 50)) for i, _ in enumerate(requests)
    )
    with pytest.raises(ValueError, match=r"names a type that the Cell Ontology has \(none can be read\)"):
        free(engine=engine)
    assert "3 of 3 open-ended answers cannot be read" in log.getvalue()
    assert "the first is '1. B cells\\n2. NK'" in log.getvalue()


@pytest.mark.parametrize("evidence", ["cells", "markers"])
def test_named_types_become_candidates_and_the_others_are_counted(evidence, tmp_path, log):
    adata, engine = free(evidence=evidence, organism="human", engine=Namer(closed=t_as_marker))
    # Everyday names are what the strict matcher says, the made-up one is no candidate.
    assert set(engine.candidates) == {("B cell", "T cell", "monocyte")}
    names = adata.uns["cello1"]["names"]
    assert names[["group", "answer", "term", "cell_type", "n"]].to_numpy().tolist() == [
        ["0", "B-cells", "CL:0000236", "B cell", 3],
        ["1", "Killer thing", "", "", 3],
        ["2", "T lymphocytes", "CL:0000084", "T cell", 3],
        ["3", "Monocytes", "CL:0000576", "monocyte", 3],
    ]
    assert "3 answers of the open-ended round name no type that the Cell Ontology has" in log.getvalue()
    found = cello1_df(adata)["best"].to_dict()
    assert (found["0"], found["2"], found["3"]) == ("B cell", "T cell", "monocyte")
    params = adata.uns["cello1"]["params"]
    assert (params["tissue"], params["organism"], params["evidence"]) == ("blood", "human", evidence)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").uns["cello1"]["names"]["answer"].tolist() == names["answer"].tolist()


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        ("cells", ("one cell of each of N clusters", "top expressed genes", "Name the cell type of each cell above.")),
        ("markers", ("N clusters of cells", "marker genes", "Name the cell type of each cluster above.")),
    ],
)
def test_the_open_prompt_says_what_is_true(evidence, said):
    _, engine = free(evidence=evidence, organism="human", context="Donor of 40 years.", n_top_genes=3)
    text = "\n".join(message["content"] for message in engine.open[0].messages)
    assert all(part in text for part in said)
    assert "unique cell type" not in text and "candidate" not in text and "same donor" not in text
    assert "Context: The cells are from human blood. Donor of 40 years." in text
    assert "several clusters may be of the same type" in text
    assert engine.open[0].candidates == () and engine.open[0].n_answers == 0
    lines = CELL_LINE.findall(engine.open[0].messages[-1]["content"])
    assert len(lines) == 4
    if evidence == "markers":  # the marker of a group leads its list
        assert {genes.split(", ")[0] for genes in lines} == set(EVERYDAY)


def test_a_dry_run_counts_both_rounds_and_the_cost_is_said_first(capsys, tmp_path):
    adata = four()
    prompts, engine = None, Namer(closed=t_as_marker)
    prompts = scverse_plugin.tl.annotate(
        adata, None, tissue="blood", groupby="leiden", n_votes=2, engine=engine, dry_run=True, max_tokens=10
    )
    assert len(prompts) == 3 and not engine.open and "cello1" not in adata.obs
    # Three open-ended ones, and at most one for each group and vote.
    assert prompts.n_puzzles >= 3 + 8 and prompts.max_answer_tokens == 10 * prompts.n_puzzles
    with pytest.raises(ValueError, match="max_puzzles=10, but this run asks"):
        free(adata, engine, max_puzzles=10)
    assert not engine.open
    free(adata, engine, progress=True)
    assert len(engine.open) + len(engine.candidates) <= prompts.n_puzzles
    assert re.search(r"cello1 asks \d+ puzzles.*; 3 of them open-ended, with the tissue;", capsys.readouterr().err)


def test_both_rounds_are_kept_and_a_second_run_asks_nothing(tmp_path):
    file = tmp_path / "answers.jsonl"
    first, engine = free(engine=Namer(closed=t_as_marker), cache=file)
    assert len(file.read_text().splitlines()) == len(engine.open) + len(engine.candidates)
    second, again = free(engine=Namer(closed=t_as_marker), cache=file)
    assert not again.open and not again.candidates
    assert second.obs["cello1"].astype(str).tolist() == first.obs["cello1"].astype(str).tolist()


def test_answers_without_a_name_give_no_candidates(log):
    unknown = EVERYDAY | {"NKG7": "unknown", "LYZ": "cell"}
    adata, engine = free(engine=Namer(unknown, t_as_marker))
    assert set(engine.candidates) == {("B cell", "T cell")}
    assert "name no type that the Cell Ontology has; they become no candidates: 'cell' (3)" in log.getvalue()
    _, engine = free(engine=Namer(closed=t_as_marker), decoys=["monocyte"])
    assert all(set(shown) == {"B cell", "T cell", "monocyte"} for shown in engine.candidates)  # a decoy is no candidate
    with pytest.raises(ValueError, match=r"no open-ended answer names a type .*'gibberish' \(12\).*cell_types"):
        free(engine=Namer(dict.fromkeys(EVERYDAY, "gibberish")))


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("cell_types is missing; give the types .* or tissue='blood'", {"tissue": None}),
        ("tissue is empty", {"tissue": " "}),
        ("organism contains a line break", {"organism": "a\nb"}),
        ("evidence must be one of cells, markers, got 'x'", {"evidence": "x"}),
        ("groupby is missing: without cell_types it is groups that are named", {"groupby": None}),
        ("one_to_one=True needs cell_types", {"one_to_one": True}),
        ("reference is given, but cell_types=None", {"reference": toy()}),
        ("unassigned='b cells' is a cell type", {"unassigned": "b cells"}),
        ("tissue must be one name, a str, got 3", {"tissue": 3}),
        ("model: cell_types=None has one model name the types, got several", {"engine": [Namer(), Namer()]}),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(match, options):
    engine = Namer()
    with pytest.raises(ValueError, match=match):
        free(**{"engine": engine} | options)
    assert not engine.open


def test_tissue_goes_without_types():
    with pytest.raises(ValueError, match="tissue='blood' goes with cell_types=None"):
        scverse_plugin.tl.annotate(four(), TRUTH, tissue="blood", groupby="leiden", engine=Namer())


def test_a_missing_ontology_is_said_before_anything_is_asked(monkeypatch):
    def missing():
        raise ImportError("the Cell Ontology cannot be read")

    monkeypatch.setattr(_ontology, "load_ontology", missing)
    engine = Namer()
    with pytest.raises(ImportError, match=r"\[ontology\] extra"):
        free(engine=engine)
    assert not engine.open


# ------------------------------------------------------------------------------------------------------------- symbols


def mouse():
    adata = four()
    adata.var_names = [name.capitalize() for name in adata.var_names]
    return adata


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (str.lower, r"in lower case \(cd3e\), as neither a human's nor a mouse's are"),
        (
            lambda name: name.capitalize() if odd(name) else name,
            r"written in two ways, \d\d% of them in upper case",
        ),
    ],
)
def test_odd_symbols_are_said_without_an_organism(write, said, log):
    adata = toy()
    adata.var_names = list(map(write, adata.var_names))
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=FakeEngine(lambda puzzle: "x"), progress=False)
    assert re.search(f"the listed gene symbols are .*{said}", log.getvalue())
    log.truncate(0)
    scverse_plugin.tl.annotate(toy(), TYPES, groupby="leiden", engine=FakeEngine(), progress=False)
    assert "gene symbols" not in log.getvalue()


def odd(name):
    return sum(map(ord, name)) % 2


def test_symbols_are_checked_against_the_organism(log):
    with pytest.raises(ValueError, match="organism='human', but 100% of the listed gene symbols are not in upper case"):
        free(mouse(), organism="human")
    _, engine = free(mouse(), organism="mouse", engine=Namer(closed=lambda puzzle: "x"))
    assert "Context: The cells are from mouse blood." in engine.open[0].messages[-1]["content"]
    _, engine = free(organism="Mus musculus", engine=Namer(closed=lambda puzzle: "x"))
    assert "listed as a mouse's (CD3E as Cd3e)" in log.getvalue()
    assert re.search(r"\bMs4a1\b", engine.open[0].messages[-1]["content"])
    assert not re.search(r"\bMS4A1\b", engine.open[0].messages[-1]["content"])


@pytest.mark.parametrize(
    ("upper", "listed"),
    [
        ("CD3E", "Cd3e"),
        ("MT-CO1", "mt-Co1"),
        ("H2-AB1", "H2-Ab1"),
        ("1110008F13RIK", "1110008F13Rik"),
        ("Cd3e", "Cd3e"),
    ],
)
def test_symbols_of_a_mouse(upper, listed):
    assert _species._capital(upper) == listed


# -------------------------------------------------------------------------------------------------------- finer labels


def refined(**options):
    adata = four()
    engine = Namer(closed=t_as_marker)
    types = ["B cell", "T cell", "monocyte"]
    scverse_plugin.tl.annotate(
        adata, types, groupby="leiden", groups=["0", "2", "3"], n_votes=2, engine=engine, progress=False
    )
    before = adata.obs["cello1"].astype(object).copy()
    engine.candidates.clear()
    found = scverse_plugin.tl.annotate(
        adata, groupby="leiden", n_votes=2, engine=engine, progress=False, **({"refine": "T cell"} | options)
    )
    return adata, before, engine, found


def test_refining_a_label_changes_only_its_cells(tmp_path):
    adata, before, engine, _ = refined()
    assert set(engine.candidates) == {("CD4-positive, alpha-beta T cell",)}
    inside = (before == "T cell").to_numpy()
    labels = adata.obs["cello1"].astype(object)
    assert set(labels[inside]) == {"CD4-positive, alpha-beta T cell"}
    assert labels[~inside].equals(before[~inside])
    assert adata.obs["cello1_T_cell"].notna().tolist() == inside.tolist()
    assert adata.uns["cello1_T_cell"]["params"]["refine"] == "T cell"
    assert "T cell" not in adata.obs["cello1"].cat.categories
    assert cello1_df(adata, "cello1_T_cell").index.tolist() == ["2"]
    adata.write_h5ad(tmp_path / "a.h5ad")


def test_cells_without_a_finer_label_keep_theirs():
    adata, before, _, _ = refined(cell_types=["one", "two"], puzzle_size=1, min_support=1, decoys=["T/NK cell"])
    assert adata.obs["cello1"].astype(object).equals(before)
    assert (adata.obs["cello1_support"][(before == "T cell").to_numpy()] == 1).all()


def test_refining_can_copy_and_be_counted():
    adata, before, _, found = refined(copy=True)
    assert adata.obs["cello1"].astype(object).equals(before) and "cello1_T_cell" not in adata.obs
    assert "CD4-positive, alpha-beta T cell" in set(found.obs["cello1"])
    adata, _, engine, prompts = refined(dry_run=True)
    assert prompts.n_puzzles == len(prompts) > 0 and not engine.candidates and "cello1_T_cell" not in adata.obs


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("refine: no cell in adata.obs\\['cello1'\\] has the label 'NK cell'; it has", {"refine": "NK cell"}),
        ("refine: the Cell Ontology has no term below 'monocyte'; pass the finer types", {"refine": "monocyte"}),
        ("refine: cell_types holds 'T cell' itself", {"cell_types": ["T cell", "x"]}),
        ("key: adata.uns has no cello1 run 'other'", {"key_added": "other"}),
        ("tissue='blood' goes with cell_types=None", {"tissue": "blood"}),
    ],
)
def test_labels_that_cannot_be_refined(match, options):
    with pytest.raises(ValueError, match=match):
        refined(**options)


def test_a_label_that_is_no_term_cannot_be_refined():
    adata = four()
    engine = Namer()
    names = ["T/NK cell", "x", "y", "z"]
    scverse_plugin.tl.annotate(adata, names, groupby="leiden", n_votes=1, engine=engine, progress=False)
    with pytest.raises(ValueError, match="refine: 'T/NK cell' is no term of the Cell Ontology; pass the finer types"):
        scverse_plugin.tl.annotate(adata, groupby="leiden", refine="T/NK cell", engine=engine)


def test_terms_of_another_species_are_no_candidates():
    assert _species.of_species("dendritic cell, human", "human") and _species.of_species("T cell", "mouse")
    assert not _species.of_species("dendritic cell, human", "mouse")
    assert _species.of_species("dendritic cell, human", None)


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("concurrency", [1, 32])
def test_the_command_names_and_refines(concurrency, tmp_path, capsys):
    four().write_h5ad(tmp_path / "in.h5ad")

    def reply(body, n):
        text = body["messages"][-1]["content"]
        return free_text(text, EVERYDAY) if is_open(text) else t_as_marker(parse_user(text))

    with Server(reply) as server:
        asked = ["--groupby", "leiden", "--engine", "openai", "--model", "m", "--base-url", server.url]
        asked += ["--no-constrained", "--n-votes", "2", "--max-concurrency", str(concurrency), "--no-cache"]
        out, finer = str(tmp_path / "out.h5ad"), str(tmp_path / "finer.h5ad")
        argv = ["annotate", str(tmp_path / "in.h5ad"), "-o", out, "--tissue", "blood", "--organism", "human"]
        assert main([*argv, "--evidence", "markers", *asked]) == 0
        assert main(["annotate", out, "-o", finer, "--refine", "T cell", *asked]) == 0
    found = ad.read_h5ad(finer)
    assert "CD4-positive, alpha-beta T cell" in set(found.obs["cello1"])
    assert main(["annotate", out, "-o", finer, *asked]) == 1
    assert "--cell-types is missing" in capsys.readouterr().err


def test_markers_are_relative_to_the_other_groups():
    """A gene that every cell has most of leads no list of markers."""
    adata = four()
    values = adata.X.toarray()
    values[:, adata.var_names.get_loc("GENE0")] = 500
    adata.X = values
    _, engine = free(adata, evidence="markers", n_top_genes=5)
    leading = [genes.split(", ")[0] for genes in CELL_LINE.findall(engine.open[0].messages[-1]["content"])]
    assert sorted(leading) == sorted(EVERYDAY) and np.isin(leading, list(MARKERS.values())).all()
