"""What counts as the same cell, donor and puzzle, and what two sides share."""

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
from recipe.cello1.task.puzzle import Puzzle

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
