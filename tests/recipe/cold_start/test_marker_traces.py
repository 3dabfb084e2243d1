from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.cold_start.marker_traces import (
    add_traces,
    best_markers,
    marker_answer,
    marker_evidence,
    teach,
    write_trace,
)
from recipe.cello1.formats.items import item_to_puzzle, puzzle_to_item
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.task.answer import format_answer, parse_answer
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer
from tests.helpers.cli import command

main = command("traces markers")

CELLS = [("MS4A1", "CD74", "ACTB"), ("CD74", "MS4A1"), ("GNLY", "ACTB"), ("GNLY", "NKG7"), ("LYZ", "CD74", "ACTB")]
LABELS = ["B", "B", "NK", "NK", "Mono"]
PUZZLE = Puzzle((("ACTB", "GNLY", "NKG7"), ("CD74", "ACTB", "LYZ")), ("Mono", "NK"), ("NK", "Mono"))


def test_evidence_is_the_difference_of_shares():
    evidence = marker_evidence(CELLS, LABELS)
    assert list(evidence) == ["B", "Mono", "NK"]
    assert evidence["B"]["MS4A1"] == 1.0
    assert evidence["NK"]["MS4A1"] == -0.5
    assert evidence["B"]["CD74"] == pytest.approx(1 - (1 + 0) / 2)
    assert evidence["NK"]["ACTB"] == pytest.approx(0.5 - (0.5 + 1) / 2)


def test_a_gene_counts_once_for_a_cell():
    assert marker_evidence([("A", "A"), ("B",)], ["x", "y"])["x"]["A"] == 1.0


@given(st.lists(st.tuples(st.lists(st.sampled_from("ABCDE"), max_size=5), st.sampled_from("xyz")), min_size=1))
def test_evidence_is_bounded_and_sums_to_zero(rows):
    cells, labels = [genes for genes, _ in rows], [label for _, label in rows]
    if len(set(labels)) < 2:
        with pytest.raises(ValueError, match="at least one other type"):
            marker_evidence(cells, labels)
        return
    evidence = marker_evidence(cells, labels)
    for gene in {gene for genes in cells for gene in genes}:
        scores = [evidence[name][gene] for name in evidence]
        assert all(-1 <= score <= 1 for score in scores)
        assert sum(scores) == pytest.approx(0, abs=1e-9)


def test_markers_of_equal_worth_keep_the_order_of_the_cell():
    assert best_markers(("C", "A", "B", "X"), {"A": 0.5, "B": 0.5, "C": 0.5}, 3) == ("C", "A", "B")
    assert best_markers(("X", "A"), {"A": -0.1}, 1) == ("X",)


def test_trace_cites_the_best_genes_of_each_cell():
    trace = write_trace(PUZZLE, marker_evidence(CELLS, LABELS), n_genes=2)
    assert trace == "\nCell 1: GNLY, NKG7 -> NK\nCell 2: LYZ, CD74 -> Mono\n"


def test_trace_cites_the_first_genes_of_each_cell_on_request():
    trace = write_trace(PUZZLE, marker_evidence(CELLS, LABELS), n_genes=2, cite="top")
    assert trace == "\nCell 1: ACTB, GNLY -> NK\nCell 2: CD74, ACTB -> Mono\n"


def test_every_cited_gene_is_one_of_the_cell():
    (traced,) = add_traces([PUZZLE], marker_evidence(CELLS, LABELS), 3)
    for line, genes, name in zip(
        traced.meta["reasoning"].strip().split("\n"), PUZZLE.cells, PUZZLE.answer, strict=True
    ):
        cited, _, said = line.partition(": ")[2].partition(" -> ")
        assert set(cited.split(", ")) <= set(genes)
        assert said == name


def test_a_traced_puzzle_is_solved_by_its_own_trace_and_survives_the_file_format():
    (traced,) = add_traces([PUZZLE], marker_evidence(CELLS, LABELS))
    text = format_answer(traced.answer, traced.meta["reasoning"])
    assert parse_answer(text).ok
    assert score_answer(text, traced.answer).score == 1.0
    assert puzzle_to_item(traced)["assistant_msg"] == text
    assert item_to_puzzle(puzzle_to_item(traced)).meta["reasoning"] == traced.meta["reasoning"]
    assert "reasoning" not in PUZZLE.meta


def test_the_teacher_finds_matchings_by_markers_alone():
    evidence = marker_evidence(CELLS, LABELS)
    assert marker_answer(Puzzle(PUZZLE.cells, PUZZLE.candidates), evidence) == PUZZLE.answer
    # Both look like a B cell; the one that has less of it gives way.
    close = Puzzle((("CD74", "LYZ"), ("CD74", "MS4A1")), ("B", "Mono"))
    assert marker_answer(close, evidence) == ("Mono", "B")


def test_only_what_the_teacher_gets_right_is_kept():
    evidence = marker_evidence(CELLS, LABELS)
    wrong = Puzzle(PUZZLE.cells, PUZZLE.candidates, PUZZLE.answer[::-1])
    unknown = Puzzle((("LYZ",), ("CD74",)), ("B", "mast"), ("mast", "B"))
    (kept,) = teach([wrong, PUZZLE, unknown, Puzzle(PUZZLE.cells, PUZZLE.candidates)], lambda puzzle: evidence)
    assert kept.answer == PUZZLE.answer
    assert kept.meta == {"reasoning": write_trace(PUZZLE, evidence)}


def test_unusable_input():
    evidence = marker_evidence(CELLS, LABELS)
    with pytest.raises(ValueError, match="4 entries for 5 cells"):
        marker_evidence(CELLS, LABELS[:4])
    with pytest.raises(ValueError, match="no answer"):
        write_trace(Puzzle(PUZZLE.cells, PUZZLE.candidates), evidence)
    with pytest.raises(ValueError, match=r"no evidence for the types \['T'\]"):
        write_trace(Puzzle((("A",),), ("T",), ("T",)), evidence)
    with pytest.raises(ValueError, match="n_genes must be at least 1"):
        write_trace(PUZZLE, evidence, 0)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        """Labelled cells whose types differ in one gene each, and puzzles of them; gives the command's arguments."""
        pytest.importorskip("anndata")
        from tests.helpers.toy_h5ad import toy_adata, write

        adata = toy_adata(n_cells=90, n_types=3)
        write(adata, tmp_path / "cells.h5ad")
        genes = [("GENE1", "GENE119", "GENE2"), ("GENE3", "GENE118")]
        write_puzzles(tmp_path / "puzzles.json", [Puzzle(tuple(genes), ("type 0", "type 1"), ("type 0", "type 1"))])
        names = {"--cells": "cells.h5ad", "--data": "puzzles.json", "--out": "sft.json"}
        return [word for option, name in names.items() for word in (option, str(tmp_path / name))]

    def test_traces_cite_the_markers_of_the_cells(self, files, tmp_path, capsys):
        assert main([*files, "--n-genes", "1"]) == 0
        (puzzle,) = load_puzzles(tmp_path / "sft.json").puzzles
        assert puzzle.meta["reasoning"] == ("\nCell 1: GENE119 -> type 0\nCell 2: GENE118 -> type 1\n")
        assert "1 of 1 puzzles with traces, from 3 types" in capsys.readouterr().err

    def test_traces_cite_the_first_genes_on_request(self, files, tmp_path):
        assert main([*files, "--n-genes", "2", "--cite", "top"]) == 0
        (puzzle,) = load_puzzles(tmp_path / "sft.json").puzzles
        assert puzzle.meta["reasoning"].startswith("\nCell 1: GENE1, GENE119 -> type 0\n")

    def test_a_teacher_without_the_answer_learns_from_other_donors(self, files, tmp_path, capsys):
        import anndata as ad

        cells = ad.read_h5ad(tmp_path / "cells.h5ad")
        cells.obs["donor_id"] = ["here" if i % 2 else "there" for i in range(cells.n_obs)]
        # The other donor's cells are labelled the other way round, so that its teacher is wrong.
        swapped = {"type 0": "type 1", "type 1": "type 0"}
        types = cells.obs["cell_type"].astype(str)
        cells.obs["cell_type"] = types.where(cells.obs["donor_id"] == "here", types.replace(swapped)).astype("category")
        cells.write_h5ad(tmp_path / "cells.h5ad")
        (puzzle,) = load_puzzles(tmp_path / "puzzles.json").puzzles
        puzzles = [replace(puzzle, meta={"donor_id": donor}) for donor in ("here", "there")]
        write_puzzles(tmp_path / "puzzles.json", puzzles)
        teacher = ["--teacher", "markers", "--donor-column", "donor_id"]
        assert main([*files, *teacher]) == 0
        assert [kept.meta["donor_id"] for kept in load_puzzles(tmp_path / "sft.json").puzzles] == ["there"]
        assert "1 of 2 puzzles with traces" in capsys.readouterr().err
        write_puzzles(tmp_path / "puzzles.json", puzzles[:1])
        assert main([*files, *teacher]) == 1
        assert "the teacher gets no puzzle right" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--type-column", "no_such"], "no_such"),
            (["--donor-column", "donor_id"], "--donor-column needs --teacher markers"),
            (["--donor-column", "no_such", "--teacher", "markers"], "--donor-column"),
            (["--type-column", "tissue"], "at least one other type"),
            (["--type-column", "donor_id"], "no evidence for the types"),
            (["--data", "missing.json"], "missing.json"),
            (["--cells", "missing.h5ad"], "missing.h5ad"),
        ],
    )
    def test_unusable_input_is_one_line(self, files, tmp_path, capsys, more, message):
        assert main([*files, *more]) == 1
        err = capsys.readouterr().err
        assert err.startswith("cello1 traces markers: error: ") and message in err and err.count("\n") == 1
        assert not (tmp_path / "sft.json").exists()


@pytest.mark.parametrize(("mine", "theirs"), [("a", "a"), ("2", "2.0"), (" D\u200b1", "D1")])
def test_cells_may_be_those_of_training_puzzles_and_the_teacher_does_not_see_the_donor(tmp_path, capsys, mine, theirs):
    """Donor b contradicts donor a: what each donor's puzzles are taught from are the cells of the other."""

    def batch(donor, first, second):
        meta = {"donor_id": donor, "dataset": "d", "cell_ids": [f"{donor}1", f"{donor}2"]}
        return Puzzle(((first, "X"), (second, "Y")), ("Mono", "NK"), ("NK", "Mono"), "", meta)

    train, ask = [batch(theirs, "P", "Q"), batch("b", "Q", "P")], [batch(mine, "Q", "P"), batch("b", "Q", "P")]
    write_puzzles(tmp_path / "train.json", train)
    write_puzzles(tmp_path / "ask.json", ask)
    words = ["--cells", tmp_path / "train.json", "--data", tmp_path / "ask.json", "--out", tmp_path / "sft.json"]
    assert main([*words, "--teacher", "markers"]) == 0
    (kept,) = load_puzzles(tmp_path / "sft.json").puzzles
    assert kept.meta["donor_id"] == mine and kept.cells == ask[0].cells
    assert "1 of 2 puzzles with traces, from 2 types" in capsys.readouterr().err
