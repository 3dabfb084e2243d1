import pickle

import pytest

from recipe.cello1.task.puzzle import Puzzle, labelled_cells

TYPES = ("B cell", "T cell")
CELLS = (("CD19", "MS4A1"), ("CD3E", "IL7R"))


def test_puzzle_makes_tuples_of_what_it_gets():
    puzzle = Puzzle([["A", "B"], ["C"]], ["x", "y", "z"], ["y", "x"], "Here.", {"tissue": "lung"})
    assert puzzle.cells == (("A", "B"), ("C",))
    assert puzzle.candidates == ("x", "y", "z")
    assert puzzle.answer == ("y", "x")
    assert puzzle.n_cells == 2
    assert puzzle.meta == {"tissue": "lung"}
    assert pickle.loads(pickle.dumps(puzzle)) == puzzle
    assert hash(puzzle) == hash(Puzzle(puzzle.cells, puzzle.candidates, puzzle.answer, "Here."))


def test_meta_is_copied_and_not_compared():
    meta = {"donor_id": "d1"}
    puzzle = Puzzle(CELLS, TYPES, meta=meta)
    meta["donor_id"] = "d2"
    assert puzzle.meta == {"donor_id": "d1"}
    assert puzzle == Puzzle(CELLS, TYPES)
    with pytest.raises(AttributeError):
        puzzle.context = "new"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cells": ()}, "cells is empty"),
        ({"cells": (("A",), ())}, "cell 2 has no genes"),
        ({"cells": ("AB", "CD")}, "a cell must be a sequence of str, got str: 'AB'"),
        ({"cells": None}, "cells must be a sequence"),
        ({"cells": (("A", ""), ("B",))}, "cell 1: the gene '' is empty"),
        ({"cells": (("A", 3), ("B",))}, "cell 1: the gene 3 is a int, not a str"),
        ({"cells": (("A", " B"), ("B",))}, "white space around it"),
        ({"cells": (("A, B",), ("B",))}, "which separates the genes"),
        ({"cells": (("A\nB",), ("B",))}, "line break"),
        ({"candidates": "B cell"}, "candidates must be a sequence of str, got str"),
        ({"candidates": ("B cell", "T|cell")}, "candidates: the type 'T|cell' contains '|'"),
        ({"candidates": ("B cell", "T\ncell")}, "contains a line break"),
        ({"candidates": ("B cell", "T cell", "B cell")}, "holds both 'B cell' and 'B cell'"),
        ({"candidates": ("B cell", "b Cell")}, "holds both 'B cell' and 'b Cell' .case is ignored."),
        ({"candidates": ("B cell", float("nan"))}, "is a float, not a str"),
        ({"candidates": ("B cell", "<think>")}, "contains the tag <think>"),
        ({"answer": ("B cell",)}, "answer has 1 types for 2 cells"),
        ({"answer": ("B cell", "NK cell")}, r"answer names \['NK cell'\], not among the candidates"),
        ({"answer": ("B cell", "b cell")}, "holds both"),
        ({"answer": ("B cell", "t cell")}, "not among the candidates"),
        ({"answer": ("B cell", "")}, "answer: the type '' is empty"),
        ({"answer": "B cell | T cell"}, "answer must be a sequence of str, got str"),
        ({"context": "one\ntwo"}, "context contains a line break"),
        ({"context": "   "}, "context is empty"),
        ({"context": None}, "context is a NoneType"),
        ({"meta": [1]}, "meta must be a mapping, got list"),
    ],
)
def test_what_is_wrong_is_named(changes, match):
    with pytest.raises(ValueError, match=match.replace("|", r"\|")):
        Puzzle(**({"cells": CELLS, "candidates": TYPES} | changes))


def test_open_ended_puzzle_has_no_candidates():
    assert Puzzle(CELLS, (), TYPES).candidates == ()


@pytest.mark.parametrize("ids", [5, "ab", {"a": 1, "b": 2}, ["a"], [["a"], {"b": 1}], [None, None], None])
def test_cell_ids_that_are_none(ids):
    puzzle = Puzzle(CELLS, TYPES, TYPES, "", {"cell_ids": ids, "dataset": "d"})
    assert puzzle.cell_ids == () and puzzle.meta["cell_ids"] == ids
    assert len(labelled_cells([puzzle, puzzle])) == 2


def test_cell_ids_may_be_numbers():
    assert Puzzle(CELLS, TYPES, TYPES, "", {"cell_ids": [1, "b"]}).cell_ids == ("1", "b")


def test_labelled_cells_come_once_each():
    one = Puzzle(CELLS, TYPES, TYPES, "", {"cell_ids": ["a", "b"], "dataset": "d", "donor_id": "p"})
    other = Puzzle(CELLS[:1], TYPES, TYPES[:1], "", {"cell_ids": ["c"], "dataset": "d"})
    b, t = zip(CELLS, TYPES, strict=True)
    assert labelled_cells([one, one, other]) == [(*b, "p"), (*t, "p"), (*b, "")]
    assert labelled_cells([Puzzle(CELLS, TYPES, TYPES), other]) == [(*b, ""), (*t, ""), (*b, "")]
    with pytest.raises(ValueError, match="puzzle 1 has no answer"):
        labelled_cells([one, Puzzle(CELLS, TYPES)])


@pytest.mark.parametrize(("written", "one"), [(0, "0"), ("2.0", "2"), (" D\u200b1", "D1"), (None, ""), ("nan", "")])
def test_donors_of_labelled_cells_have_the_one_form_of_an_id(written, one):
    assert {donor for *_, donor in labelled_cells([Puzzle(CELLS, TYPES, TYPES, "", {"donor_id": written})])} == {one}
