import argparse
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task.answer import check_types, format_answer, parse_answer, split_types
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer
from recipe.cello1.task.text import (
    canonical_id,
    clean_value,
    in_options,
    is_usable,
    join_list,
    list_entries,
    normal_form,
    shown,
    visible,
)

ALIKE = [
    ("M\u00fcller cell", "Mu\u0308ller cell"),  # NFC, NFD
    ("T cell", "T\u200b cell"),  # zero-width space
    ("T cell", "\ufeffT cell"),  # byte order mark
    ("T cell", "T\u00a0cell"),  # no-break space
    ("T cell", "T\u2009cell"),  # thin space
    ("T cell", "T ce\u00adll"),  # soft hyphen
    ("T cell", "T ce\u2060ll"),  # word joiner
    ("T cell", "T cell\u200e"),  # a mark of direction
    ("T cell", "T cell\ufe0f"),  # variation selector
    ("T-cell", "T\u2011cell"),  # no-break hyphen
    ("\u03bc cell", "\u00b5 cell"),  # mu, micro sign
    ("\u03a9 cell", "\u2126 cell"),  # omega, ohm sign
    ("\uac01 cell", "\u1100\u1161\u11a8 cell"),  # composed and decomposed Hangul
]


def drawn_from(labels, size):
    sampling = pytest.importorskip("recipe.cello1.task.sampling", reason="not part of the recipe in verl-recipe")
    return sampling.sample_puzzles(labels, None, sizes=[size], n_per_size=9, rng=0)


@pytest.mark.parametrize(("name", "twin"), ALIKE)
def test_what_looks_the_same_is_the_same(name, twin):
    assert normal_form(twin) == normal_form(name) == name
    cells = (("A",), ("B",))
    puzzle = Puzzle(cells, (twin, "B cell"), ("B cell", name))
    assert puzzle == Puzzle(cells, (name, "B cell"), ("B cell", twin))
    assert puzzle.candidates[0] == name and puzzle.answer[1] == name
    # A right answer is right, however it is written, and a doubled type is doubled.
    for gold in (puzzle.answer, f"B cell | {twin}", ["B cell", twin]):
        assert score_answer(format_answer(["B cell", twin]), gold, candidates=[twin, "B cell"]).score == 1.0
    assert score_answer(format_answer([name, twin]), puzzle.answer).reason == "duplicate"
    assert parse_answer(f"<think></think>\n<answer>\n{twin}\n</answer>").items == (name,)
    assert split_types(f"{twin} | {name}") == (name, name)
    with pytest.raises(ValueError, match="candidates holds both .* .they look alike: .*; give each type once") as error:
        Puzzle(cells, (name, twin))
    assert ascii(name) in str(error.value) and ascii(twin) in str(error.value)
    assert {puzzle.candidates for puzzle in drawn_from([name, twin, "x"], size=2)} == {tuple(sorted((name, "x")))}


@pytest.mark.parametrize(
    "names", [("CD4", "CD8"), ("a\u2013b", "a-b"), ("\u03b1", "a"), ("T cell", "T  cell"), ("x\u00b2", "x2")]
)
def test_what_looks_different_stays_different(names):
    check_types("types", names)
    assert len(set(map(normal_form, names))) == 2


@given(st.text())
def test_normal_form_is_reached_in_one_step(text):
    found = normal_form(text)
    assert normal_form(found) == found
    assert not text.isascii() or found == text
    assert unicodedata.is_normalized("NFC", found)


UNUSABLE = [
    None,
    math.nan,
    np.float32("nan"),
    "nan",
    "NaN",
    "unknown",
    " NONE ",
    "na",
    "NA",
    "",
    " \n",
    "<NA>",
    "\ufeff",
    "N/A",
    "n/a ",
    "n.a.",
    "#N/A",
    "-nan",
    "NaT",
    "NULL",
    "-",
    "--",
    "\u2014",
    "?",
    "...",
    "_",
    "Missing",
    "not available",
    "Not_Applicable",
    "not\u00a0reported",
    "unknown cell",
    "Unknown cell type",
    "Unassigned",
    "unclassified cells",
    "unlabelled",
    "undetermined",
]


@pytest.mark.parametrize("value", UNUSABLE)
def test_unusable_values(value):
    assert not is_usable(value)
    assert clean_value(value) == ""
    assert [puzzle.labels for puzzle in drawn_from([value, "x"], size=1)] == [("x",)]


@pytest.mark.parametrize(
    "value",
    [
        *(0, 0.0, False, "no", "n/a tissue", "nana", math.inf, "-1", "+", "CD4-", "\u2640", "NAT", "other", "Nan Li"),
        *(
            "NK",
            "NA cell",
            "NA12878",
            "null cell",
            "N",
            "none of these",
            "not B cell",
            "unknown 3",
            "unassigned T cell",
        ),
        *("MISSING1", "Unclassified lymphocyte", "nonneuronal cell", "unspecific progenitor", "T?", "A-"),
    ],
)
def test_usable_values(value):
    assert is_usable(value)
    assert clean_value(value)


def test_clean_value_is_one_line():
    assert clean_value(" a\n b\t\u00a0 c ") == "a b c"


def test_type_of_nothing_but_what_nobody_sees_is_empty():
    with pytest.raises(ValueError, match="candidates: the type '.*' is empty"):
        Puzzle((("A",),), ("\u200b\u00ad",))


def test_lists_become_sentences():
    for text, sentence in {
        "a": "a",
        " a ": " a ",  # as the published contexts have it
        "a || b": "a and b",
        "a||b || NA || c": "a, b and c",
        " a || a\t||\u00a0b ": "a and b",
        " || unknown": "",
        "n/a||-|| a": "a",
        "a | b": "a | b",
    }.items():
        assert join_list(list_entries(text)) == sentence


def test_long_texts_are_cut_in_messages():
    assert shown("abc") == "'abc'"
    assert shown("x" * 10**6) == f"'{'x' * 79}... (1,000,002 characters)"
    for changes in ({"cells": (("x" * 10**6 + "\n",),)}, {"candidates": ("x|" * 10**6,)}, {"context": "x\n" * 10**6}):
        with pytest.raises(ValueError) as error:
            Puzzle(**({"cells": (("A",),), "candidates": ("x",)} | changes))
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_what_a_terminal_obeys_is_replaced():
    assert visible("a\x1b[31mb\n\tc") == "a\N{REPLACEMENT CHARACTER}[31mb\n\tc"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("n_top must be at least 1, got 0", "--top-genes must be at least 1, got 0"),
        ("layer: there is no 'x'", "--layer: there is no 'x'"),
        ("set use_raw=True, or layer='counts'; split=none", "set --use-raw, or --layer counts; split=none"),
        ("read with use_raw=False (layer=None)", "read with use_raw=False (--layer None)"),
        ("a/layer=1 stays, and folder=x, which is no option", "a/layer=1 stays, and folder=x, which is no option"),
    ],
)
def test_a_command_names_its_options_where_a_function_names_parameters(said, shown):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("-n", "--top-genes", dest="n_top")
    parser.add_argument("--layer")
    parser.add_argument("--use-raw", action="store_true")
    assert in_options(said, parser) == shown


@pytest.mark.parametrize(
    ("written", "one"),
    [
        ("2", "2"),
        (2.0, "2"),
        ("2.0", "2"),
        ("-7.", "-7"),
        ("1e+16", "10000000000000000"),
        ("2.5e+1", "25"),
        ("2.55e+1", "2.55e+1"),
        ("2.5", "2.5"),
        ("007", "007"),
        (" donor\u00a02\n", "donor 2"),
        ("\uff12", "2"),
        ("nan", ""),
        (None, ""),
    ],
)
def test_an_id_has_one_form(written, one):
    assert canonical_id(written) == one
