"""Every option, every refusal."""

import subprocess
import sys
from pathlib import Path

import pytest
import scipy.sparse as sp

from recipe.cello1.data import leaks, options
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.formats.rl_parquet import iter_parquet
from recipe.cello1.task.genes import top_genes
from recipe.cello1.task.prompt import VARIANTS, messages
from tests.helpers.prepare_runs import FEW, ROOT, build, manifest, run
from tests.helpers.toy_h5ad import toy_adata, write


@pytest.mark.parametrize("task", ["batch", "single"])
@pytest.mark.parametrize("candidates", ["given", "open"])
def test_task_and_candidates(folder, tmp_path, task, candidates):
    variant = task + ("_open" if candidates == "open" else "")
    options = ["--task", task, "--candidates", candidates, "--per-size", "12", "--quiet", "--workers", "1"]
    if task == "batch":
        options += ["--sizes", "3"]
    assert run(folder, "--out", tmp_path, *options) == 0
    puzzles = load_puzzles(tmp_path / "train" / "train_data.json", variant).puzzles
    assert {puzzle.n_cells for puzzle in puzzles} == {1 if task == "single" else 3}
    assert all(bool(puzzle.candidates) == (candidates == "given") for puzzle in puzzles)
    rows = list(iter_parquet(tmp_path / "rl" / "train.parquet"))
    assert rows[0]["prompt"] == messages(puzzles[0], variant=variant)
    assert variant in VARIANTS


def test_single_cells_are_all_taken_unless_a_number_is_given(folder, tmp_path):
    one = folder / "lung" / "file0.h5ad"
    assert run(one, "--out", tmp_path, "--task", "single", "--quiet") == 0
    assert sum(part["puzzles"] for part in manifest(tmp_path)["splits"].values()) == 300


def test_cells_without_a_puzzle_are_counted(tmp_path):
    adata = toy_adata(n_cells=300)
    adata.obs["donor_id"] = adata.obs["donor_id"].astype(str).where(adata.obs["cell_type"] != "type 1", "solo")
    path = write(adata, tmp_path / "a.h5ad")
    solo = int((adata.obs["donor_id"] == "solo").sum())
    assert run(path, "--out", tmp_path / "out", "--task", "single", "--quiet") == 0
    (note,) = manifest(tmp_path / "out")["inputs"][0]["notes"]
    assert note.startswith(f"{solo} of 300 cells are in no puzzle")
    adata.obs["donor_id"] = adata.obs["cell_type"].astype(str)
    path = write(adata, tmp_path / "b.h5ad")
    assert run(path, "--out", tmp_path / "out", "--sizes", "3", "--per-size", "0", "--quiet") == 1
    assert "no puzzle (N=3: 0)" in manifest(tmp_path / "out")["inputs"][0]["notes"][0]


def test_puzzle_options(folder, tmp_path):
    options = (
        "--top-genes",
        "20",
        "--max-cells",
        "150",
        "--exclude-genes",
        "^GENE1",
        "--exclude-genes",
        "housekeeping",
    )
    puzzles = build(folder, tmp_path, *options, "--exclude-types", "type [12]", "--min-genes", "20")
    genes = [cell for puzzle in puzzles for cell in puzzle.cells]
    assert {len(cell) for cell in genes} == {20}
    assert not any(gene.startswith("GENE1") for cell in genes for gene in cell)
    assert not {"type 1", "type 2"} & {name for puzzle in puzzles for name in puzzle.answer}
    assert {entry["cells_drawn_from"] for entry in manifest(tmp_path)["inputs"]} == {150}


def test_columns_layer_raw_and_suspension(tmp_path):
    adata = toy_adata(n_cells=300)
    expected = [tuple(genes) for genes in top_genes(adata.X, adata.var["feature_name"], 50)]
    adata.layers["kept"] = adata.X
    adata.raw = adata
    adata.X = sp.csr_matrix(adata.shape, dtype="float32")
    adata.obs = adata.obs.rename(columns={"cell_type": "label", "donor_id": "patient"})
    adata.obs["run"] = ["r1", "r2"] * 150
    adata.obs["suspension_type"] = "nucleus"
    adata.obs["is_primary_data"] = False
    path = write(adata, tmp_path / "a.h5ad")
    options = ["--type-column", "label", "--donor-column", "patient", "--batch-column", "run", "--suspension", "any"]
    options.append("--keep-duplicates")
    for source in (["--layer", "kept"], ["--use-raw"]):
        puzzles = build(path, tmp_path / source[0], *options, *source, "--sizes", "3")
        assert all(set(puzzle.cells) <= set(expected) for puzzle in puzzles)
        assert {puzzle.meta["batch"] for puzzle in puzzles} == {"r1", "r2"}
    assert run(path, "--out", tmp_path / "i", *FEW, *options, "--use-raw", "--gene-column", "index") == 1  # Ensembl ids
    assert "gene_column=feature_name" in manifest(tmp_path / "i")["inputs"][0]["remedy"]


def test_symbols_in_capitals(tmp_path):
    adata = toy_adata(n_cells=200)
    path = write(adata, tmp_path / "cells.h5ad")
    human = build(path, tmp_path / "a")
    adata.var["feature_name"] = [str(name).capitalize() for name in adata.var["feature_name"]]
    path.unlink()
    mouse = write(adata, path)
    assert [p.cells for p in build(mouse, tmp_path / "b", "--capitals")] == [p.cells for p in human]
    assert [p.cells for p in build(mouse, tmp_path / "c")] != [p.cells for p in human]


def test_rank_by(folder, tmp_path):
    by_expression = build(folder, tmp_path / "a")
    by_specificity = build(folder, tmp_path / "b", "--rank-by", "specificity")
    assert [p.meta["cell_ids"] for p in by_expression] == [p.meta["cell_ids"] for p in by_specificity]
    assert [p.cells for p in by_expression] != [p.cells for p in by_specificity]


def test_context_table(tmp_path):
    adata = toy_adata(n_cells=300)
    adata.obs["dose"] = "10 mg"
    path = write(adata, tmp_path / "trial" / "a.h5ad")
    table = tmp_path / "table.yaml"
    table.write_text("fields: {dose: 'The dose was {value}.'}\ndatasets: {trial: [dose]}\n")
    puzzles = build(path, tmp_path / "out", "--context-table", table)
    assert all(puzzle.context.endswith("The dose was 10 mg.") for puzzle in puzzles)
    assert manifest(tmp_path / "out")["settings"]["context"] == table.read_text()


def test_layout(folder, tmp_path):
    puzzles = build(folder, tmp_path, "--layout", "user")
    rows = list(iter_parquet(tmp_path / "rl" / "train.parquet"))
    assert rows[0]["prompt"] == messages(puzzles[0], "user")
    assert rows[0]["extra_info"]["prompt_layout"] == "user"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give either INPUT or --from-hub"),
        (["IN", "--from-hub", "a/b"], "give either INPUT or --from-hub"),
        (["nowhere"], "INPUT nowhere does not exist"),
        (["EMPTY"], "no .h5ad files, .zarr stores or puzzle files"),
        (["IN", "PUZZLES"], "give one kind"),
        (["IN", "--split", "given"], "--split given is for puzzle files"),
        (["PUZZLES", "--raw"], "--raw needs expression files"),
        (["PUZZLES", "--top-genes", "9", "--workers", "1"], "--top-genes, --workers needs expression files"),
        (["--from-hub", "a/b", "--exclude-genes", "x"], "--exclude-genes needs expression files"),
        (["IN", "--max-test", "0"], "--max-test must be at least 1"),
        (["IN", "--workers", "0"], "--workers must be at least 1"),
        (["IN", "--threads", "0"], "--threads must be at least 1"),
        (["IN", "--val-size", "-1"], "--val-size must be at least 0"),
        (["IN", "--task", "single", "--sizes", "3"], "does not go with --task single"),
        (["IN", "--layer", "a", "--use-raw"], "exclude each other"),
        (["IN", "--exclude-genes", "("], "--exclude-genes: '('"),
        (["IN", "--seed", "-1"], "seed must be at least 0"),
        (["IN", "--context-table", "nowhere.yaml"], "nowhere.yaml"),
        pytest.param(["IN", "--sizes", "11"], "there are no puzzles", marks=pytest.mark.slow),
    ],
)
def test_refusals(folder, made, tmp_path, capsys, arguments, match):
    (tmp_path / "empty").mkdir()
    places = {"IN": str(folder), "EMPTY": str(tmp_path / "empty"), "PUZZLES": str(made / "train" / "train_data.json")}
    assert run(*[places.get(argument, argument) for argument in arguments], "--out", tmp_path / "out", "--quiet") == 1
    error = capsys.readouterr().err
    assert match in error
    assert error.startswith("cello1 prepare: error: ")


@pytest.mark.parametrize("sizes", ["a", "3-", "8-x", "", "-3", "15-8", "3,9-8"])
def test_sizes_that_are_none(sizes):
    with pytest.raises(SystemExit):
        run("x", "--out", "y", f"--sizes={sizes}")


def test_sizes():
    assert options.sizes("8-10,12, 14") == (8, 9, 10, 12, 14)


def test_help_names_every_option_and_runs_as_documented():
    result = subprocess.run(
        [sys.executable, "-m", "recipe.cello1", "prepare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for action in options.make_parser("")._actions:
        assert action.help
        for option in action.option_strings:
            assert option in result.stdout
    assert "audit TRAIN TEST" in result.stdout


def test_every_option_is_used_in_a_test():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")) + str(FEW)
    for parser in (options.make_parser(""), leaks.build_parser()):
        for action in parser._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f'"{option}"' in text or f"'{option}'" in text, option
