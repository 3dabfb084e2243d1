import numpy as np
import pytest

from recipe.cello1.engines.protocol import Completion, EngineBase, Failure, Sampling
from recipe.cello1.inference.matrix import Reading, cell_first, decisions, evidence_sampling, read_matrix
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.trace import first_line

TYPES = ("B cell", "NK cell", "T cell")
PUZZLE = Puzzle((("CD3D",), ("CD79A",), ("GNLY",)), TYPES, ("T cell", "B cell", "NK cell"))


class Markers(EngineBase):
    """Cites the first gene of the first cell, and knows what it speaks for."""

    name, model, fingerprint, constraint, can_score = "markers", "toy", "", "", True

    def __init__(self, known=None, silent=False):
        self.known = known or {"CD3D": "T cell", "CD79A": "B cell", "GNLY": "NK cell"}
        self.silent, self.asked, self.scored = silent, [], []

    def generate(self, requests, sampling):
        for i, request in reversed(list(enumerate(requests))):
            self.asked.append((request, sampling))
            genes = request.messages[-1]["content"].partition("Cell 1: ")[2].partition("\n")[0]
            if not (self.silent and i == 0):
                yield i, Completion(f" {genes.split(', ')[0]}", "stop", 2, 50)

    def score(self, choices):
        for i, choice in enumerate(choices):
            self.scored.append(choice)
            gene = choice.prefix.removesuffix(" ->").rpartition(" ")[2]
            # Up to a constant, as the protocol says.
            yield i, np.log([0.8 if option == f" {self.known[gene]}" else 0.1 for option in choice.options]) - 5


def read(engine, puzzles, samples=1, temperature=0.0):
    sampling = evidence_sampling(Sampling(temperature=temperature))
    return dict(read_matrix(engine, list(enumerate(puzzles)), sampling, samples=samples))


def test_each_cell_is_asked_first_with_what_is_left_already_written():
    engine = Markers()
    reading = read(engine, [PUZZLE], samples=2, temperature=1.0)[0]
    assert reading.answer() == PUZZLE.answer
    request, sampling = engine.asked[-1]
    assert request.messages == messages(cell_first(PUZZLE, 0))
    assert request.prefix == first_line(TYPES)
    assert (sampling.stop, sampling.max_tokens) == (" ->", 64)
    assert len({request.seed for request, _ in engine.asked}) == 6
    # Twice the same evidence is scored once.
    assert len(engine.scored) == 3
    assert engine.scored[0].prefix == first_line(TYPES) + " CD3D ->"
    assert {request.messages[-1]["content"] for request, _ in engine.asked} == {
        choice.messages[-1]["content"] for choice in engine.scored
    }


def test_greedy_evidence_has_no_seed():
    engine = Markers()
    read(engine, [PUZZLE])
    assert {request.seed for request, _ in engine.asked} == {None}


def test_cells_that_look_alike_still_get_different_types():
    twins = Puzzle((("CD3D",), ("CD3D", "X"), ("GNLY",)), TYPES)
    reading = read(Markers(), [twins])[0]
    assert sorted(reading.answer()) == sorted(TYPES)
    assert reading.answer()[2] == "NK cell"
    assert min(reading.facts()["margin"]) == -0.7


def test_many_puzzles_come_in_order_each_as_if_alone():
    many = [PUZZLE, cell_first(PUZZLE, 2), Puzzle((("GNLY",),), TYPES)] * 30
    found = read(Markers(), many)
    assert list(found) == list(range(90))
    for i in range(3):
        np.testing.assert_array_equal(found[87 + i].probabilities, read(Markers(), [many[i]])[0].probabilities)
    assert found[2].answer() == ("NK cell",)


def test_what_an_engine_leaves_out_has_failed():
    found = read(Markers(silent=True), [PUZZLE, PUZZLE])
    assert isinstance(found[0], Failure)
    assert found[1].answer() == PUZZLE.answer


def test_a_name_that_another_one_begins_with_is_closed():
    assert decisions(PUZZLE) == (" B cell", " NK cell", " T cell")
    nested = Puzzle((("A",), ("B",)), ("T cell", "T cell, CD8-positive"))
    assert decisions(nested) == (" T cell\nCell 2:", " T cell, CD8-positive\nCell 2:")
    assert decisions(Puzzle((("A",),), nested.candidates))[0] == " T cell\n</think>"


def test_a_reading_prefers_the_expected_number_of_right_cells():
    reading = Reading(("a", "b"), np.array([[0.9, 0.1], [0.8, 0.2]]), 0, 0)
    assert reading.answer() == ("a", "b")
    assert reading.facts()["entropy"] == pytest.approx([0.468996, 0.721928])
