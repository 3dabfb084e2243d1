"""What the command writes, and what it removes."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from recipe.cello1.data.extract import FileResult, Job, process_file
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.formats.items import item_to_puzzle
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.formats.rl_parquet import iter_parquet
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import messages, render_user
from recipe.cello1.task.scoring import score_answer
from tests.helpers.prepare_runs import FEW, NAMES, REAL, build, content, manifest, run
from tests.helpers.toy_h5ad import toy_adata, write


def test_files(made):
    assert set(content(made)) == {
        "manifest.json",
        "leak_audit.json",
        "left_out.json",
        "rl/train.parquet",
        "rl/test.parquet",
        "train/train_data.json",
        "train/train_raw_data.json",
        "test/test_data.json",
        *(f"{side}/{name}_{side}.json" for side in ("train", "test") for name in NAMES),
        *(f"train/{name}_train_raw.json" for name in NAMES),
        *(f"cells/{name}.json" for name in NAMES),
    }


def test_merged_files_are_the_single_ones_joined(made):
    for side in ("train", "test"):
        merged = json.loads((made / side / f"{side}_data.json").read_bytes())
        alone = [json.loads((made / side / f"{name}_{side}.json").read_bytes()) for name in sorted(NAMES)]
        assert merged == [item for part in alone for item in part]
    assert len(json.loads((made / "train/train_data.json").read_bytes())) == 52
    assert len(json.loads((made / "test/test_data.json").read_bytes())) == 6
    assert len(json.loads((made / "left_out.json").read_bytes())) == 2


def test_items_have_the_published_keys_and_bytes_of_write_puzzles(made, tmp_path):
    path = made / "train" / "train_data.json"
    item = json.loads(path.read_bytes())[0]
    assert list(item)[:3] == ["system_msg", "user_msg", "assistant_msg"]
    puzzles = load_puzzles(path).puzzles
    write_puzzles(tmp_path / "again.json", puzzles)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_every_puzzle_is_solved_by_its_answer(made):
    for side in ("train", "test"):
        for puzzle in load_puzzles(made / side / f"{side}_data.json").puzzles:
            assert score_answer(format_answer(puzzle.answer), " | ".join(puzzle.answer)).score == 1.0


def test_parquet_is_what_verl_reads(made):
    rows = list(iter_parquet(made / "rl" / "train.parquet"))
    puzzles = load_puzzles(made / "train" / "train_data.json").puzzles
    assert [row["prompt"] for row in rows] == [messages(puzzle) for puzzle in puzzles]
    assert [row["extra_info"]["index"] for row in rows] == list(range(52))
    assert rows[0]["extra_info"]["split"] == "train"
    assert rows[0]["extra_info"]["tissue"] == "kidney 2"


def test_raw_form(made):
    raw = json.loads((made / "train" / "train_raw_data.json").read_bytes())
    puzzles = load_puzzles(made / "train" / "train_data.json").puzzles
    assert [list(item) for item in raw] == [["selected_cells", "question", "answer", "group"]] * len(puzzles)
    assert raw[0]["selected_cells"] == puzzles[0].meta["cell_ids"]
    assert raw[0]["question"] == render_user(puzzles[0])
    assert raw[0]["group"] == puzzles[0].meta["donor_id"]
    assert len(json.loads((made / "cells" / "lung" / "file0.json").read_bytes())) == 300


def test_manifest(made):
    found = manifest(made)
    assert found["files"] == {name: value for name, value in content(made).items() if name != "manifest.json"}
    assert found["settings"]["seed"] == 1
    assert found["settings"]["sizes"] == [3, 4]
    assert found["plan"]["split"] == "donor"
    assert {entry["name"]: entry["status"] for entry in found["inputs"]} == dict.fromkeys(NAMES, "used")
    assert all(entry["cells"] == 300 and len(entry["sha256_of_ends"]) == 64 for entry in found["inputs"])
    assert found["splits"]["train"]["by_n_cells"] == {"3": 26, "4": 26}
    assert set(found["splits"]["train"]["by_tissue"]) <= {"lung 0", "lung 1", "kidney 2"}
    assert sum(found["splits"]["test"]["by_disease"].values()) == 6
    assert sum(found["splits"]["train"]["by_type"].values()) == 26 * 7
    assert found["leaks"]["train/test"]["leaks"] is False
    assert set(found["versions"]) >= {"python", "numpy", "h5py", "anndata"}
    assert str(made) not in json.dumps(found)


def test_the_default_split_leaks_nothing(made):
    found = json.loads((made / "leak_audit.json").read_bytes())
    shared = {
        name: found["audits"]["train/test"][name]["shared"] for name in ("cells", "donors", "puzzles", "reordered")
    }
    assert shared == dict.fromkeys(shared, 0)
    assert run("audit", made / "train/train_data.json", made / "test/test_data.json", "--fail-on-leak") == 0


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_workers_and_threads(folder, made, tmp_path):
    arguments = ["--sizes", "3-4", "--per-size", "10", "--quiet", "--raw"]
    assert run(folder, "--out", tmp_path / "b", *arguments, "--workers", "3", "--threads", "2") == 0
    assert content(tmp_path / "b") == content(made)


def test_another_seed_gives_other_puzzles(folder, made, tmp_path):
    assert run(folder, "--out", tmp_path, "--raw", *FEW, "--seed", "2") == 0
    assert content(tmp_path)["train/train_data.json"] != content(made)["train/train_data.json"]


def test_files_of_an_earlier_run_are_not_left_behind(folder, tmp_path):
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0
    (tmp_path / "mine.txt").write_text("kept")
    assert run(folder / "lung", "--out", tmp_path, *FEW) == 0
    assert not (tmp_path / "train" / "kidney" / "file2_train.json").exists()
    assert not (tmp_path / "train" / "train_raw_data.json").exists()
    assert (tmp_path / "mine.txt").exists()
    assert set(manifest(tmp_path)["files"]) | {"manifest.json", "mine.txt"} == set(content(tmp_path))


@pytest.mark.parametrize("key", ["files", "stale_files"])
def test_a_manifest_cannot_have_other_files_removed(folder, tmp_path, key):
    out, outside = tmp_path / "out", tmp_path / "train"
    for place in (out / "train", out / "deep", outside):
        place.mkdir(parents=True)
    kept = [
        tmp_path / "x.json",
        outside / "a_train.json",
        out / "mine.json",
        out / "train" / "notes.txt",
        out / "a.json",
    ]
    for path in kept:
        path.write_text("mine")
    (out / "linked").symlink_to(tmp_path)
    (out / "val").symlink_to(outside)
    (out / "deep" / "deep.json").mkdir()
    (outside / "b_val.json").write_text("mine")
    stale = out / "train" / "old_train.json"
    stale.write_text("[]")
    names = [
        *("../x.json", "../train/a_train.json", "train/../../x.json", "linked/x.json", "val/b_val.json", "mine.json"),
        *("train/notes.txt", "train", "deep", ".", "", "a.json", str(tmp_path / "x.json"), str(kept[1])),
        "linked/train/../linked_linked.json",
        "deep/deep.json",
        "train/old_train.json",
    ]
    (out / "manifest.json").write_text(
        json.dumps({key: {name: "0" for name in names} if key == "files" else [*names, 3]})
    )
    build(folder, out)
    assert [path for path in (*kept, outside / "b_val.json") if not path.exists()] == []
    assert not stale.exists()
    (out / "manifest.json").write_text("[" * 100_000)
    build(folder, out)


@pytest.mark.parametrize("name", [".parts", "train", "test", "rl", "train/kidney", ".parts/lung"])
def test_links_do_not_have_files_elsewhere_replaced(folder, tmp_path, capsys, name):
    """An output folder may be a stranger's, too."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in ("train_data.json", "train.parquet", "file2.h5ad.json", "file2.json", "file2_train.json"):
        (mine / file).write_text("mine")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    assert run(folder, "--out", tmp_path / "out", *FEW) == 1
    assert f"{link} is a link to {mine}, where nothing is overwritten; remove it" in capsys.readouterr().err
    assert {path.read_text() for path in mine.iterdir()} == {"mine"} and len([*mine.iterdir()]) == 5


def test_an_interrupted_rebuild_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    assert run(folder, "--out", tmp_path, "--raw", *FEW) == 0

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipe.cello1.data.build.write_rl_parquet", killed)
        assert run(folder / "kidney", "--out", tmp_path, *FEW) == 130
    assert "not finished" in manifest(tmp_path)["error"]
    assert (tmp_path / "train" / "file2_train.json").exists()
    half = tmp_path / "train" / f".train_data.json.{'0' * 32}.tmp"  # as SIGKILL leaves it
    half.write_text("[")
    (tmp_path / ".mine.tmp").write_text("kept")
    assert run(folder / "lung", "--out", tmp_path, *FEW) == 0
    assert not half.exists()
    assert (tmp_path / ".mine.tmp").exists()
    assert set(manifest(tmp_path)["files"]) | {"manifest.json"} == set(content(tmp_path))


def test_one_bad_file_alone(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.h5ad").write_text("x")
    assert run(tmp_path / "in", "--out", tmp_path / "out", *FEW) == 1
    assert "none of the files could be used" in capsys.readouterr().err
    found = manifest(tmp_path / "out")
    assert found["error"] == "none of the files could be used"
    assert [entry["status"] for entry in found["inputs"]] == ["bad"]
    assert found["inputs"][0]["reason"] and found["inputs"][0]["remedy"]
    assert "files" not in found
    assert list(content(tmp_path / "out")) == ["manifest.json"]


def test_the_manifest_of_an_earlier_run_does_not_stay_when_a_run_fails(folder, tmp_path):
    build(folder, tmp_path)
    before = manifest(tmp_path)["files"]
    one_donor = write(toy_adata(n_cells=200, n_donors=1), tmp_path / "in" / "a.h5ad")
    assert run(one_donor, "--out", tmp_path, *FEW) == 1
    found = manifest(tmp_path)
    assert "split='puzzle'" in found["error"]
    assert [entry["status"] for entry in found["inputs"]] == ["used"]
    assert set(found["stale_files"]) == set(before)
    assert run(one_donor, "--out", tmp_path, *FEW, "--split", "puzzle") == 0
    assert set(manifest(tmp_path)["files"]) | {"manifest.json", "in/a.h5ad"} == set(content(tmp_path))


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not here; set CELLO1_SHARED_DATA to its folder")
def test_real_puzzles_come_out_byte_identical_when_their_cells_and_metadata_go_in(tmp_path):
    for number, item in enumerate(json.loads(REAL.read_bytes())):
        real = item_to_puzzle(item)
        genes = sorted({gene for cell in real.cells for gene in cell})
        matrix = np.zeros((real.n_cells, len(genes)), dtype="float32")
        for row, cell in enumerate(real.cells):
            for rank, gene in enumerate(cell):
                matrix[row, genes.index(gene)] = 100 - rank
        import anndata as ad

        sex, stage, tissue, disease = read_sentences(real.context)
        obs = pd.DataFrame(
            {
                "cell_type": real.answer,
                "donor_id": "donor",
                "suspension_type": "cell",
                "sex": sex,
                "development_stage": stage,
                "tissue": tissue,
                "disease": disease,
            },
            index=[f"cell{i}" for i in range(real.n_cells)],
        )
        adata = ad.AnnData(
            sp.csr_matrix(matrix),
            obs=obs,
            var=pd.DataFrame({"feature_name": genes}, index=[f"g{i}" for i in range(len(genes))]),
        )
        path = write(adata, tmp_path / f"{number}.h5ad")
        result: FileResult = process_file(Job(str(path), "real", "", PuzzleSettings(sizes=(real.n_cells,), per_size=1)))
        (made,) = result.puzzles
        order = [int(name.removeprefix("cell")) for name in made.meta["cell_ids"]]
        back = np.argsort(order).tolist()
        again = type(made)(
            tuple(made.cells[i] for i in back), made.candidates, tuple(made.answer[i] for i in back), made.context
        )
        assert render_user(again) == item["user_msg"]
        assert " | ".join(again.answer) == item["answer"]


def read_sentences(context: str) -> tuple[str, str, str, str]:
    import re

    found = re.fullmatch(
        r"The cell is from a (\w+) at the (.+), originating from the (.+)\. The patient has been diagnosed with (.+)\.",
        context,
    )
    return found.groups()


def test_parquet_columns(made):
    schema = pq.read_schema(made / "rl" / "test.parquet")
    assert schema.names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
