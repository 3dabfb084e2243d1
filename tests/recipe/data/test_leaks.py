"""What counts as the same cell, donor and puzzle, and what two sides share."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.data.fingerprints import (
    TELLING_GENES,
    all_have_ids,
    cell_keys,
    fingerprint_of,
    fingerprints_of,
    hash64,
)
from recipe.cello1.data.leaks import audit
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.prepare_runs import FEW, build, manifest, run
from tests.helpers.toy_h5ad import toy_adata, write

TYPES = ("A", "B", "C")


def genes(cell: int, length: int = 50) -> tuple[str, ...]:
    return tuple(f"G{cell}_{i}" for i in range(length))


def puzzle(cells, donor="d", context="c", length=50, **meta) -> Puzzle:
    types = TYPES[: len(cells)]
    meta = {"donor_id": donor, **meta} if donor else meta
    return Puzzle(tuple(genes(cell, length) for cell in cells), types, types, context, meta)


def compare(train, test):
    return audit([fingerprint_of(p) for p in train], [fingerprint_of(p) for p in test])


def test_nothing_is_shared():
    found = compare([puzzle([1, 2], "d1"), puzzle([3, 4], "d1")], [puzzle([5, 6], "d2")])
    assert not found.leaks
    assert (found.cells.train, found.cells.test, found.cells.shared) == (4, 2, 0)
    assert (found.donors.train, found.donors.test) == (1, 1)
    assert found.clean_puzzles == 1


def test_everything_that_can_be_shared():
    train = [puzzle([1, 2], "d1"), puzzle([3, 4], "d1")]
    test = [puzzle([1, 2], "d1"), puzzle([4, 3], "d2"), puzzle([1, 9], "d3"), puzzle([7, 8], "d1")]
    found = compare(train, test)
    assert found.leaks
    assert (found.cells.shared, found.cells.test, found.cells.per_cent) == (4, 7, 57.14)
    assert (found.donors.shared, found.donors.test) == (1, 3)
    assert found.puzzles.shared == 1
    assert found.reordered.shared == 1
    assert found.puzzles_with_shared_cells.shared == 3
    assert found.puzzles_with_shared_donors.shared == 2
    assert found.clean_puzzles == 1


def test_the_same_cells_in_another_context_are_near_duplicates():
    found = compare([puzzle([1, 2], context="one")], [puzzle([1, 2], context="two")])
    assert (found.puzzles.shared, found.reordered.shared) == (0, 1)


def test_other_candidates_make_another_puzzle():
    one = puzzle([1, 2])
    other = replace(one, candidates=("A", "B", "C"))
    found = compare([one], [other])
    assert (found.puzzles.shared, found.reordered.shared, found.cells.shared) == (0, 0, 2)


def test_without_donors_the_context_stands_for_them_and_the_audit_says_so():
    found = compare(
        [puzzle([1], None, "of a male")], [puzzle([2], None, "of a male"), puzzle([3], None, "of a female")]
    )
    assert found.donors.shared == 1
    assert found.donors_from_context == 3
    assert any("context stands for it: 3" in line for line in found.lines())


def test_where_one_side_names_no_donors_contexts_are_compared():
    train = [puzzle([1], "x", "of a male"), puzzle([2], "y", "of a female")]
    found = compare(train, [puzzle([3], None, "of a male"), puzzle([4], None, "of a child")])
    assert (found.donors.train, found.donors.test, found.donors.shared) == (2, 2, 1)
    assert found.puzzles_with_shared_donors.shared == 1
    assert compare(train, [puzzle([3], "z", "of a male")]).donors.shared == 0
    nameless = puzzle([4], None, "of a mouse")
    assert compare([*train, nameless], [puzzle([3], "z", "of a male")]).donors.shared == 0, "of no nameless puzzle"


def test_zero_is_a_donor():
    assert compare([puzzle([1], 1, donor_id=0)], [puzzle([2], 1, donor_id=0)]).donors_from_context == 0


def test_a_donor_id_is_not_a_context():
    found = compare([puzzle([1], "x", "")], [puzzle([2], None, "x")])
    assert found.donors.shared == 0


def test_no_donor_and_no_context_is_no_donor():
    assert compare([puzzle([1], None, "")], [puzzle([2], None, "")]).donors.shared == 0


def test_short_lists_coincide_by_chance_so_ids_decide():
    short = TELLING_GENES - 1
    train = [puzzle([1], "d1", length=short, dataset="x", cell_ids=["a"])]
    test = [puzzle([1], "d2", length=short, dataset="x", cell_ids=["b"])]
    assert compare(train, test).cells.shared == 0
    test = [puzzle([2], "d2", length=short, dataset="x", cell_ids=["a"])]
    assert compare(train, test).cells.shared == 1


def test_an_id_counts_within_its_data_set():
    train = [puzzle([1], "d1", dataset="x", cell_ids=["AAAC-1"])]
    assert compare(train, [puzzle([2], "d2", dataset="y", cell_ids=["AAAC-1"])]).cells.shared == 0


def test_an_id_of_a_donor_counts_in_every_data_set():
    """A subset with other genes, or in another order: the lists differ, the cell is the same."""
    names = [f"{barcode}-1-HTA4_1001" for barcode in ("AAACCCAAG", "AAACCCAGT", "AAACCCATT")]
    train = [puzzle([1, 2], "d1", dataset="x", cell_ids=names[:2])]
    found = compare(train, [puzzle([3, 4], "d1", dataset="y", cell_ids=names[1:])])
    assert (found.cells.test, found.cells.shared, found.clean_puzzles) == (2, 1, 0)
    assert compare(train, [puzzle([3, 4], "d2", dataset="y", cell_ids=names[1:])]).cells.shared == 0


@pytest.mark.parametrize("name", ["0", "12-1", "cell_12", "AAACCCAAGAACTGAT-1", "AAACCCAAGAACTGAT-1-3", "1.0"])
def test_barcodes_and_numbers_come_again_in_every_library_of_a_donor(name):
    train = [puzzle([1], "d1", dataset="x", cell_ids=[name])]
    assert compare(train, [puzzle([2], "d1", dataset="y", cell_ids=[name])]).cells.shared == 0


def test_long_lists_find_a_cell_again_under_another_id():
    train = [puzzle([1], "d1", dataset="x", cell_ids=["a"])]
    assert compare(train, [puzzle([1], "d2", dataset="y", cell_ids=["b"])]).cells.shared == 1


def test_without_ids_on_one_side_genes_decide():
    train = [puzzle([1], "d1", length=5, dataset="x", cell_ids=["a"])]
    assert compare(train, [puzzle([1], "d2", length=5)]).cells.shared == 1


def test_ids_that_do_not_fit_the_cells_are_no_ids():
    one = fingerprint_of(puzzle([1, 2], dataset="x", cell_ids=["a"]))
    assert not all_have_ids([one])
    assert len(cell_keys(one, False)) == 2


def test_tissues_of_one_puzzle():
    found = fingerprint_of(puzzle([1], tissue="lung | skin"))
    assert found.tissues.tolist() == [hash64("tissue", "lung"), hash64("tissue", "skin")]
    assert len(fingerprint_of(puzzle([1])).tissues) == 0


def test_plain_and_lines_have_counts_and_per_cents():
    found = compare([puzzle([1, 2])], [puzzle([1, 3])])
    plain = found.plain()
    assert plain["cells"] == {"train": 2, "test": 2, "shared": 1, "per_cent_of_test": 50.0}
    assert plain["leaks"] is True
    text = "\n".join(found.lines())
    assert "50.00%" in text
    assert "share no cell with train: 0 of 1" in text


@pytest.mark.parametrize(("length", "n_top", "telling"), [
    (30, 50, True), (29, 50, False), (25, 25, True), (24, 25, False), (15, 15, True), (14, 14, False), (8, 8, False)
])  # fmt: skip
def test_a_list_is_telling_from_as_many_genes_as_are_listed(length, n_top, telling):
    genes = tuple(f"G{i}" for i in range(length))
    others = Puzzle((tuple(f"H{i}" for i in range(n_top)),), ("T",))
    found = fingerprints_of([Puzzle((genes,), ("T",)), others])
    assert found[0].telling.tolist() == [telling]
    assert found[1].telling.tolist() == [n_top >= 15]


def test_empty_sides():
    found = compare([], [])
    assert not found.leaks
    assert found.cells.per_cent == 0.0
    assert compare([], [puzzle([1])]).clean_puzzles == 1


@given(st.lists(st.sets(st.integers(0, 15), min_size=1, max_size=3), max_size=8), st.data())
def test_counts_equal_those_of_sets(train_cells, data):
    test_cells = data.draw(st.lists(st.sets(st.integers(0, 15), min_size=1, max_size=3), max_size=8))
    found = compare([puzzle(sorted(c), "d1") for c in train_cells], [puzzle(sorted(c), "d2") for c in test_cells])
    train = set().union(*train_cells)
    test = set().union(*test_cells)
    assert (found.cells.train, found.cells.test, found.cells.shared) == (len(train), len(test), len(train & test))
    assert found.puzzles_with_shared_cells.shared == sum(bool(cells & train) for cells in test_cells)


@pytest.mark.parametrize("parts", [("a", "b"), ("ab",), ("a\1b",)])
def test_hash64_is_stable_and_tells_texts_apart(parts):
    assert hash64(*parts) == hash64(*parts) < 2**64
    assert hash64(*parts) != hash64("a", "b", "")
    assert np.uint64(hash64(*parts)) == hash64(*parts)


# ---------------------------------------------------------------------------------------------------- the command


def test_a_subset_with_its_genes_in_another_order_is_noticed(tmp_path, capsys):
    adata = toy_adata(1, n_cells=600, n_donors=6)
    letters = str.maketrans("0123", "ACGT")
    adata.obs_names = [f"LIB1_{np.base_repr(i, 4).zfill(8).translate(letters)}-1" for i in range(600)]
    write(adata, tmp_path / "in" / "all.h5ad")
    order = np.random.default_rng(0).permutation(adata.n_vars)
    part = adata[adata.obs["cell_type"].isin([f"type {i}" for i in range(4)]), order[: adata.n_vars // 2]].copy()
    write(part, tmp_path / "in" / "subset.h5ad")
    assert run(tmp_path / "in", "--out", tmp_path / "out", *FEW, "--split", "dataset") == 1
    assert "all puzzles belong together" in capsys.readouterr().err
    build(tmp_path / "in", tmp_path / "out", "--fail-on-leak")
    files = []
    for name in ("all", "subset"):
        build(tmp_path / "in" / f"{name}.h5ad", tmp_path / name)
        files.append(tmp_path / name / "train" / "train_data.json")
    assert run("audit", *files, "--out", tmp_path / "audit.json") == 0
    assert json.loads((tmp_path / "audit.json").read_bytes())["cells"]["shared"] > 0


def test_the_same_cells_under_other_names_with_short_lists(tmp_path, capsys):
    for name in ("a", "b"):
        write(toy_adata(0, n_cells=300, donor_prefix=name), tmp_path / "in" / f"{name}.h5ad")
    flags = ("--top-genes", "25", "--fail-on-leak", "--split", "dataset", "--out", tmp_path / "out")
    assert run(tmp_path / "in", *FEW, *flags) == 1
    capsys.readouterr()
    files = []
    for name in ("a", "b"):
        build(tmp_path / "in" / f"{name}.h5ad", tmp_path / name, "--top-genes", "25")
        files.append(tmp_path / name / "train" / "train_data.json")
    assert run("audit", *files, "--fail-on-leak") == 1


def test_validation_and_test_are_compared_too(made, tmp_path):
    items = json.loads((made / "train" / "train_data.json").read_bytes())
    for side, own in (("train", items[:5]), ("val", items[5:9]), ("test", items[5:12])):
        (tmp_path / f"{side}.json").write_text(json.dumps(own))
    assert run(tmp_path, "--out", tmp_path / "out") == 0
    leaks = manifest(tmp_path / "out")["leaks"]
    assert set(leaks) == {"train/test", "train/val", "val/test"}
    assert leaks["val/test"]["puzzles"]["shared"] == 4


def test_nothing_to_compare_is_no_proof(made, tmp_path, capsys):
    files = [made / "train" / "train_data.json", "--split", "given", "--out", tmp_path]
    assert run(*files) == 0
    assert run(*files, "--fail-on-leak") == 1
    assert "needs a train and a test side to compare" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cell_names_that_restart_with_each_donor_do_not_link_the_donors(tmp_path):
    adata = toy_adata(n_cells=1000)
    path = write(adata, tmp_path / "unique" / "a.h5ad")
    adata.obs_names = [f"AAAC-{number}" for number in adata.obs.groupby("donor_id", observed=True).cumcount()]
    repeated = write(adata, tmp_path / "repeated" / "a.h5ad")
    build(repeated, tmp_path / "out", "--fail-on-leak", "--raw")
    (note,) = manifest(tmp_path / "out")["inputs"][0]["notes"]
    assert "cell names occur more than once" in note
    records = json.loads((tmp_path / "out" / "cells" / "a.json").read_bytes())
    assert len({record["cell_index"] for record in records}) == 1000
    raw = json.loads((tmp_path / "out" / "train" / "train_raw_data.json").read_bytes())
    assert {name for item in raw for name in item["selected_cells"]} <= {record["cell_index"] for record in records}
    audits = []
    for place, name in ((path, "b"), (repeated, "c")):
        build(place, tmp_path / name, "--split", "puzzle")
        audits.append(json.loads((tmp_path / name / "leak_audit.json").read_bytes()))
    assert audits[0] == audits[1]


def test_audit_of_two_files(folder, tmp_path, capsys):
    build(folder, tmp_path, "--split", "puzzle")
    files = [tmp_path / "train" / "train_data.json", tmp_path / "rl" / "test.parquet"]
    capsys.readouterr()
    assert run("audit", *files, "--out", tmp_path / "audit.json") == 0
    assert "cells" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_bytes())["cells"]["shared"] > 0
    assert run("audit", *files, "--fail-on-leak") == 1


def test_audit_finds_the_same_cells_in_another_order(made, tmp_path, capsys):
    puzzle = load_puzzles(made / "train" / "train_data.json").puzzles[0]
    order = [1, 0, *range(2, puzzle.n_cells)]
    turned = type(puzzle)(
        tuple(puzzle.cells[i] for i in order), puzzle.candidates, tuple(puzzle.answer[i] for i in order), puzzle.context
    )
    write_puzzles(tmp_path / "test.json", [turned])
    assert run("audit", made / "train" / "train_data.json", tmp_path / "test.json", "--out", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_bytes())
    assert (found["puzzles"]["shared"], found["reordered"]["shared"]) == (0, 1)


def test_audit_needs_every_puzzle(made, tmp_path, capsys):
    (tmp_path / "test.json").write_text('[{"a": 1}, {"b": 2}]')
    assert run("audit", made / "train" / "train_data.json", tmp_path / "test.json") == 1
    assert "(and 1 more); an audit needs every puzzle" in capsys.readouterr().err
    assert run("audit", tmp_path / "gone.json", tmp_path / "test.json") == 1


@pytest.mark.parametrize("ids", [5, "ab", ["a"]])
def test_ids_that_are_no_list_of_one_for_each_cell_count_as_none(ids):
    from recipe.cello1.data.fingerprints import fingerprint_of
    from recipe.cello1.task.puzzle import Puzzle

    puzzle = Puzzle((("CD19", "MS4A1"), ("CD3E",)), ("B", "T"), ("B", "T"), "", {"cell_ids": ids, "dataset": "d"})
    assert len(fingerprint_of(puzzle).cell_ids) == 0
