import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipe.cello1.cold_start.embedded import EmbeddedSizes, lose_genes, recombine, split_cells
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.formats.rl_parquet import read_rl_parquet
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.scoring import score_answer
from tests.helpers.cli import command

main = command("embedded")

pytest.importorskip("scanpy")
pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
SIZES = ["--n-sft", "45", "--n-train", "15", "--n-test", "15"]


def build(out, seed, hash_seed):
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [
        sys.executable,
        "-m",
        "recipe.cello1",
        "embedded",
        "--out",
        str(out),
        "--seed",
        str(seed),
        *SIZES,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "data"
    run = build(out, 1, "0")
    assert run.returncode == 0, run.stderr
    return out


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_in_another_process(built, tmp_path):
    run = build(tmp_path / "data", 1, "4242")
    assert run.returncode == 0, run.stderr
    assert hashes(tmp_path / "data") == hashes(built)


def test_no_cell_is_on_both_sides(built):
    cells = {
        name: {cell for puzzle in load_puzzles(built / f"{name}.json").puzzles for cell in puzzle.meta["cell_ids"]}
        for name in ("train", "test")
    }
    manifest = json.loads((built / "manifest.json").read_text())
    kept, held_out = set(manifest["cells"]["train"]), set(manifest["cells"]["test"])
    assert not kept & held_out
    assert len(kept) + len(held_out) == 700
    assert cells["train"] <= kept
    assert cells["test"] <= held_out


def test_recombined_cells_know_nothing_of_the_held_out_cells(built):
    """Every gene of a recombined cell is expressed by a training cell of its type."""
    import scanpy as sc

    kept = json.loads((built / "manifest.json").read_text())["cells"]["train"]
    raw = sc.datasets.pbmc68k_reduced()[kept].raw.to_adata()
    labels = sc.datasets.pbmc68k_reduced()[kept].obs["bulk_labels"]
    expressed = {
        name: set(raw.var_names[np.asarray((raw.X[np.flatnonzero(labels == name)] > 0).sum(0)).ravel() > 0])
        for name in labels.unique()
    }
    for puzzle in load_puzzles(built / "sft.json").puzzles:
        for genes, name in zip(puzzle.cells, puzzle.answer, strict=True):
            assert set(genes) <= expressed[name]


def test_traces_know_nothing_of_the_held_out_cells(built):
    """The evidence behind the traces, recomputed from the training cells alone, gives the same traces."""
    import scanpy as sc

    from recipe.cello1.cold_start.marker_traces import marker_evidence, write_trace
    from recipe.cello1.task.genes import expression, top_genes

    kept = json.loads((built / "manifest.json").read_text())["cells"]["train"]
    adata = sc.datasets.pbmc68k_reduced()[kept]
    cells = top_genes(*expression(adata, use_raw=True), 36)
    evidence = marker_evidence(cells, adata.obs["bulk_labels"].tolist())
    for puzzle in load_puzzles(built / "sft.json").puzzles:
        assert puzzle.meta["reasoning"] == write_trace(puzzle, evidence)


def test_every_puzzle_is_solvable_and_of_the_wanted_shape(built):
    types = set(json.loads((built / "manifest.json").read_text())["types"])
    assert len(types) == 10
    for name, count in (("sft", 45), ("train", 15), ("test", 15)):
        puzzles = load_puzzles(built / f"{name}.json").puzzles
        assert sorted({puzzle.n_cells for puzzle in puzzles}) == [3, 4, 5]
        assert len(puzzles) == count
        for puzzle in puzzles:
            assert all(len(genes) == 12 for genes in puzzle.cells)
            assert set(puzzle.candidates) <= types
            text = format_answer(puzzle.answer, puzzle.meta.get("reasoning", ""))
            assert score_answer(text, puzzle.answer, candidates=puzzle.candidates).score == 1.0
        assert ("reasoning" in puzzles[0].meta) == (name == "sft")


def test_train_and_test_lists_are_the_top_genes_as_measured(built):
    import scanpy as sc

    adata = sc.datasets.pbmc68k_reduced()
    values = adata.raw.X.toarray()
    position = {name: row for row, name in enumerate(adata.obs_names)}
    column = {name: i for i, name in enumerate(adata.raw.var_names)}
    for name in ("train", "test"):
        for puzzle in load_puzzles(built / f"{name}.json").puzzles:
            for cell, genes in zip(puzzle.meta["cell_ids"], puzzle.cells, strict=True):
                row = values[position[cell]]
                assert [row[column[gene]] for gene in genes] == sorted(row, reverse=True)[:12]


def test_parquet_and_json_hold_the_same_puzzles(built):
    for name in ("train", "test"):
        rows = read_rl_parquet(built / f"{name}.parquet")
        puzzles = load_puzzles(built / f"{name}.json").puzzles
        assert [row["reward_model"]["ground_truth"].split(" | ") for row in rows] == [list(p.answer) for p in puzzles]
        assert {row["extra_info"]["split"] for row in rows} == {name}
        assert {row["extra_info"]["prompt_layout"] for row in rows} == {"system"}


def test_tokens_are_few_and_counted(built):
    from transformers import AutoTokenizer

    tokens = json.loads((built / "manifest.json").read_text())["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    rows = read_rl_parquet(built / "train.parquet")
    lengths = [
        len(
            tokenizer(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))[
                "input_ids"
            ]
        )
        for row in rows
    ]
    assert tokens["train"]["prompt_max"] == max(lengths)
    assert tokens["sft"]["response_mean"] < 70


def test_built_once_and_rebuilt_when_a_file_is_damaged(built, capsys):
    arguments = ["--out", str(built), "--seed", "1", *SIZES]
    before = hashes(built)
    assert main(arguments) == 0
    assert "already built" in capsys.readouterr().err
    with open(built / "train.json", "a") as file:
        file.write("x")
    assert main(arguments) == 0
    assert "already built" not in capsys.readouterr().err
    assert hashes(built) == before


def test_other_settings_are_refused(built, capsys):
    assert main(["--out", str(built), "--seed", "2", *SIZES]) == 1
    error = capsys.readouterr().err
    assert "seed (1)" in error
    assert error.count("\n") == 1


def test_unusable_arguments_end_with_one_line(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "x"), "--n-sft", "0"]) == 1
    assert capsys.readouterr().err.startswith("cello1 embedded: error: ")
    assert not (tmp_path / "x").exists()


def test_split_holds_out_the_same_share_of_each_type():
    labels = ["a"] * 50 + ["b"] * 10 + ["c"] * 2
    held_out = split_cells(labels, 0.2, np.random.default_rng(0))
    assert [int(held_out[:50].sum()), int(held_out[50:60].sum()), int(held_out[60:].sum())] == [10, 2, 1]
    with pytest.raises(ValueError, match="single cell of type 'z'"):
        split_cells([*labels, "z"], 0.2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_cells(labels, 1.0, np.random.default_rng(0))


def test_recombined_cells_have_the_values_of_their_type_gene_by_gene():
    rng = np.random.default_rng(0)
    values = np.arange(5)[:, None] + 10 * np.arange(200)[None]
    made = [recombine(values, rng) for _ in range(20)]
    assert all(set(cell - 10 * np.arange(200)) == set(range(5)) for cell in made)
    assert len({cell.tobytes() for cell in made}) == 20


def test_lost_genes_leave_the_order_and_the_length():
    genes = [f"G{i:03}" for i in range(40)]
    rng = np.random.default_rng(0)
    lists = [lose_genes(genes, (0.1, 0.7), 12, rng) for _ in range(50)]
    assert all(list(found) == sorted(found) and len(found) == 12 for found in lists)
    assert len(set(lists)) == 50
    assert lose_genes(genes, (0.0, 0.0), 12, rng) == tuple(genes[:12])
    assert len(lose_genes(genes, (0.99, 0.99), 12, rng)) == 12
    assert len(lose_genes(genes[:5], (0.5, 0.5), 12, rng)) == 5


def test_default_sizes_are_those_of_the_recipe():
    settings = EmbeddedSizes(seed=1)
    assert (settings.sizes, settings.n_top) == ((3, 4, 5), 12)
