import hashlib
import inspect
import io
import json
import logging
import random
import sys
from importlib.metadata import version
from importlib.util import find_spec

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

import scverse_plugin
from recipe.cello1.engines.protocol import EngineError, Failure
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import messages, parse_user
from recipe.cello1.task.puzzle import Puzzle
from scverse_plugin.adata import _store
from scverse_plugin.get import cello1_df
from scverse_plugin.tl._before import is_here
from tests.helpers.stub_server import Server
from tests.helpers.toy_adata import TYPES, FakeEngine, by_marker, toy
from tests.helpers.toy_h5ad import write

annotate = scverse_plugin.tl.annotate


def run(adata=None, cell_types=TYPES, engine=None, groupby="leiden", **options):
    adata = toy() if adata is None else adata
    engine = FakeEngine() if engine is None else engine
    options.setdefault("progress", False)
    result = annotate(adata, cell_types, groupby=groupby, engine=engine, **options)
    return (adata if result is None else result), engine


def labels(adata, key="cello1"):
    return adata.obs[key].astype(object).tolist()


def logged(monkeypatch):
    """What scanpy shows at the verbosity it comes with: warnings."""
    log = io.StringIO()

    def write(self, level, msg, **_):
        if level >= logging.WARNING:
            log.write(f"{msg}\n")

    monkeypatch.setattr(sc.logging._RootLogger, "log", write)
    return log


@pytest.fixture(params=[".h5ad", pytest.param(".zarr", marks=pytest.mark.slow)])  # so many small arrays take seconds
def suffix(request):
    return request.param


def check_round_trip(adata, tmp_path, *suffixes, key="cello1"):
    same_values = {"check_dtype": False, "check_index_type": False}  # pandas 3 reads texts as its own type
    for suffix in suffixes or (".h5ad", ".zarr"):
        if not find_spec({".h5ad": "h5py", ".zarr": "zarr"}[suffix]):  # anndata brings zarr since 0.12
            continue
        path = write(adata, tmp_path / f"a{suffix}")
        found = ad.read_zarr(path) if suffix == ".zarr" else ad.read_h5ad(path)
        pd.testing.assert_series_equal(found.obs[key].astype(object), adata.obs[key].astype(object))
        np.testing.assert_array_equal(found.obsm[f"{key}_votes"], adata.obsm[f"{key}_votes"])
        np.testing.assert_array_equal(found.obs[f"{key}_support"], adata.obs[f"{key}_support"])
        for table in ("groups", "votes", "traces"):
            pd.testing.assert_frame_equal(
                cello1_df(found, key, table=table), cello1_df(adata, key, table=table), **same_values
            )
        pd.testing.assert_frame_equal(found.uns[key]["positions"], adata.uns[key]["positions"], **same_values)
        for part in ("params", "checks"):
            assert {k: str(v) for k, v in found.uns[key][part].items()} == {
                k: str(v) for k, v in adata.uns[key][part].items()
            }
        for part in ("types", "columns"):
            assert found.uns[key][part].tolist() == adata.uns[key][part].tolist()


# ------------------------------------------------------------------------------------------------------- what comes out


def test_labels_groups_and_writes_what_the_docstring_says(tmp_path):
    adata, engine = run()
    assert labels(adata) == adata.obs["truth"].astype(object).tolist()
    assert isinstance(adata.obs["cello1"].dtype, pd.CategoricalDtype)
    assert adata.obs["cello1_support"].dtype == np.float32 and (adata.obs["cello1_support"] == 1).all()
    assert adata.obsm["cello1_votes"].shape == (adata.n_obs, 4) and adata.obsm["cello1_votes"].dtype == np.float32
    stored = adata.uns["cello1"]
    assert sorted(stored) == ["checks", "columns", "groups", "params", "positions", "traces", "types"]
    assert stored["types"].tolist() == sorted(TYPES)
    doc = annotate.__doc__
    for name in (*stored["groups"].columns, *stored["traces"].columns, *stored["checks"]):
        assert f"``{name}``" in doc, name
    assert engine.closed == 0  # the caller's engine is the caller's
    check_round_trip(adata, tmp_path)


def test_nothing_else_is_touched():
    adata = toy()
    adata.uns["leiden_colors"] = ["red"] * 4
    adata.uns["cello1_colors"] = ["red"]
    before = adata.copy()
    run(adata)
    assert set(adata.obs) - set(before.obs) == {"cello1", "cello1_support"}
    assert set(adata.obsm) - set(before.obsm) == {"cello1_votes"}
    assert set(adata.uns) == {"leiden_colors", "cello1"}
    pd.testing.assert_frame_equal(adata.obs[before.obs.columns], before.obs)
    assert (adata.X != before.X).nnz == 0


def test_same_seed_same_result_and_no_global_seed():
    np.random.seed(1)
    random.seed(1)
    torch = sys.modules.get("torch")
    state, plain = np.random.get_state()[1].copy(), random.getstate()
    of_torch = torch.random.get_rng_state() if torch else None
    first, _ = run(rng=3, temperature=0.5)
    second, _ = run(rng=3, temperature=0.5)
    third, _ = run(rng=np.random.default_rng(3), temperature=0.5)
    pd.testing.assert_frame_equal(first.uns["cello1"]["traces"], second.uns["cello1"]["traces"])
    assert (np.random.get_state()[1] == state).all() and random.getstate() == plain
    assert torch is None or torch.equal(torch.random.get_rng_state(), of_torch)
    # A generator's run is repeated with the seed it has left.
    again, _ = run(rng=int(third.uns["cello1"]["params"]["seed"]), temperature=0.5)
    pd.testing.assert_frame_equal(again.uns["cello1"]["traces"], third.uns["cello1"]["traces"])
    assert (again.uns["cello1"]["traces"]["seed"] >= 0).all()


def test_puzzles_never_mix_donors_and_say_whose_they_are():
    adata, engine = run(sample_key="donor", n_votes=4)
    donor_of = adata.obs["donor"].astype(str).to_dict()
    for cells, sample in zip(*[cello1_df(adata, table="traces")[c] for c in ("cells", "sample")], strict=True):
        assert {donor_of[cell] for cell in cells} == {sample}
    contexts = {puzzle.context for puzzle, _ in engine.asked}
    assert contexts == {f"The cell is from a {sex}, originating from the blood" for sex in ("male", "female")}
    assert labels(adata) == adata.obs["truth"].astype(object).tolist()


def test_metadata_that_differ_within_a_puzzle_are_left_out():
    _, engine = run(n_votes=3)
    assert "The cell is from, originating from the blood" in {puzzle.context for puzzle, _ in engine.asked}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context": "From a mouse."}, "From a mouse."),
        ({"context": ""}, ""),
        ({"context_keys": ["tissue"]}, "The cell is from, originating from the blood"),
        ({"context_keys": {"donor": "Donor {value}."}, "sample_key": "donor"}, "The cell is from Donor d0."),
        ({"context": {"d0": "Zero.", "d1": "One."}, "sample_key": "donor"}, "Zero."),
    ],
)
def test_context(options, expected):
    _, engine = run(n_votes=4, **options)
    assert expected in {puzzle.context for puzzle, _ in engine.asked}


def test_samples_with_lists_of_their_own(tmp_path, suffix):
    lists = {"d0": TYPES, "d1": [*TYPES[:3], "plasma cell"]}
    adata, engine = run(cell_types=lists, sample_key="donor", one_to_one=False)
    found = cello1_df(adata)
    assert found.loc[("3", "d0"), "label"] == "monocyte"
    assert len(found) == 8 and found.index.names == ["group", "sample"]
    assert "monocyte" not in set(labels(adata[adata.obs["donor"] == "d1"]))
    assert all(set(p.candidates) <= set(TYPES) | {"plasma cell"} for p, _ in engine.asked)
    assert cello1_df(adata, table="votes").shape == (8, 5)
    check_round_trip(adata, tmp_path, suffix)


def test_every_cell(tmp_path, suffix):
    adata, engine = run(toy(n_per_group=3), groupby=None, n_votes=2)
    assert labels(adata) == adata.obs["truth"].astype(object).tolist()
    assert {puzzle.n_cells for puzzle, _ in engine.asked} == {1}
    assert len(engine.asked) == len({puzzle for puzzle, _ in engine.asked}) == 24
    check_round_trip(adata, tmp_path, suffix)


def coin_flip(puzzle):
    """Answer by a hash of the prompt: the same to the same question, and without any knowledge."""
    order = sorted(puzzle.candidates, key=lambda name: hashlib.sha256(f"{puzzle}{name}".encode()).digest())
    return format_answer(order[: puzzle.n_cells])


def test_a_question_asked_again_is_no_further_vote():
    adata, engine = run(toy(n_per_group=5), engine=FakeEngine(coin_flip), groupby=None, min_support=0)
    found = cello1_df(adata)
    assert (found["votes"] == 10).all() and len({puzzle for puzzle, _ in engine.asked}) == 200
    assert (found["support"] < 1).all() and (found["entropy"] > 0.5).all()
    # Of two types there are two orders: two votes, whatever n_votes says.
    adata, _ = run(toy(types=TYPES[:2]), engine=FakeEngine(coin_flip), cell_types=TYPES[:2], groupby=None)
    assert (cello1_df(adata)["votes"] == 2).all()
    # Sampling answers the same question anew.
    adata, engine = run(toy(n_per_group=2), groupby=None, temperature=1.0)
    assert (cello1_df(adata)["votes"] == 10).all()
    assert {puzzle.candidates for puzzle, _ in engine.asked} == {tuple(sorted(TYPES))}


def test_a_model_that_flips_coins_shows_no_mixtures():
    adata = toy(n_per_group=50, types=[*TYPES, "plasma cell"])
    mixed = 0
    for seed in range(5):
        run(adata, [*TYPES, "plasma cell"], FakeEngine(coin_flip), puzzle_size=1, rng=seed)
        mixed += int(cello1_df(adata)["mixed"].sum())
    assert mixed <= 2  # of 25


def test_an_answer_that_names_one_type_for_all_counts_for_no_group(monkeypatch, tmp_path):
    log = logged(monkeypatch)
    same = FakeEngine(lambda puzzle: f"<think></think>\n<answer>{' | '.join(['B cell'] * puzzle.n_cells)}</answer>")
    adata, _ = run(engine=same)
    found = cello1_df(adata)
    assert set(found["status"]) == {"no_votes"} and (found["failures"] == found["puzzles"]).all()
    assert adata.uns["cello1"]["checks"]["n_repeated"] == 10
    assert set(adata.uns["cello1"]["traces"]["status"]) == {"duplicate"}
    assert "10 answers name a type twice: they count only for the groups whose type stands in" in log.getvalue()
    assert "10 answers name a type twice" in scverse_plugin.report(adata, tmp_path / "a.html").read_text()


def test_of_an_answer_that_names_a_type_twice_the_rest_counts():
    def answer(puzzle):  # right but for B cells, which are called monocytes
        types = {"MS4A1": "monocyte", "NKG7": "NK cell", "CD3D": "T/NK cell", "LYZ": "monocyte"}
        named = [next(types[gene] for gene in cell if gene in types) for cell in puzzle.cells]
        return f"<think></think>\n<answer>{' | '.join(named)}</answer>"

    adata, _ = run(engine=FakeEngine(answer))
    found = cello1_df(adata)
    assert found["label"].tolist() == ["Unassigned", "NK cell", "T/NK cell", "Unassigned"]
    assert found["votes"].tolist() == [0, 10, 10, 0] and found["failures"].tolist() == [10, 0, 0, 10]
    assert adata.uns["cello1"]["checks"]["n_repeated"] == 10


def test_only_some_groups(tmp_path, suffix):
    adata = toy()
    adata.obs.loc["cell0", "leiden"] = np.nan
    adata, _ = run(adata, groups=["1", "3"])
    inside = adata.obs["leiden"].isin(["1", "3"])
    assert adata.obs["cello1"].isna().tolist() == (~inside).tolist()
    assert adata.obs["cello1"].cat.categories.tolist() == ["NK cell", "monocyte"]
    check_round_trip(adata, tmp_path, suffix)


def test_group_names_are_compared_whole():
    adata = toy(types=TYPES[:2])
    adata.obs["leiden"] = adata.obs["leiden"].cat.rename_categories({"0": "1", "1": "10"})
    adata, _ = run(adata, cell_types=TYPES[:2], groups=["1"])
    assert adata.obs["cello1"].notna().sum() == 20


@pytest.mark.parametrize("n_types", [1, 2, 3])
def test_fewer_types_than_groups(n_types):
    types = TYPES[:n_types]
    adata, engine = run(cell_types=types, one_to_one="auto")
    found = cello1_df(adata)
    assert set(found["best"]) <= set(types)
    assert found.loc["0", "best"] == "B cell"
    assert not adata.uns["cello1"]["params"]["one_to_one"]
    assert all(puzzle.n_cells <= max(1, n_types // 2) for puzzle, _ in engine.asked)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_more_types_than_groups(n_groups):
    adata, _ = run(toy(types=TYPES[:n_groups]), cell_types=[*TYPES, "plasma cell"])
    assert cello1_df(adata)["label"].tolist() == TYPES[:n_groups]


def test_one_group_and_one_type():
    adata, engine = run(toy(types=["B cell"]), cell_types=["B cell"])
    assert set(labels(adata)) == {"B cell"}
    assert engine.asked[0][0].candidates == ("B cell",)


def test_types_that_do_not_fit_one_puzzle_are_screened(tmp_path, suffix):
    many = [*TYPES, *(f"other type {i}" for i in range(30))]
    adata, engine = run(cell_types=many, n_candidates=6, n_votes=6)
    assert {len(puzzle.candidates) for puzzle, _ in engine.asked} == {6}
    assert cello1_df(adata)["label"].tolist() == TYPES
    traces = cello1_df(adata, table="traces")
    shown = {name for names in traces.loc[traces["screening"], "candidates"] for name in names}
    assert shown == set(many)
    check_round_trip(adata, tmp_path, suffix)


def test_two_groups_of_one_type():
    adata = toy()
    adata.obs["leiden"] = pd.Categorical(adata.obs["leiden"].astype(str) + np.where(np.arange(80) % 20 < 10, "a", "b"))
    adata, _ = run(adata, n_votes=20)
    assert labels(adata) == adata.obs["truth"].astype(object).tolist()


@pytest.mark.parametrize("one_to_one", [False, "auto"])
def test_one_to_one_is_off_unless_asked(one_to_one):
    same = FakeEngine(lambda puzzle: format_answer(["B cell"]))
    adata, _ = run(engine=same, puzzle_size=1)  # four groups and four types, by chance
    assert cello1_df(adata)["label"].unique().tolist() == ["B cell"]
    adata, _ = run(engine=same, puzzle_size=1, one_to_one=one_to_one)
    assert cello1_df(adata)["label"].unique().tolist() == ["B cell"]
    assert not adata.uns["cello1"]["params"]["one_to_one"]


def test_one_to_one_that_is_asked():
    same = FakeEngine(lambda puzzle: format_answer(["B cell"]))
    adata, _ = run(engine=same, min_support=0, puzzle_size=1, one_to_one=True)
    assert cello1_df(adata)["best"].nunique() == 4
    # Only what the votes carry is a label.
    assert (cello1_df(adata)["label"] == "Unassigned").sum() == 3


def test_decoys_are_counted_and_never_a_label(tmp_path, suffix):
    adata, _ = run(decoys=["neuron", "hepatocyte"])
    assert adata.uns["cello1"]["checks"]["decoy_rate"] == 0
    check_round_trip(adata, tmp_path, suffix)
    adata, _ = run(cell_types=TYPES[:3], decoys=["plasma cell", "neuron"], puzzle_size=1)
    found = cello1_df(adata)
    assert "plasma cell" not in set(found["label"])
    engine = FakeEngine(
        lambda p: format_answer(["neuron"] + [c for c in p.candidates if c != "neuron"][: p.n_cells - 1])
    )
    adata, _ = run(engine=engine, decoys=["neuron"], puzzle_size=1)
    assert set(cello1_df(adata)["status"]) == {"decoy"} and set(labels(adata)) == {"Unassigned"}
    assert adata.uns["cello1"]["checks"]["decoy_rate"] == 1


def test_mixed_groups_are_flagged():
    adata = toy()
    adata.obs["leiden"] = pd.Categorical(np.where(adata.obs["leiden"].isin(["0", "1"]), "mix", adata.obs["leiden"]))
    adata, _ = run(adata, puzzle_size=1, n_votes=20, cells_per_group=10)
    found = cello1_df(adata)
    assert found["mixed"].to_dict() == {"2": False, "3": False, "mix": True}
    assert found.loc["mix", "cell_gap"] > 0.25 and found.loc["2", "cell_gap"] == 0


def test_position_bias_is_measured():
    def biased(puzzle):  # right on the first cell only
        return format_answer(sorted(puzzle.candidates)[: puzzle.n_cells])

    adata, _ = run(engine=FakeEngine(biased), n_votes=30, one_to_one=False, min_support=0)
    fair, _ = run(n_votes=30)
    assert adata.uns["cello1"]["positions"]["votes"].tolist() == [30] * 4
    assert np.isnan(fair.uns["cello1"]["checks"]["position_p_value"])  # all right: nothing to compare
    assert fair.uns["cello1"]["positions"]["agreement"].tolist() == [1] * 4
    assert adata.uns["cello1"]["positions"]["agreement"].max() < 1


@pytest.mark.parametrize(
    "text", ["", "nonsense", "<think></think>\n<answer>x | y | z | w</answer>", "B cell | NK cell"]
)
@pytest.mark.slow
def test_nonsense_never_becomes_a_label(text, tmp_path):
    adata, _ = run(engine=FakeEngine(lambda puzzle: text))
    assert set(labels(adata)) == {"Unassigned"}
    found = cello1_df(adata)
    assert set(found["status"]) == {"no_votes"} and (found["failures"] == found["puzzles"]).all()
    assert (found["best"] == "").all()
    check_round_trip(adata, tmp_path)


def test_a_label_that_is_nearly_one_is_none():
    near = {"B cell": "B cells", "NK cell": "NK", "T/NK cell": "T/NK  cell", "monocyte": "Monocyte."}

    def answer(puzzle):
        found = by_marker(puzzle)
        for name, other in near.items():
            found = found.replace(f"{name} |", f"{other} |").replace(f"{name}</answer>", f"{other}</answer>")
        return found

    adata, _ = run(engine=FakeEngine(answer))
    found = cello1_df(adata)
    assert set(labels(adata)) == {"Unassigned"} and set(found["status"]) == {"no_votes"}
    assert (found["failures"] == found["puzzles"]).all() and not adata.obsm["cello1_votes"].any()


def test_text_that_hdf5_cannot_hold_is_kept_readable(tmp_path, suffix):
    adata, _ = run(engine=FakeEngine(lambda puzzle: "\0 \ud800 text"))
    check_round_trip(adata, tmp_path, suffix)


def test_ties_are_no_labels():
    engine = FakeEngine(lambda p: format_answer([TYPES[int(p.cells[0][0] == "MS4A1" and len(engine.asked) % 2)]]))
    adata, _ = run(toy(types=["B cell"]), engine=engine, n_votes=10, cells_per_group=10)
    assert cello1_df(adata).loc["0", "status"] == "tie"
    assert set(labels(adata)) == {"Unassigned"}


def test_dry_run_returns_prompts_and_changes_nothing():
    adata = toy()
    before = adata.copy()
    prompts = annotate(adata, TYPES, groupby="leiden", model="nowhere", dry_run=True, n_votes=3)
    assert [message["role"] for message in prompts[0]] == ["system", "user"]
    assert len(prompts) == 3
    assert set(adata.uns) == set(before.uns) and set(adata.obs) == set(before.obs)
    _, engine = run(n_votes=3)
    assert [list(map(dict, request.messages)) for _, request in engine.asked] == prompts


@pytest.mark.slow
def test_copy_view_and_no_reasoning(tmp_path):
    adata = toy()
    other, _ = run(adata, copy=True, store_reasoning=False)
    assert "cello1" in other.obs and "cello1" not in adata.obs
    assert not {"puzzle", "reasoning", "response"} & set(other.uns["cello1"]["traces"])
    check_round_trip(other, tmp_path)
    view = adata[:40]
    run(view, cell_types=TYPES)
    check_round_trip(view, tmp_path)
    assert labels(view) == view.obs["truth"].astype(object).tolist() and not view.is_view
    assert "cello1" not in adata.obs


def test_second_run_replaces_the_first(tmp_path):
    adata, _ = run()
    adata.uns["cello1_colors"] = adata.uns["cello1_ontology_term_id_colors"] = ["red"] * 4
    _store.write_ontology(adata, "cello1", pd.Series("CL:0", adata.obs_names))
    adata.write_h5ad(tmp_path / "a.h5ad")
    for found in (adata, ad.read_h5ad(tmp_path / "a.h5ad")):
        run(found, cell_types=TYPES[:2], groups=["0", "1"])
        assert "cello1_colors" not in found.uns and "cello1_ontology_term_id_colors" not in found.uns
        assert "cello1_ontology_term_id" not in found.obs
        assert found.uns["cello1"]["types"].tolist() == TYPES[:2]


def test_second_run_leaves_a_column_of_the_user_alone():
    adata, _ = run()
    adata.obs["cello1_ontology_term_id"] = "mine"
    with pytest.raises(
        ValueError, match=r"would overwrite adata.obs\['cello1_ontology_term_id'\], which cello1 has not"
    ):
        run(adata)
    with pytest.raises(ValueError, match=r"would overwrite adata.obs\['cello1_ontology_term_id'\]"):
        scverse_plugin.tl.ontology_ids(adata)
    assert (adata.obs["cello1_ontology_term_id"] == "mine").all()


def test_backed_objects_that_cannot_be_written_are_refused_before_anything_is_asked(tmp_path):
    toy().write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    engine = FakeEngine()
    with pytest.raises(ValueError, match=r"adata is a view of a backed object.*whole.to_memory\(\)\[cells\]"):
        run(backed[:40], engine=engine)
    with pytest.raises(ValueError, match=r"copy=True cannot copy a backed object; pass adata.to_memory\(\)"):
        run(backed, engine=engine, copy=True)
    assert not engine.asked
    adata, _ = run(backed.to_memory()[:40], engine=engine)
    assert "cello1" in adata.obs
    backed.file.close()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_backed_objects_whose_file_reads_another_are_refused(tmp_path, mode):
    toy().write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "secret").write_bytes(b"x" * 14400)
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["X"]
        file.create_dataset("X", (80, 45), "f4", external=[(str(tmp_path / "secret"), 0, 14400)])
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed=mode)
    engine = FakeEngine()
    with pytest.raises(ValueError, match="adata: .*a.h5ad: its X lies in another file, .*secret; copy the data"):
        run(backed, engine=engine)
    assert not engine.asked
    backed.file.close()


def test_what_is_to_be_said_of_gene_names_is_said(monkeypatch):
    said = logged(monkeypatch)
    adata = toy()
    names = adata.var_names.tolist()
    names[6], names[7], names[9], names[11] = f"{names[5]}-1", f"{names[5]}-2", "HLA.A", ""
    adata.var_names = names
    run(adata, mask_var="half")
    assert "adata.var: " not in said.getvalue()  # what is hidden on request is not missing
    run(adata, key_added="other")
    assert [text for text in said.getvalue().splitlines() if text.startswith("adata.var: ")] == [
        "adata.var: 1 genes without a name left out",
        "adata.var: 1 gene names that R had changed are mended (HLA.A is HLA-A)",
        "adata.var: 2 gene names look like repeats made unique (TBCE-1 beside TBCE): they count as genes of their own",
    ]


def test_constraint_is_asked_of_engines_that_have_it():
    _, engine = run(engine=FakeEngine(constraint="exact"))
    assert all(request.n_answers == puzzle.n_cells for puzzle, request in engine.asked)
    assert all(request.candidates == puzzle.candidates for puzzle, request in engine.asked)
    _, engine = run(engine=FakeEngine(constraint="exact"), constrained=False)
    assert not any(request.n_answers for _, request in engine.asked)


# ------------------------------------------------------------------------------------------ expression


@pytest.mark.parametrize("matrix", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
def test_every_kind_of_matrix_gives_the_same_prompts(matrix):
    expected = annotate(toy(), TYPES, groupby="leiden", model="m", dry_run=True)
    assert annotate(toy(matrix=matrix), TYPES, groupby="leiden", model="m", dry_run=True) == expected


@pytest.mark.slow
def test_backed_and_dask(tmp_path):
    da = pytest.importorskip("dask.array")

    expected = annotate(toy(), TYPES, groupby="leiden", model="m", dry_run=True)
    for kind in (np.asarray, sp.csr_matrix):
        toy(matrix=kind).write_h5ad(tmp_path / "a.h5ad")
        backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
        assert annotate(backed, TYPES, groupby="leiden", model="m", dry_run=True) == expected
        run(backed)
        assert labels(backed) == backed.obs["truth"].astype(object).tolist()
        check_round_trip(backed.to_memory(), tmp_path / kind.__name__)
        backed.write_h5ad(tmp_path / "b.h5ad")  # as it is, too
        assert labels(ad.read_h5ad(tmp_path / "b.h5ad")) == labels(backed)
        backed.file.close()
    lazy = toy(matrix=np.asarray)
    lazy.X = da.from_array(lazy.X, chunks=(30, 45))
    assert annotate(lazy, TYPES, groupby="leiden", model="m", dry_run=True) == expected
    run(lazy)
    check_round_trip(lazy, tmp_path / "dask")


def test_genes_come_from_where_they_should():
    adata = toy()
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata = adata[:, 10:].copy()  # X lacks the markers, raw has them
    for options, marker in (
        ({}, True),
        ({"use_raw": True}, True),
        ({"use_raw": False}, False),
        ({"layer": "counts"}, False),
    ):
        _, engine = run(adata.copy(), n_votes=1, **options)
        assert any("LYZ" in cell for puzzle, _ in engine.asked for cell in puzzle.cells) == marker
    _, engine = run(n_votes=1, n_top_genes=3, mask_var="half", exclude_genes=["^GENE1"], rank_by="specificity")
    listed = {gene for puzzle, _ in engine.asked for cell in puzzle.cells for gene in cell}
    assert "NKG7" not in listed and not any(gene.startswith("GENE1") for gene in listed)
    assert all(len(cell) <= 3 for puzzle, _ in engine.asked for cell in puzzle.cells)


def test_symbols_of_a_column_that_repeat_count_once():
    for matrix in (np.asarray, sp.csr_matrix):
        adata = toy(matrix=matrix)
        adata.var["symbol"] = ["SAME" if name in ("GENE1", "GENE2") else name for name in adata.var_names]
        adata.var.index = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
        _, engine = run(adata, gene_symbols="symbol", n_votes=1)
        cells = [cell for puzzle, _ in engine.asked for cell in puzzle.cells]
        assert any("SAME" in cell for cell in cells) and all(len(set(cell)) == len(cell) for cell in cells)


def test_representative_cells():
    adata, _ = run(cell_choice="representative", cells_per_group=2)
    assert labels(adata) == adata.obs["truth"].astype(object).tolist()
    assert (cello1_df(adata)["cells_asked"] == 2).all()


# ------------------------------------------------------------------------------------------ engines and caches


def test_cache_asks_only_what_is_missing(tmp_path):
    cache = tmp_path / "answers.jsonl"
    whole, engine = run(n_votes=6)
    total = len(engine.asked)

    def dies(puzzle):
        return Failure("server gone") if len(first.asked) > 3 else engine.answer(puzzle)

    first = FakeEngine(dies)
    with pytest.raises(EngineError, match=r"3 of 6 puzzles have no answer \(server gone\).*run the same call again"):
        run(engine=first, n_votes=6, cache=cache)
    assert len(first.asked) == 4  # after the failure nothing more is asked
    second = FakeEngine()
    adata, _ = run(engine=second, n_votes=6, cache=cache)
    assert len(second.asked) == total - 3
    assert labels(adata) == labels(whole)
    assert adata.uns["cello1"]["traces"]["cached"].sum() == 3
    third = FakeEngine()
    again, _ = run(engine=third, n_votes=6, cache=cache)
    assert not third.asked
    pd.testing.assert_frame_equal(again.uns["cello1"]["groups"], adata.uns["cello1"]["groups"])
    for other in ({"temperature": 0.5}, {"max_tokens": 9}, {"engine": FakeEngine(model="other")}):
        asked = run(**({"engine": FakeEngine()} | other), n_votes=6, cache=cache)[1].asked
        assert len(asked) == total


def test_answers_that_are_all_cut_are_said_so_instead_of_asked_on(tmp_path):
    cut = FakeEngine(lambda puzzle: "<think>on and on", finish_reason="length")
    with pytest.raises(EngineError, match="all 4 answers were cut at max_tokens=99; raise it"):
        run(engine=cut, n_votes=30, max_tokens=99, cache=tmp_path / "a.jsonl")
    assert len(cut.asked) == 4


@pytest.mark.parametrize("constrained", [True, False])
def test_answers_of_which_none_can_be_read_are_said_so_instead_of_asked_on(tmp_path, constrained, monkeypatch):
    def engine(n_good=0):
        return FakeEngine(
            lambda puzzle: by_marker(puzzle) if len(made.asked) <= n_good else "I cannot help with medical advice."
        )

    log = logged(monkeypatch)
    options = {"n_votes": 30, "constrained": constrained}
    made = engine()
    match = "none of the 20 answers so far can be read; the first is 'I cannot help.*prompt_layout.*on_error='skip'"
    with pytest.raises(EngineError, match=match):
        run(engine=made, cache=tmp_path / "a.jsonl", **options)
    assert len(made.asked) == 20
    made = engine()
    with pytest.raises(EngineError, match=match):  # what is kept is not asked again
        run(engine=made, cache=tmp_path / "a.jsonl", **options)
    assert not made.asked
    made = engine()
    adata, _ = run(engine=made, on_error="skip", **options)
    assert len(made.asked) == 30 and set(labels(adata)) == {"Unassigned"}
    assert "30 of 30 answers could not be read: see status" in log.getvalue()
    made = engine(n_good=1)
    adata, _ = run(engine=made, **options)
    assert len(made.asked) == 30 and "29 of 30 answers could not be read" in log.getvalue()
    page = scverse_plugin.report(adata, tmp_path / "r.html").read_text()
    assert "29 of 30 answers could not be read" in page and "were cut" not in page


def test_a_failure_before_the_first_answer_speaks_of_no_kept_ones(tmp_path):
    with pytest.raises(EngineError) as caught:
        run(engine=FakeEngine(lambda puzzle: Failure("no such model")), cache=tmp_path / "a.jsonl")
    assert "run the same call again" in str(caught.value) and "kept" not in str(caught.value)


def test_a_cache_of_unchecked_replies_heals(tmp_path):
    cache = tmp_path / "answers.jsonl"
    whole, engine = run(cache=cache)
    records = [json.loads(line) for line in cache.read_text().splitlines()]
    for record, (name, value) in zip(
        records, [("text", ["x"]), ("tokens", None), ("finish_reason", 7), ("prompt_tokens", "9")], strict=False
    ):
        record[name] = value
    cache.write_text("".join(json.dumps(record) + "\n" for record in records))
    again, engine = run(engine=FakeEngine(), cache=cache)
    assert len(engine.asked) == 4
    assert labels(again) == labels(whole)
    assert not run(engine=FakeEngine(), cache=cache)[1].asked


def test_failures_can_be_skipped(tmp_path, suffix):
    engine = FakeEngine(lambda p: Failure("no memory") if len(engine.asked) % 2 else FakeEngine().answer(p))
    adata, _ = run(engine=engine, on_error="skip")
    assert labels(adata) == adata.obs["truth"].astype(object).tolist()
    assert adata.uns["cello1"]["checks"]["n_errors"] == 5
    assert (cello1_df(adata)["failures"] == 5).all()
    check_round_trip(adata, tmp_path, suffix)


def test_no_secret_is_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    adata = toy()
    with Server(lambda body, n: "nonsense") as server:
        options = {"constrained": False, "engine_options": {"server": "other", "retries": 0}}
        annotate(
            adata, TYPES, groupby="leiden", engine="openai", model="m", base_url=server.url, progress=False, **options
        )
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert b"sk-secret" not in (tmp_path / "a.h5ad").read_bytes()
    assert adata.uns["cello1"]["params"]["base_url"] == server.url
    assert json.loads(adata.uns["cello1"]["params"]["engine_options"]) == {"retries": 0}


def test_what_is_recorded_of_server_engine_and_mask(monkeypatch):
    adata = toy()
    mask = adata.var["half"].to_numpy()
    with Server(lambda body, n: "nonsense") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("http://", "http://user:secret@"))
        options = {"engine": "openai", "model": "m", "constrained": False, "engine_options": {"server": "other"}}
        annotate(adata, TYPES, groupby="leiden", mask_var=mask, progress=False, **options)
    params = adata.uns["cello1"]["params"]
    assert params["base_url"] == server.url
    assert params["engine_version"] == version("openai")
    kept = json.loads(params["mask_var"])
    assert (kept["kept"], kept["of"]) == (int(mask.sum()), len(mask)) and len(kept["sha256"]) == 64


def test_signature_follows_the_convention():
    for function in (scverse_plugin.tl.annotate, scverse_plugin.tl.ontology_ids):
        parameters = list(inspect.signature(function).parameters.values())
        assert parameters[0].name == "adata" and parameters[-1].name == "copy" and parameters[-1].default is False
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    for name in scverse_plugin.pl.__all__:
        parameters = inspect.signature(getattr(scverse_plugin.pl, name)).parameters
        assert {"show", "save", "ax", "return_fig"} <= set(parameters)


# ------------------------------------------------------------------------------------- what is taken as scanpy takes it


def test_texts_are_groups_and_missing_ones_get_no_label(monkeypatch):
    log = logged(monkeypatch)
    adata = toy()
    adata.obs["text"] = adata.obs["leiden"].astype(object)
    adata.obs.loc["cell0", "text"] = np.nan
    adata.obs.loc["cell1", "text"] = "Unknown"
    adata.obs.loc["cell2", "text"] = " "
    run(adata, groupby="text")
    found = cello1_df(adata)
    assert found.index.tolist() == ["0", "1", "2", "3"] and found.loc["0", "n_cells"] == 17
    assert adata.obs["cello1"].isna().tolist() == [True] * 3 + [False] * 77
    assert adata.obs["text"].dtype == object  # the column stays as it was
    assert "3 cells have no group in adata.obs['text']" in log.getvalue()
    assert cello1_df(adata, table="votes").shape == (4, 4)


def test_the_remedy_for_numbers_makes_no_group_of_missing_ones():
    adata = toy()
    adata.obs["number"] = adata.obs["leiden"].astype(float)
    adata.obs.iloc[0, adata.obs.columns.get_loc("number")] = np.nan
    with pytest.raises(ValueError, match="must be categorical") as raised:
        run(adata, groupby="number")
    exec(str(raised.value).split("convert it first: ")[1], {"adata": adata})
    run(adata, groupby="number")
    assert cello1_df(adata).index.tolist() == ["0.0", "1.0", "2.0", "3.0"] and adata.obs["cello1"].isna().sum() == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda adata: adata.obs["truth"].unique(),
        lambda adata: set(TYPES),
        lambda adata: dict.fromkeys(TYPES).keys(),
        lambda adata: (name for name in TYPES),
        lambda adata: pd.Index(TYPES),
        lambda adata: np.array(TYPES),
        lambda adata: [*TYPES[:-1], "mono\u200bcyte", np.nan, "unknown", "", None],
        lambda adata: [*TYPES, "N/A", "n.a.", "-", "?", "NULL", "Not available", "Unassigned", pd.NA, pd.NaT],
        lambda adata: adata.obs["truth"],
        lambda adata: adata.obs["truth"].values,
        lambda adata: adata.obs["truth"].astype(str).to_numpy(),
        lambda adata: adata.obs["truth"].astype("string").array,
        lambda adata: "truth",
    ],
)
def test_any_iterable_is_a_list_of_types_and_unknown_is_none(make):
    adata = toy()
    adata.obs["truth"] = adata.obs["truth"].cat.add_categories(["unknown", "nan"])
    adata.obs.loc["cell0", "truth"] = "unknown"
    adata.obs.loc["cell1", "truth"] = np.nan
    adata.obs.loc["cell2", "truth"] = "nan"
    _, engine = run(adata, make(adata), n_votes=2)
    assert {puzzle.candidates for puzzle, _ in engine.asked} == {tuple(sorted(TYPES))}


@pytest.mark.parametrize("said", ["N/A", "-", "?", "Missing", "not_reported", "Unassigned", "NaT", "unknown cells"])
def test_a_group_that_says_nothing_gets_no_label(said, monkeypatch):
    log, adata = logged(monkeypatch), toy()
    adata.obs["leiden"] = adata.obs["leiden"].cat.rename_categories({"1": said})
    run(adata, n_votes=1)
    assert cello1_df(adata).index.tolist() == ["0", "2", "3"] and adata.obs["cello1"].isna().sum() == 20
    assert "20 cells have no group in adata.obs['leiden']" in log.getvalue()


@pytest.mark.parametrize("name", ["NK", "NA cell", "+", "CD4-", "NAT", "other", "-1"])
def test_a_group_that_only_looks_like_nothing_is_one(name):
    adata = toy()
    adata.obs["leiden"] = adata.obs["leiden"].cat.rename_categories({"1": name})
    run(adata, n_votes=1)
    assert name in cello1_df(adata).index and adata.obs["cello1"].notna().all()


def test_features_that_are_no_genes_are_left_out():
    adata = toy()
    adata.var["feature_types"] = pd.Categorical(["Gene Expression"] * 44 + ["Antibody Capture"])
    adata.X = adata.X.toarray()
    adata.X[:, -1] = 1000
    _, engine = run(adata, n_votes=1)
    assert not any("GENE39" in cell for puzzle, _ in engine.asked for cell in puzzle.cells)


@pytest.mark.parametrize("excluded", [False, True])
def test_lists_of_housekeeping_genes_are_noted(excluded, monkeypatch):
    log = logged(monkeypatch)
    adata = toy()
    adata.var_names = [f"RPL{i}" if name.startswith("GENE") else name for i, name in enumerate(adata.var_names)]
    run(adata, n_votes=1, exclude_genes=["housekeeping"] if excluded else [])
    assert ("of the listed genes are housekeeping genes" in log.getvalue()) is not excluded


# -------------------------------------------------------------------------------------------- before anything is asked


def test_the_instruction_says_what_is_true_of_spare_candidates():
    published = messages(Puzzle((("A",),), ("x",)))[0]["content"]
    _, engine = run(n_votes=2)
    assert {request.messages[0]["content"] for _, request in engine.asked} == {published}  # as many types as cells
    _, engine = run(n_votes=2, puzzle_size=3)
    told = {request.messages[0]["content"] for _, request in engine.asked}
    assert not any("each candidate must be assigned" in text for text in told)
    assert all(
        "more than there are cells: each cell must be assigned to exactly one candidate" in text for text in told
    )


def test_a_dry_run_says_how_much_it_would_be(capsys):
    options = {"groupby": "leiden", "model": "nowhere", "n_votes": 3, "max_tokens": 100}
    prompts = annotate(toy(), TYPES, dry_run=True, price_per_million_tokens=(2, 10), **options)
    length = sum(len(message["content"]) for prompt in prompts for message in prompt)
    assert (prompts.n_puzzles, prompts.max_answer_tokens) == (len(prompts), 300) == (3, 300)
    assert prompts.prompt_tokens == pytest.approx(length / 3, abs=1)
    assert prompts.max_price == pytest.approx((2 * prompts.prompt_tokens + 10 * 300) / 1e6)
    assert annotate(toy(), TYPES, dry_run=True, **options).max_price is None
    run(n_votes=3, max_tokens=100, price_per_million_tokens=2000, progress=True)
    said = capsys.readouterr().err.splitlines()[0]
    assert f"asks 3 puzzles: about {prompts.prompt_tokens:,} tokens of prompts, at most 300 of answers" in said
    assert f"price at most {2000 * (prompts.prompt_tokens + 300) / 1e6:.2f}" in said


class Elsewhere(FakeEngine):
    base_url = "https://user:secret@api.example.org/v1"


@pytest.mark.parametrize(
    ("options", "sent", "said"),
    [
        ({}, "", "gene lists, no donor metadata"),
        (
            {"context_keys": ["tissue"]},
            "The cell is from, originating from the blood",
            "gene lists, donor metadata (tissue)",
        ),
        ({"context": "From a mouse."}, "From a mouse.", "gene lists, your context"),
        ({"context": None}, "", "gene lists, no donor metadata"),
    ],
)
def test_donor_metadata_leave_the_machine_only_if_named(options, sent, said, capsys):
    _, engine = run(engine=Elsewhere(), progress=True, **options)
    assert {puzzle.context for puzzle, _ in engine.asked} == {sent}
    line = capsys.readouterr().err.splitlines()[0]
    assert f"sent to https://api.example.org/v1: {said}" in line and "secret" not in line


def test_no_context_if_none_is_wanted():
    _, engine = run(context=None)
    assert {puzzle.context for puzzle, _ in engine.asked} == {""}


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.2/v1", True),
        ("http://[::1]:80/v1", True),
        ("", True),
        ("http://192.168.1.3:8000/v1", False),
        ("https://api.openai.com/v1", False),
        ("http://localhost.example.org/v1", False),
    ],
)
def test_which_addresses_are_this_machine(url, here):
    assert is_here(url) is here


def test_answers_are_kept_without_being_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CELLO1_CACHE", str(tmp_path / "kept"))
    with Server(lambda body, n: by_marker(parse_user(body["messages"][-1]["content"]))) as server:
        options = {"engine": "openai", "model": "m", "base_url": server.url, "constrained": False, "groupby": "leiden"}
        annotate(toy(), TYPES, **options)
        (place,) = (tmp_path / "kept").iterdir()
        assert f"answers are kept in {place}" in capsys.readouterr().err
        asked = len(server.bodies)
        adata = toy()
        annotate(adata, TYPES, **options)
        assert f"{place} (10 there; what is among them is not asked again)" in capsys.readouterr().err
        assert len(server.bodies) == asked == 10 and adata.uns["cello1"]["traces"]["cached"].all()
        annotate(toy(), TYPES, cache=None, **options)
        assert len(server.bodies) == 20


def test_a_list_of_one_type_is_warned_about(monkeypatch):
    log = logged(monkeypatch)
    adata = toy()
    annotate(adata, ["B cell"], groupby="leiden", engine=FakeEngine(), cache=None)
    assert set(adata.obs["cello1"]) == {"B cell"}
    assert "'B cell' is the only candidate, so every group gets it" in log.getvalue()
    log.truncate(0)
    annotate(toy(), ["B cell"], groupby="leiden", engine=FakeEngine(), decoys=["neuron"], cache=None)
    assert "only candidate" not in log.getvalue()


def test_a_warning_names_the_groups_apart_from_what_it_says(monkeypatch):
    log = logged(monkeypatch)
    annotate(toy(), TYPES, groupby="leiden", engine=FakeEngine(lambda puzzle: "no"), cache=None)
    assert "4 of 4 groups (0, 1, 2, 3) got no usable answer: they are not labelled\n" in log.getvalue()
