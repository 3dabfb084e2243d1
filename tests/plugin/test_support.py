"""Support from probabilities, calibrated, with a rate of false labels, backed off to ancestors, of several models."""

import json
import re
import sys
from html import unescape

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

import scverse_plugin
from recipe.cello1.engines.protocol import Completion, EngineBase, EngineError, Failure
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.ontology import CellOntology
from recipe.cello1.task.prompt import parse_user
from scverse_plugin.get import cello1_df
from scverse_plugin.method import _calibrate
from scverse_plugin.method._false import find_threshold
from tests.helpers.browser import overflow
from tests.helpers.stub_server import Server
from tests.helpers.toy_adata import MARKERS, TYPES, FakeEngine, by_marker, toy
from tests.helpers.toy_ontology import TERMS

NAMED = {gene: name for name, gene in MARKERS.items()}


class Scoring(EngineBase):
    """Knows the markers, sure to a given degree, and answers with a trace cell by cell or in free words."""

    name, model, fingerprint, constraint, can_score = "scoring", "toy", "f", "", True

    def __init__(self, sure=0.7, traces=True, fails=False):
        self.sure, self.traces, self.fails, self.n_generated, self.n_scored = sure, traces, fails, 0, 0

    def generate(self, requests, sampling):
        for i, request in enumerate(requests):
            self.n_generated += 1
            puzzle = parse_user(request.messages[-1]["content"])
            if self.fails and sampling.max_tokens > 16:
                yield i, Failure("the machine is on fire")
            elif request.prefix:
                yield i, Completion(f" {puzzle.cells[0][0]}", "stop", 2, 50)
            elif self.traces:
                yield i, Completion(f"<think>\nCell 1: CD3D -> {puzzle.candidates[0]}\n", "length", 4, 50)
            else:
                yield i, Completion(by_marker(puzzle), "stop", 9, 50)

    def score(self, choices):
        for i, choice in enumerate(choices):
            self.n_scored += 1
            cells = parse_user(choice.messages[-1]["content"]).cells
            slot = 0 if self.traces else choice.prefix.rpartition("<answer>")[2].count(" | ")
            known = next((NAMED[gene] for gene in cells[slot] if gene in NAMED), "")
            right = [option.strip().startswith(known) for option in choice.options]
            rest = (1 - self.sure) / (len(right) - 1)
            yield i, np.log([self.sure if found else rest for found in right])


def annotate(adata=None, engine=None, types=TYPES, **options):
    adata = toy() if adata is None else adata
    options = {"groupby": "leiden", "progress": False, "cache": None} | options
    scverse_plugin.tl.annotate(adata, types, engine=FakeEngine() if engine is None else engine, **options)
    return adata


# ---------------------------------------------------------------------------------------------------------- read-out


@pytest.mark.parametrize(("traces", "way"), [(True, "matrix"), (False, "soft")])
def test_support_is_read_out_where_the_engine_can(traces, way):
    adata = annotate(engine=Scoring(0.7, traces), puzzle_size=4)
    found = cello1_df(adata)
    assert found["label"].tolist() == TYPES
    np.testing.assert_allclose(found["support"], 0.7, atol=1e-6)
    np.testing.assert_allclose(found["runner_up_support"], 0.1, atol=1e-6)
    assert (found["votes"] == 10).all() and not found["failures"].any()
    params = adata.uns["cello1"]["params"]
    assert (params["support"], params["readout"]) == ("readout", way)
    reasoning = cello1_df(adata, table="traces")["reasoning"]
    assert all("->" in text for text in reasoning) if traces else all("FOXP3" in text for text in reasoning)


def test_the_way_is_found_on_a_puzzle_that_is_asked():
    """A model that was never asked about one cell alone shows on a puzzle of its size how it answers."""

    class Small(Scoring):
        def generate(self, requests, sampling):
            requests = list(requests)
            self.traces = len(parse_user(requests[0].messages[-1]["content"]).cells) == len(TYPES)
            yield from super().generate(requests, sampling)

    adata = annotate(engine=Small(sure=0.9))
    assert adata.uns["cello1"]["params"]["readout"] == "matrix"
    np.testing.assert_allclose(cello1_df(adata)["support"], 0.9)


def test_votes_where_it_cannot_or_need_not():
    assert annotate().uns["cello1"]["params"]["support"] == "votes"
    adata = annotate(engine=Scoring(0.7, traces=False), support="votes")
    assert adata.uns["cello1"]["params"]["support"] == "votes" and (cello1_df(adata)["support"] == 1).all()


def test_a_readout_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="support='readout' needs the probabilities of texts, and the engine 'fake'"):
        annotate(support="readout")
    with pytest.raises(ValueError, match="support='readout' needs probabilities, which a server does not give"):
        annotate(engine="openai", model="m", support="readout")
    with pytest.raises(ValueError, match="support must be one of auto, votes, readout, got 'logits'"):
        annotate(support="logits")


def test_same_object_same_model_same_labels():
    first, second = (annotate(engine=Scoring(0.6)) for _ in range(2))
    pd.testing.assert_frame_equal(first.uns["cello1"]["groups"], second.uns["cello1"]["groups"])
    np.testing.assert_array_equal(first.obsm["cello1_votes"], second.obsm["cello1_votes"])


def test_readings_are_kept_and_not_asked_again(tmp_path):
    first = annotate(engine=Scoring(), cache=tmp_path / "a.jsonl")
    engine = Scoring()
    second = annotate(engine=engine, cache=tmp_path / "a.jsonl")
    assert engine.n_generated == 1 and engine.n_scored == 0  # the look at the form of the trace
    np.testing.assert_array_equal(first.obsm["cello1_votes"], second.obsm["cello1_votes"])
    assert second.uns["cello1"]["traces"]["cached"].all()


def test_a_reading_that_fails_is_no_vote(tmp_path):
    with pytest.raises(EngineError, match="10 of 10 puzzles have no answer .the machine is on fire."):
        annotate(engine=Scoring(fails=True))
    adata = annotate(engine=Scoring(fails=True), on_error="skip")
    assert set(cello1_df(adata)["status"]) == {"no_votes"} and adata.uns["cello1"]["checks"]["n_errors"] == 10


def test_an_answer_that_cannot_be_read_is_no_vote():
    class Silent(Scoring):
        def generate(self, requests, sampling):
            for i, _ in enumerate(requests):
                yield i, Completion("I do not know", "stop", 4, 50)

    found = cello1_df(annotate(engine=Silent()))
    assert set(found["status"]) == {"no_votes"} and (found["failures"] == found["puzzles"]).all()


@pytest.mark.slow
def test_a_real_engine_is_read_out(tmp_path):
    from recipe.cello1.engines.start import start_engine
    from tests.helpers.toy_model import build_toy_model

    with start_engine(
        "transformers", build_toy_model(tmp_path, context=1024), constrained=True, device="cpu"
    ) as engine:
        options = {"n_votes": 1, "max_tokens": 60, "n_top_genes": 3, "puzzle_size": 2, "reasoning_budget": 4}
        adata = annotate(engine=engine, min_support=0, **options)
    params = adata.uns["cello1"]["params"]
    assert (params["support"], params["readout"], params["constraint"]) == ("readout", "soft", "exact")
    np.testing.assert_allclose(adata.obsm["cello1_votes"].sum(axis=1), 1, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- calibration


def test_expected_calibration_error_by_hand():
    support = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, False, True, True])
    assert _calibrate.expected_calibration_error(support, right) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert _calibrate.expected_calibration_error(np.array([1.0]), np.array([True])) == 0


@pytest.mark.parametrize("method", ["isotonic", "temperature"])
def test_a_map_brings_support_to_the_share_right(method):
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.3, 0.95, 2000)
    right = rng.random(2000) < chance
    over = 1 / (1 + ((1 - chance) / chance) ** 3)  # logit times 3
    found = _calibrate.fit(over, right, method)
    assert found["ece_before"] > 0.1 and found["ece_after"] < 0.04
    assert np.abs(_calibrate.apply(found, over) - chance).mean() < 0.05
    assert found["n"] == 2000 and found["n_right"] == right.sum() and 0.6 < found["auroc"] < 0.8
    if method == "temperature":
        assert found["temperature"] == pytest.approx(3, rel=0.15)
    assert found == pytest.approx(_calibrate.fit(over, right, method)) if method == "temperature" else True


def labelled(n=40):
    """Groups of one cell; the model is surer where it is right."""
    adata = toy(n_per_group=n // 4)
    adata.obs["cells"] = pd.Categorical([f"g{i}" for i in range(n)])
    adata.obs["known"] = adata.obs["truth"].astype(str)
    adata.obs.iloc[::4, adata.obs.columns.get_loc("known")] = "hepatocyte"  # a quarter of the answers is wrong
    return adata


def test_calibrate_and_take_it(tmp_path):
    adata = annotate(labelled(), engine=Scoring(0.9), groupby="cells", puzzle_size=1)
    scverse_plugin.tl.calibrate(adata, truth="known")
    found = adata.uns["cello1"]["calibration"]
    assert (found["method"], found["n"], found["n_right"], found["support"]) == ("isotonic", 40, 30, "readout")
    assert found["ece_before"] == pytest.approx(0.15, abs=1e-5) and found["ece_after"] < 0.03
    assert found["auroc"] == 0.5 and found["model"] == "toy"
    adata.write_h5ad(tmp_path / "a.h5ad")
    import anndata as ad

    read = ad.read_h5ad(tmp_path / "a.h5ad").uns["cello1"]["calibration"]
    other = annotate(engine=Scoring(0.9), calibration=read, puzzle_size=1)
    table = cello1_df(other)
    np.testing.assert_allclose(table["support"], 0.75, atol=1e-6)
    np.testing.assert_allclose(table["raw_support"], 0.9, atol=1e-6)
    assert other.uns["cello1"]["params"]["calibrated"]
    assert set(annotate(engine=Scoring(0.9), calibration=read, min_support=0.8).obs["cello1"]) == {"Unassigned"}


def test_calibration_of_another_kind_is_refused():
    adata = annotate(labelled(), engine=Scoring(0.9), groupby="cells", puzzle_size=1)
    copied = scverse_plugin.tl.calibrate(adata, truth="known", method="temperature", copy=True)
    assert "calibration" not in adata.uns["cello1"]
    known = copied.uns["cello1"]["calibration"]
    with pytest.raises(ValueError, match="calibration: it is made for the support of readout, and here it"):
        annotate(calibration=known)
    with pytest.raises(ValueError, match="calibration must be what tl.calibrate has stored"):
        annotate(calibration={"method": "isotonic"})


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"key": "other"}, "key: adata.uns has no cello1 run 'other'"),
        (None, {"truth": "nothing"}, "truth: adata.obs has no column 'nothing'"),
        (None, {"method": "platt"}, "method must be one of isotonic, temperature, got 'platt'"),
        ("unknown", {}, "truth: no cell has a type in adata.obs"),
        ("hepatocyte", {}, "truth: all 40 groups are wrong, so that nothing can be learnt"),
        ("truth", {}, "truth: all 40 groups are right, so that nothing can be learnt"),
        ("one", {}, "truth: only one of 40 groups is wrong, two are needed"),
        ("few", {}, "truth: 9 of 40 groups have votes and a type"),
    ],
)
def test_what_cannot_be_calibrated(change, options, message):
    adata = annotate(labelled(), groupby="cells", n_votes=1, puzzle_size=1)
    names = adata.obs["truth"].astype(object).to_numpy().copy()
    if change == "one":
        names[0] = "hepatocyte"
    elif change == "few":
        names[9:] = np.nan
    elif change not in (None, "truth"):
        names[:] = change
    if change is not None:
        adata.obs["known"] = names
    with pytest.raises(ValueError, match=message):
        scverse_plugin.tl.calibrate(adata, **{"truth": "known"} | options)


# ---------------------------------------------------------------------------------------------- share of false labels


def test_a_threshold_by_hand():
    support = np.array([0.9, 0.8, 0.6, 0.4])
    decoys = np.array([0.5, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    # At 0.4 one decoy of ten, three other types for each of 4 groups, 4 labels: 0.3. At 0.6 none.
    found = find_threshold(support, decoys, n_wrong=3, n_units=4, allowed=0.3)
    interval = binomtest(1, 10).proportion_ci(0.95, "exact")
    assert (found.threshold, found.rate) == (0.4, pytest.approx(0.3))
    assert (found.low, found.high) == (pytest.approx(3 * interval.low), 1.0)
    found = find_threshold(support, decoys, n_wrong=3, n_units=4, allowed=0.29)
    assert (found.threshold, found.rate, found.low) == (0.6, 0, 0)
    # Two of ten beyond every support: nothing is sure enough.
    assert find_threshold(support, decoys + 0.9, 3, 4, 0.05).threshold == np.inf


def test_max_false_decides_instead_of_min_support(monkeypatch, capsys):
    # Read out, four types and two decoys: 0.45 for the right one, 0.11 for each other.
    adata = annotate(
        engine=Scoring(0.45), decoys=["neuron", "hepatocyte"], max_false=0.05, puzzle_size=1, progress=True
    )
    assert "labels need a support of 0.45; expected to be false: 0.0% (95% interval 0.0% to 100.0%)" in (
        capsys.readouterr().err
    )
    found, checks = cello1_df(adata), adata.uns["cello1"]["checks"]
    assert found["label"].tolist() == TYPES
    assert checks["support_threshold"] == pytest.approx(0.45) and checks["false_rate"] == checks["false_rate_low"] == 0
    # None of 8 pairs of group and decoy: up to 37% of them could be, times three other types for each group.
    assert checks["false_rate_high"] == 1
    doc = scverse_plugin.tl.annotate.__doc__
    assert all(f"``{name}``" in doc for name in checks)
    assert adata.uns["cello1"]["params"]["max_false"] == 0.05
    # A model that takes decoys as often as types labels nothing.
    said = []
    monkeypatch.setattr("scanpy.logging.warning", said.append)
    guess = annotate(engine=Scoring(0.1), decoys=["neuron", "hepatocyte"], max_false=0.05, puzzle_size=1)
    assert "no support is enough for max_false=0.05: decoys are chosen in " in said[0]
    assert set(guess.obs["cello1"]) == {"Unassigned"}
    assert guess.uns["cello1"]["checks"]["support_threshold"] == np.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_false": 0.05}, "max_false=0.05 needs decoys, types that these cells cannot be"),
        ({"max_false": 5, "decoys": ["neuron"]}, "max_false must be a share between 0 and 1"),
    ],
)
def test_max_false_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        annotate(**options)


# ---------------------------------------------------------------------------------------------------------- back-off


@pytest.fixture
def toy_terms(monkeypatch):
    found = CellOntology(TERMS)
    monkeypatch.setattr("scverse_plugin.tl._back_off.ontology_tables", lambda: found)
    monkeypatch.setattr("scverse_plugin.tl._annotate.ontology_tables", lambda: found)
    return found


def shared(first, second):
    """Answer for cells of the first group one of two types by turns, else by marker."""
    turn = iter(range(1000))

    def answer(puzzle):
        if "MS4A1" in puzzle.cells[0]:
            return format_answer([(first, second)[next(turn) % 2]])
        return by_marker(puzzle)

    return FakeEngine(answer)


def test_close_types_that_share_a_group_are_backed_off_to_their_ancestor(toy_terms):
    types = ["B cell", "T cell", "monocyte", "NK cell"]
    adata = annotate(engine=shared("B cell", "T cell"), types=types, puzzle_size=1, back_off=True)
    row = cello1_df(adata).loc["0"]
    assert (row["label"], row["status"], row["backed_off_from"]) == ("lymphocyte", "backed_off", "B cell | T cell")
    assert row["support"] == 1 and row["best"] in ("B cell", "T cell")
    assert "lymphocyte" in adata.obs["cello1"].cat.categories
    assert (adata.obs.loc[adata.obs["leiden"] == "0", "cello1"] == "lymphocyte").all()
    plain = annotate(engine=shared("B cell", "T cell"), types=types, puzzle_size=1)
    assert cello1_df(plain).loc["0", "label"] == "Unassigned" and set(cello1_df(plain)["backed_off_from"]) == {""}


def test_report_and_plot_say_what_was_backed_off(toy_terms, tmp_path):
    types = ["B cell", "T cell", "monocyte", "NK cell"]
    adata = annotate(engine=shared("B cell", "T cell"), types=types, puzzle_size=1, back_off=True)
    n = len(cello1_df(adata))
    path = scverse_plugin.report(adata, tmp_path / "a.html")
    html = path.read_text()
    assert f"<dd>{n} of {n}</dd>" in html and "1 backed off to an ancestor" in html
    section = html[html.index('id="backed_off"') :].partition("</table>")[0]
    assert [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", section)] == [
        *("group", "from", "to", "support of both"),
        *("0", "B cell | T cell", "lymphocyte", "1.00"),
    ]
    assert "backed off from B cell | T cell to lymphocyte" in html
    ax = scverse_plugin.pl.support(adata, show=False)
    assert "lymphocyte (backed_off)" in [text.get_text() for text in ax.texts]
    assert overflow(path, 400, tmp_path) == 0


def test_distant_types_have_no_ancestor_that_says_anything(toy_terms):
    types = ["B cell", "epithelial cell", "monocyte", "NK cell"]
    adata = annotate(engine=shared("B cell", "epithelial cell"), types=types, puzzle_size=1, back_off=True)
    assert cello1_df(adata).loc["0", ["label", "status"]].tolist() == ["Unassigned", "tie"]


def test_a_type_that_is_the_ancestor_keeps_its_name(toy_terms):
    types = ["CD4-positive, alpha-beta T cell", "T cells", "monocyte", "NK cell"]
    adata = annotate(engine=shared(types[0], types[1]), types=types, puzzle_size=1, back_off=True)
    assert cello1_df(adata).loc["0", "label"] == "T cells"


def test_ancestors_in_the_cell_ontology():
    pytest.importorskip("cellxgene_ontology_guide")
    from recipe.cello1.task.ontology import load_ontology
    from scverse_plugin.tl._back_off import LARGEST_ANCESTOR, STEPS_UP

    ontology = load_ontology()

    def above(*names):
        found = ontology.nearest_ancestor(*map(ontology.find, names), steps=STEPS_UP, largest=LARGEST_ANCESTOR)
        return ontology.label(found) if found else ""

    assert above("CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell") == "mature alpha-beta T cell"
    assert above("B cell", "T cell") == "lymphocyte"
    assert above("monocyte", "T cell") == ""  # mononuclear leukocyte: too large
    assert above("hepatocyte", "neuron") == above("fibroblast", "endothelial cell") == ""
    assert above("T cell", "CD4-positive, alpha-beta T cell") == "T cell"


# ---------------------------------------------------------------------------------------------------- several models


def wrong_about_b(puzzle):
    """Take B cells for monocytes, and the other way round."""
    return by_marker(puzzle).replace("B cell", "?").replace("monocyte", "B cell").replace("?", "monocyte")


def test_several_models_vote_together():
    engines = [FakeEngine(model="a"), FakeEngine(model="b"), FakeEngine(wrong_about_b, model="c")]
    adata = annotate(engine=engines)
    found = cello1_df(adata)
    assert found["label"].tolist() == TYPES
    np.testing.assert_allclose(found["agreement"], [2 / 3, 1, 1, 2 / 3])
    np.testing.assert_allclose(found["support"], [2 / 3, 1, 1, 2 / 3])
    assert (found["votes"] == 30).all() and adata.uns["cello1"]["checks"]["n_puzzles"] == 30
    models = cello1_df(adata, table="models")
    assert models["model"].tolist() == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert models.loc[models["model"] == "c", "best"].tolist() == ["monocyte", "NK cell", "T/NK cell", "B cell"]
    assert (models["votes"] == 10).all()
    assert cello1_df(adata, table="traces")["model"].value_counts().to_dict() == {"a": 10, "b": 10, "c": 10}
    assert json.loads(adata.uns["cello1"]["params"]["model"]) == ["a", "b", "c"]
    # All are asked the same.
    assert [p for p, _ in engines[0].asked] == [p for p, _ in engines[2].asked]
    doc = scverse_plugin.tl.annotate.__doc__
    assert all(f"``{name}``" in doc for name in (*adata.uns["cello1"]["models"].columns, "agreement"))


def test_one_model_in_memory_at_a_time_and_a_journal_for_each(monkeypatch, tmp_path):
    events = []

    class Local(FakeEngine):
        def close(self):
            events.append(f"close {self.model}")

    def start(engine, model, **_):
        events.append(f"start {model}")
        return Local(model=model)

    monkeypatch.setattr("scverse_plugin.method._engines.start_engine", start)
    options = {"engine": "openai", "model": ["a", "b/c"], "base_url": "http://127.0.0.1:1/v1"}
    annotate(**options, cache=tmp_path / "x.jsonl")
    assert events == ["start a", "close a", "start b/c", "close b/c"] * 2  # seen to start, then asked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1-a.jsonl", "x-2-c.jsonl"]
    assert all(len(path.read_text().splitlines()) == 10 for path in tmp_path.iterdir())


def test_a_model_that_fails_is_named_and_the_others_are_kept(tmp_path):
    broken = FakeEngine(lambda puzzle: Failure("out of memory"), model="broken")
    both = [FakeEngine(model="good"), broken]
    with pytest.raises(EngineError, match=r"model broken: .*out of memory.* answers of good are kept in .*x-1-good"):
        annotate(engine=both, cache=tmp_path / "x.jsonl")
    again = [FakeEngine(model="good"), FakeEngine(model="broken")]
    annotate(engine=again, cache=tmp_path / "x.jsonl")
    assert not again[0].asked and len(again[1].asked) == 10

    class Dead(FakeEngine):
        def generate(self, requests, sampling):
            raise EngineError("gone for good")

    with pytest.raises(EngineError, match="model dead: gone for good. The answers of good had no journal"):
        annotate(engine=[FakeEngine(model="good"), Dead(model="dead")])
    adata = annotate(engine=[Dead(model="dead"), FakeEngine(model="good")], on_error="skip")
    assert cello1_df(adata)["label"].tolist() == TYPES
    assert set(cello1_df(adata, table="models")["model"]) == {"good"}
    with pytest.raises(EngineError, match="none of the models dead, dead .2. has answered"):
        annotate(engine=[Dead(model="dead"), Dead(model="dead")], on_error="skip")


OF_VOTES = {"method": "temperature", "temperature": 1.0, "support": "votes"}


def folder(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"model": "mm", "engine": "openai"}, r"model mm: model: http\S+ has no 'mm'; it has m, other"),
        ({"model": "nowhere", "engine": "transformers"}, "model nowhere: model: there is no folder nowhere"),
        ({"model": "owner/name", "engine": "vllm"}, "model owner/name: model: there is no folder owner/name"),
        ({"model": "empty", "engine": "transformers"}, "model empty: model: empty holds no config.json"),
        ({"model": "sound", "engine": "transformers", "engine_options": {"timeout": 9}}, "has no timeout; it has"),
        ({"model": "sound", "engine": "transformers", "calibration": OF_VOTES}, "model sound: calibration: it is made"),
    ],
)
def test_no_model_is_asked_before_all_are_seen_to_start(last, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "sound")
    with Server(models=("m", "other")) as server:
        options = last | {"model": ["m", last["model"]], "engine": ["openai", last["engine"]], "base_url": server.url}
        with pytest.raises(EngineError, match=f"{message}.*no model has been asked yet"):
            annotate(**options)
    assert not server.bodies


def test_a_missing_package_of_the_second_model_is_said_before_the_first_is_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    models, engines = ["m", str(folder(tmp_path / "sound"))], ["openai", "vllm"]
    with Server() as server, pytest.raises(EngineError, match="model .*sound: vLLM cannot be imported .*asked yet"):
        annotate(model=models, engine=engines, base_url=server.url)
    assert not server.bodies


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ["a", "a"], "engine": "openai"}, "model: 'a' is listed twice"),
        ({"model": ["a", "b"], "engine": ["openai"] * 3}, "got 2 models and 3 engines"),
        ({"model": [], "engine": "openai"}, "got 0 models and 1 engines"),
        ({"model": ["a", ""], "engine": "openai"}, "model is missing; give the name that the server lists"),
    ],
)
def test_lists_of_models_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        annotate(**options)


def test_dry_run_and_max_puzzles_count_all_models():
    engines = [FakeEngine(model="a"), FakeEngine(model="b")]
    prompts = scverse_plugin.tl.annotate(toy(), TYPES, groupby="leiden", engine=engines, dry_run=True)
    assert prompts.n_puzzles == 20 and len(prompts) == 10
    with pytest.raises(ValueError, match="max_puzzles=19, but this run asks 20"):
        annotate(engine=engines, max_puzzles=19)


def test_the_report_shows_what_the_models_agree_on(tmp_path):
    engines = [FakeEngine(model="a<"), FakeEngine(model="b"), FakeEngine(wrong_about_b, model="c")]
    adata = annotate(engine=engines)
    path = scverse_plugin.report(adata, tmp_path / "a.html")
    html = path.read_text()
    assert "<dt>agreement of models</dt><dd>83%</dd>" in html and "all 3 on 2 of 4 groups" in html
    rows = re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', html)
    assert '<th scope="col">agreement</th>' in html
    assert [row for row in rows if "of 4" in row[1]] == [("a&lt;", "4 of 4"), ("b", "4 of 4"), ("c", "2 of 4")]
    assert "67% of the models agree (a&lt;: B cell (1.00); b: B cell (1.00); c: monocyte (1.00))" in html
    assert html.count("<td>67%</td>") == html.count("<td>100%</td>") == 2
    plain = scverse_plugin.report(annotate(), tmp_path / "b.html").read_text()
    assert (
        not re.search("agreement|models agree", plain) and 'id="models"' not in plain and 'id="backed_off"' not in plain
    )
    assert overflow(path, 400, tmp_path) == 0


def test_the_report_shows_lists_as_lists_and_texts_as_texts(tmp_path):
    def params(**options):
        html = scverse_plugin.report(annotate(**options), tmp_path / "a.html").read_text()
        [found] = [text for text in re.findall(r"<pre[^>]*>(.*?)</pre>", html, re.DOTALL) if "n_top_genes" in text]
        return json.loads(unescape(found))

    deep = "[" * 100_000
    found = params(engine=FakeEngine(model='["m"]'), context=deep, decoys=["neuron"], exclude_genes=["^MT-"])
    assert (found["model"], found["context"]) == ('["m"]', deep)
    assert (found["decoys"], found["exclude_genes"]) == (["neuron"], ["^MT-"])
    found = params(engine=[FakeEngine(model="["), FakeEngine(model="b")], groups=["0", "1"], context="[1]")
    assert (found["model"], found["groups"], found["context"]) == (["[", "b"], ["0", "1"], "[1]")
    read = [name for name, value in found.items() if isinstance(value, str) and value[:1] in ("[", "{")]
    assert read == ["context"], "all others are lists"


def test_models_without_any_vote_do_not_agree():
    mute = [FakeEngine(lambda puzzle: "no", model=name) for name in "ab"]
    assert (cello1_df(annotate(engine=mute))["agreement"] == 0).all()


def test_an_address_is_that_of_the_servers_among_the_engines():
    with Server(lambda body, n: by_marker(parse_user(body["messages"][-1]["content"]))) as server:
        adata = annotate(model=[None, "m"], engine=[FakeEngine(model="own"), "openai"], base_url=server.url)
    assert set(cello1_df(adata, table="models")["model"]) == {"own", "m"} and len(server.bodies) == 10
    assert json.loads(adata.uns["cello1"]["params"]["base_url"]) == ["", server.url]


def test_one_model_has_no_table_of_models():
    with pytest.raises(ValueError, match="table: the run 'cello1' asked one model"):
        cello1_df(annotate(), table="models")


# ---------------------------------------------------------------------------------------------- through a stub server


def test_the_probe_ends_with_the_first_line():
    stops = []

    class Watched(Scoring):
        def generate(self, requests, sampling):
            stops.append(sampling.stop)
            return super().generate(requests, sampling)

    assert annotate(engine=Watched()).uns["cello1"]["params"]["readout"] == "matrix"
    assert stops[0] == "\nCell 2:" and "\nCell 2:" not in stops[1:]


def test_calibration_through_a_server():
    """Votes that all agree, of a server that is right about three groups in four."""
    with Server(lambda body, n: by_marker(parse_user(body["messages"][-1]["content"]))) as server:
        options = {"engine": "openai", "model": "m", "base_url": server.url}
        adata = annotate(labelled(), groupby="cells", puzzle_size=1, n_votes=2, **options)
        scverse_plugin.tl.calibrate(adata, truth="known")
        known = adata.uns["cello1"]["calibration"]
        assert (known["support"], known["model"], known["n"], known["n_right"]) == ("votes", "m", 40, 30)
        assert known["ece_before"] == pytest.approx(0.25) and known["ece_after"] < 0.1
        found = cello1_df(annotate(calibration=known, **options))
    np.testing.assert_allclose(found["support"], 0.75)
    np.testing.assert_allclose(found["raw_support"], 1)
    np.testing.assert_allclose(found["margin"], 1)


@pytest.mark.parametrize(("sure", "helps"), [(0.75, False), (0.98, True)])
def test_a_calibration_that_does_not_help_says_so(sure, helps, monkeypatch):
    said = []
    monkeypatch.setattr("scverse_plugin.tl._calibrate.logg.warning", said.append)
    adata = annotate(labelled(), engine=Scoring(sure), groupby="cells", puzzle_size=1, n_votes=2)
    scverse_plugin.tl.calibrate(adata, truth="known")
    found = adata.uns["cello1"]["calibration"]
    assert (found["ece_after"] < found["ece_before"]) is helps
    assert any("does not lower the error of support" in text for text in said) is not helps
