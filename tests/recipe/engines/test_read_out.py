import numpy as np
import pytest

from recipe.cello1.engines.protocol import (
    Choice,
    Completion,
    EngineBase,
    Failure,
    Request,
    Sampling,
    sample_seed,
)
from recipe.cello1.engines.read_out import Reading, cell_first, closed, read_out
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.answer import format_answer, parse_answer
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer
from recipe.cello1.task.trace import first_line
from tests.helpers.stub_server import Server as Stub
from tests.helpers.toy_model import build_toy_model, toy_puzzles

FACTS = ("probabilities", "support", "margin", "entropy")
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
    return dict(read_out(engine, list(enumerate(puzzles)), Sampling(temperature=temperature), samples=samples))


def test_each_cell_is_asked_first():
    engine = Markers()
    reading = read(engine, [PUZZLE], samples=3, temperature=1.0)[0]
    assert reading.answer() == PUZZLE.answer
    request, sampling = engine.asked[-1]
    assert request.messages in [messages(cell_first(PUZZLE, cell)) for cell in range(3)]
    assert request.prefix == first_line()
    assert (sampling.stop, sampling.max_tokens) == (" ->", 64)
    assert len({request.seed for request, _ in engine.asked}) == 9
    # The third sample has the order of the first: the same evidence twice is scored once.
    assert len(engine.scored) == 6
    assert engine.scored[0].prefix == first_line() + " CD3D ->"
    assert {request.messages[-1]["content"] for request, _ in engine.asked} == {
        choice.messages[-1]["content"] for choice in engine.scored
    }


def test_greedy_evidence_has_no_seed_and_is_not_asked_for_twice_in_one_order():
    engine = Markers()
    read(engine, [PUZZLE], samples=4)
    assert {request.seed for request, _ in engine.asked} == {None}
    shown = [request.messages[-1]["content"] for request, _ in engine.asked]
    assert len(shown) == len(set(shown)) == 6  # each cell first, before two orders of the others


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_each_cell_stands_in_each_place_equally_often(n):
    puzzle = Puzzle(tuple((f"G{i}",) for i in range(n)), tuple(f"t{i}" for i in range(n)))
    for turn in range(2 * n):
        shown = [cell_first(puzzle, cell, turn).cells for cell in range(n)]
        assert [cells[0] for cells in shown] == list(puzzle.cells)
        for place in range(n):
            assert sorted(cells[place] for cells in shown) == list(puzzle.cells)
    for cell in range(n):  # and over the turns, each other cell in each place behind the first
        turned = [cell_first(puzzle, cell, turn).cells for turn in range(n - 1)]
        for place in range(1, n):
            assert len({cells[place] for cells in turned}) == n - 1


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
    assert closed(["T cell", "B cell"], " |") == ("T cell", "B cell")
    assert closed(["T cell", "T cell, CD8-positive"], " |") == ("T cell |", "T cell, CD8-positive |")


@pytest.mark.parametrize(("cells", "end"), [((("CD3D",), ("B",)), "\nCell 2:"), ((("CD3D",),), "\n</think>")])
def test_a_decision_is_closed_by_what_follows_it_in_a_trace(cells, end):
    engine = Markers({"CD3D": "T cell" + end, "B": "T cell" + end})
    read(engine, [Puzzle(cells, ("T cell", "T cell, CD8-positive"))])
    assert {choice.options for choice in engine.scored} == {(f" T cell{end}", f" T cell, CD8-positive{end}")}


def test_a_reading_prefers_the_expected_number_of_right_cells():
    reading = Reading(("a", "b"), np.array([[0.9, 0.1], [0.8, 0.2]]), 0, 0)
    assert reading.answer() == ("a", "b")
    assert reading.facts()["entropy"] == pytest.approx([0.468996, 0.721928])


def test_a_reading_counts_what_a_matching_leaves_the_other_cells():
    # Added up, the rows favour (c, b, a); but then cell 3 is of a type that it cannot be.
    rows = np.array([[0.1, 0.1, 0.8], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    assert Reading(("a", "b", "c"), rows, 0, 0).answer() == ("a", "b", "c")


# ------------------------------------------------------------------------------------------------------ soft votes


class Reasoner(EngineBase):
    """Writes given responses by turns, and finds the type that it has just written twice as likely as each other."""

    name, model, fingerprint, constraint = "reasoner", "toy", "", ""

    def __init__(self, *responses, can_score=True, constraint=""):
        self.responses, self.can_score, self.constraint = responses, can_score, constraint
        self.asked, self.scored = [], []

    def generate(self, requests, sampling):
        for i, request in enumerate(requests):
            self.asked.append((request, sampling))
            yield i, Completion(self.responses[i % len(self.responses)], "stop", 10, 50)

    def score(self, choices):
        for i, choice in enumerate(choices):
            self.scored.append(choice)
            number = choice.prefix.count("|")
            written = parse_answer(next(text for text in self.responses if text.startswith(choice.prefix))).items
            yield i, np.log([2.0 if option.startswith(written[number]) else 1.0 for option in choice.options])


THREE = ("T cell", "B cell", "NK cell")
OTHER = ("B cell", "T cell", "NK cell")


def soft(engine, puzzles=(PUZZLE,), samples=4, temperature=1.0):
    numbered = list(enumerate(puzzles))
    return dict(read_out(engine, numbered, Sampling(temperature=temperature), "soft", samples=samples))


def test_soft_votes_average_the_probabilities_in_each_slot():
    texts = [format_answer(types, why) for types, why in ((THREE, "a"), (THREE, "b"), (OTHER, "c"), (THREE, "a"))]
    engine = Reasoner(*texts)
    reading = soft(engine)[0]
    # By hand: 1/2 for what a sample names and 1/4 for each other; three of four samples say T, B.
    thrice, once = (3 * 0.5 + 0.25) / 4, (3 * 0.25 + 0.5) / 4
    np.testing.assert_allclose(reading.probabilities, [[once, 0.25, thrice], [thrice, 0.25, once], [0.25, 0.5, 0.25]])
    assert reading.answer() == THREE
    assert (reading.tokens, reading.prompt_tokens, reading.source) == (40, 200, "model")
    # The same answer twice is scored once; each slot behind the reasoning and what was written before it.
    assert reading.scored == len(engine.scored) == 9
    head = "<think>c</think>\n<answer>"
    assert [choice.prefix for choice in engine.scored[6:]] == [head, head + "B cell | ", head + "B cell | T cell | "]
    assert engine.scored[0].options == TYPES
    assert [request.seed for request, _ in engine.asked] == [sample_seed(0, 0, sample) for sample in range(4)]


def test_soft_votes_read_only_answers_of_the_right_length():
    engine = Reasoner(format_answer(THREE), "I do not know", format_answer(THREE[:2]), "<think>" + "x" * 9)
    reading = soft(engine)[0]
    np.testing.assert_allclose(reading.probabilities[0], [0.25, 0.25, 0.5])
    assert (reading.tokens, len(engine.scored)) == (40, 3)
    nothing = soft(Reasoner("?"))[0]
    assert (nothing.probabilities == 1 / 3).all()
    assert sorted(nothing.answer()) == sorted(TYPES)
    assert (nothing.scored, nothing.source) == (0, "model")


def test_soft_votes_are_held_to_legal_answers_where_the_engine_is():
    engine = Reasoner(format_answer(THREE), constraint="exact")
    soft(engine)
    assert {(request.candidates, request.n_answers) for request, _ in engine.asked} == {(TYPES, 3)}


def test_slots_are_closed_as_an_answer_goes_on():
    names = ("T cell", "T cell, CD8-positive")
    engine = Reasoner(format_answer(names))
    soft(engine, [Puzzle((("A",), ("B",)), names)], samples=1, temperature=0.0)
    assert [choice.options for choice in engine.scored] == [
        ("T cell |", "T cell, CD8-positive |"),
        ("T cell</answer>", "T cell, CD8-positive</answer>"),
    ]


# ---------------------------------------------------------------------------------- servers without probabilities


def test_without_probabilities_soft_votes_are_counted():
    engine = Reasoner(
        format_answer(THREE), format_answer(OTHER), format_answer(("t CELL", "x", "NK cell")), can_score=False
    )
    reading = soft(engine, samples=3)[0]
    np.testing.assert_allclose(reading.probabilities, [[1 / 3, 0, 2 / 3], [0.5, 0, 0.5], [0, 1, 0]])
    assert reading.answer() == THREE
    assert (reading.scored, reading.source, engine.scored) == (0, "votes", [])


def test_without_probabilities_the_first_lines_of_a_matrix_vote():
    class Server(Markers):
        can_score = False

        def generate(self, requests, sampling):
            for i, request in enumerate(requests):
                self.asked.append((request, sampling))
                gene = request.messages[-1]["content"].partition("Cell 1: ")[2].partition("\n")[0]
                line = f"Cell 1: {gene} -> {self.known[gene]}"
                odd = [f"<think>\n{line}", f"<think>{line}</think>\n", "<think>\nCell 1: A", "Sorry -> B cell"]
                yield i, Completion(odd[i % 4], "stop", 20, 50)

    engine = Server()
    reading = read(engine, [PUZZLE], samples=4, temperature=1.0)[0]
    np.testing.assert_array_equal(reading.probabilities, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert reading.answer() == PUZZLE.answer
    assert reading.facts()["probabilities_from"] == "votes"
    request, sampling = engine.asked[0]
    assert (request.prefix, sampling.stop, sampling.max_tokens) == ("", "\nCell 2:", Sampling().max_tokens)


def test_a_server_of_traces_is_read_by_votes(tmp_path):
    def reply(body, n):
        assert body["stop"] == ["\nCell 2:"]
        gene = body["messages"][-1]["content"].partition("Cell 1: ")[2].partition("\n")[0]
        return f"<think>\nCell 1: {gene} -> {Markers().known[gene]}"

    with Stub(reply) as server, start_engine("openai", "m", base_url=server.url) as engine:
        done = predict(engine, [PUZZLE], tmp_path / "p.jsonl", decode="matrix", progress=False)
    assert done.answered == 1
    (record,) = read_items(tmp_path / "p.jsonl")
    assert record["prediction"] == format_answer(PUZZLE.answer)
    assert (record["probabilities_from"], record["support"], len(server.bodies)) == ("votes", [1.0] * 3, 6)


# ------------------------------------------------------------------------------------------------- hostile numbers


class Hostile(Markers):
    """Gives log-probabilities from a generator, or the same for all."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def score(self, choices):
        for i, choice in enumerate(choices):
            yield i, self.draw(len(choice.options))


def random_puzzles(n):
    rng = np.random.default_rng(5)
    found = []
    for i in range(n):
        size = int(rng.integers(1, 16))
        names = tuple(f"type {j:02}" for j in sorted(rng.permutation(40)[: size + int(rng.integers(0, 3))].tolist()))
        found.append(Puzzle(tuple((f"G{i}", f"C{j}") for j in range(size)), names, tuple(names[:size])))
    return found


def hostile_draws():
    rng = np.random.default_rng(7)
    some = [0.0, -1.0, -745.0, -1e9, -1e308, -np.inf]
    return {
        "even": lambda n: np.full(n, -3.0),
        "none": lambda n: np.full(n, -np.inf),
        "one": lambda n: np.where(np.arange(n) == 0, 0.0, -np.inf),
        "tiny": lambda n: np.full(n, -1e308),
        "any": lambda n: rng.choice(some, n),
        "ties": lambda n: np.log(rng.integers(1, 3, n)),
    }


@pytest.mark.parametrize("kind", hostile_draws())
@pytest.mark.slow
def test_a_thousand_puzzles_are_answered_legally_whatever_the_probabilities(kind):
    puzzles = random_puzzles(1000)
    found = read(Hostile(hostile_draws()[kind]), puzzles)
    again = read(Hostile(hostile_draws()[kind]), puzzles)
    assert len(found) == 1000
    for i, puzzle in enumerate(puzzles):
        assert score_answer(found[i].text, puzzle.answer, candidates=puzzle.candidates).legal
        facts = found[i].facts()
        assert np.isfinite(np.concatenate([np.ravel(facts[name]) for name in FACTS])).all()
        np.testing.assert_allclose(found[i].probabilities.sum(axis=1), 1)
        assert found[i].answer() == again[i].answer()


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_log_probabilities_that_are_no_numbers_are_a_failure_of_the_machinery(odd):
    found = read(Hostile(lambda n: np.array([odd, *[-1.0] * (n - 1)])), [PUZZLE])
    assert "no number below infinity" in found[0].error


# --------------------------------------------------------------------------------------------------- a real engine


@pytest.mark.slow
def test_soft_votes_of_a_real_model_are_those_of_its_forward_passes(tmp_path):
    folder = build_toy_model(tmp_path)
    puzzle = toy_puzzles(1)[0]
    with start_engine("transformers", folder, constrained=True, device="cpu") as engine:
        sampling = Sampling(temperature=1.0, max_tokens=60, reasoning_budget=4)
        ((_, reading),) = read_out(engine, [(0, puzzle)], sampling, "soft", samples=2)
        request = [Request(messages(puzzle), sample_seed(0, 0, s), puzzle.candidates, 3) for s in range(2)]
        texts = [done.text for _, done in sorted(engine.generate(request, sampling))]
        expected = np.zeros((3, len(puzzle.candidates)))
        for text in texts:
            head, _, said = text.partition("<answer>")
            names = said.removesuffix("</answer>").split(" | ")
            for i in range(3):
                before = head + "<answer>" + "".join(f"{name} | " for name in names[:i])
                end = " |" if i < 2 else "</answer>"
                ((_, row),) = engine.score([Choice(messages(puzzle), before, closed(puzzle.candidates, end))])
                expected[i] += np.exp(row) / np.exp(row).sum() / 2
        np.testing.assert_allclose(reading.probabilities, expected, atol=1e-5)
    assert score_answer(reading.text, puzzle.answer, candidates=puzzle.candidates).legal
