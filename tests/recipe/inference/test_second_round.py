import pytest

from recipe.cello1.engines.protocol import Completion, EngineBase, Failure
from recipe.cello1.evaluation.evaluate import evaluate
from recipe.cello1.formats.atomic import read_items, write_items
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.predictions import prediction_record
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.inference import second_round as command
from recipe.cello1.inference.second_round import (
    OpenPuzzle,
    find_open,
    main,
    merge,
    merge_rounds,
    open_cells,
    second_puzzle,
)
from recipe.cello1.inference.vote import vote_records
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.voting import consensus

ABC = ("a", "b", "c")


def puzzle(i):
    return Puzzle((("G1", f"X{i}"), ("G2",), ("G3",)), ABC, ABC, "Context.", {"tissue": "blood"})


PUZZLES = [puzzle(i) for i in range(4)]
FIRST = {
    0: [ABC, ABC, ABC],  # settled
    1: [("a", "c", "b"), ("a", "c", "b"), ABC],  # two cells open, the votes for the wrong way round
    2: [("b", "a", "c"), ("c", "a", "b"), ("b", "c", "a")],  # wide open
    3: [None, None, None],  # nothing usable
}


class Engine(EngineBase):
    """Answers smaller puzzles rightly; those of three cells fail."""

    name, model, fingerprint, constraint = "fake", "m", "", ""

    def __init__(self):
        self.asked = []

    def generate(self, requests, sampling):
        for position, request in enumerate(requests):
            question = request.messages[-1]["content"]
            self.asked.append(question)
            if "Cell 3" in question:
                yield position, Failure("out of memory")
            else:
                yield position, Completion(format_answer(("b", "c")), "stop", 5, 5)


def test_the_smaller_puzzle_and_its_place():
    found = consensus([("a", "b", "c")] * 3 + [("a", "c", "b")] * 2, ABC, 3)
    cells = open_cells(found, 0.9)
    assert cells == [1, 2]
    smaller = second_puzzle(PUZZLES[0], found, cells)
    assert smaller.cells == (("G2",), ("G3",))
    assert (smaller.candidates, smaller.answer) == (("b", "c"), ("b", "c"))
    assert merge_rounds(found, cells, ("c", "b")) == ("a", "c", "b")
    assert open_cells(found, 0.5) == []
    with pytest.raises(ValueError, match="cells is empty"):
        second_puzzle(PUZZLES[0], found, [])


def test_without_choice_or_gold():
    sure = consensus([("b", "a", "c")] * 5 + [("b", "a", "a")], ABC, 3)
    assert open_cells(sure, 0.99) == []  # one open cell and one type left
    wrong = consensus([("b", "a", "c")] * 3 + [("b", "c", "a")] * 2, ABC, 3)
    assert second_puzzle(PUZZLES[0], wrong, open_cells(wrong, 0.9)).answer is None  # its gold type is taken


@pytest.fixture
def run(tmp_path, monkeypatch):
    records = [
        prediction_record(
            puzzle_to_item(PUZZLES[i]),
            "?" if types is None else format_answer(types, "because"),
            index=i,
            sample=s,
            finish_reason="stop",
            tokens=9,
            engine="fake",
            sampling={"temperature": 1.0},
        )
        for i, answers in FIRST.items()
        for s, types in enumerate(answers)
    ]
    write_items(tmp_path / "samples.jsonl", records)
    write_puzzles(tmp_path / "data.json", PUZZLES)
    engine = Engine()
    monkeypatch.setattr(command, "start_engines", lambda *args, **options: engine)

    def call(*more):
        flags = ["--data", str(tmp_path / "data.json"), "--model", "m", "--out", str(tmp_path / "voted.jsonl")]
        return main([str(tmp_path / "samples.jsonl"), *flags, "--samples", "3", *more])

    call.engine, call.folder, call.records = engine, tmp_path, records
    return call


def test_only_open_cells_are_asked_again_and_the_rest_stays(run, capsys):
    assert run() == 1  # puzzle 2 failed
    assert "3 answers failed" in capsys.readouterr().err
    assert len(run.engine.asked) == 6
    small = run.engine.asked[0]
    assert "Cell 2: G3" in small
    assert "Cell 3" not in small
    assert small.rstrip().splitlines()[-2:] == ["b", "c"]
    voted = read_items(run.folder / "voted.jsonl")
    first = vote_records(run.records)
    assert [record["index"] for record in voted] == [0, 1, 2, 3]
    assert voted[1]["prediction"] == format_answer(ABC)
    assert voted[1]["open_cells"] == [1, 2]
    assert [cell["support"] for cell in voted[1]["cells"]] == [1.0, 1.0, 1.0]
    assert [voted[i] for i in (0, 2, 3)] == [first[i] for i in (0, 2, 3)]  # untouched
    exact = [evaluate([r], PUZZLES)["metrics"]["exact_match"]["mean"] for r in (first[1], voted[1])]
    assert exact == [0, 1]


def test_goes_on_where_it_was(run):
    run()
    before = len(run.engine.asked)
    run()
    assert len(run.engine.asked) == before + 3  # only what failed


def test_nothing_open_asks_nobody(run, capsys):
    assert run("--min-support", "0") == 0
    assert run.engine.asked == []
    assert "0 of 4 puzzles asked again" in capsys.readouterr().out


def test_find_open():
    voted = [{"index": 0, "error": "down"}]
    assert find_open(voted, PUZZLES, 0.5) == []
    with pytest.raises(ValueError, match="min_support must be between 0 and 1"):
        find_open(voted, PUZZLES, 2)
    with pytest.raises(ValueError, match="prediction 9 is not of this data set"):
        find_open([{"index": 9, "voted": [], "cells": []}], PUZZLES, 0.5)


def test_both_rounds_are_weighed_unless_told_not_to(run, capsys):
    path = run.folder / "samples.jsonl"
    sure = [{**record, "logprob": -1.0 if record["sample"] == 2 else -90.0} for record in run.records]
    write_items(path, sure)  # of puzzle 1 the right answer, which has one vote of three
    assert run("--logprobs", "--min-support", "0.5") == 0
    assert "0 of 4 puzzles asked again" in capsys.readouterr().out
    assert read_items(run.folder / "voted.jsonl")[1]["prediction"] == format_answer(ABC, "because")
    assert run("--no-weighted") == 1
    assert "2 of 4 puzzles asked again" in capsys.readouterr().out
    assert run("--weighted") == 2
    assert "--weighted needs --logprobs" in capsys.readouterr().err


def test_the_second_round_is_weighed():
    small = OpenPuzzle(0, PUZZLES[0], consensus([ABC, ("a", "c", "b")], ABC, 3), [1, 2])
    answers = (("b", "c"), -90.0), (("c", "b"), -1.0), (("b", "c"), -90.0)
    records = [
        {"index": 0, "prediction": format_answer(types), "logprob": logprob, "tokens": 9} for types, logprob in answers
    ]
    voted = [{"index": 0}]
    assert merge(voted, [small], records)[0]["prediction"] == format_answer(("a", "c", "b"))
    assert merge(voted, [small], records, weighted=False)[0]["prediction"] == format_answer(ABC)
    del records[1]["logprob"]
    assert merge(voted, [small], records)[0]["prediction"] == format_answer(ABC)
    with pytest.raises(ValueError, match="ask with --logprobs"):
        merge(voted, [small], records, weighted=True)


def test_answers_nobody_can_use_leave_the_first_round(run):
    run.engine.generate = lambda requests, sampling: (
        (i, Completion("?", "stop", 1, 1)) for i, _ in enumerate(requests)
    )
    assert run() == 0
    assert read_items(run.folder / "voted.jsonl") == vote_records(run.records)


def test_bad_options_in_one_line(run, capsys):
    assert run("--min-support", "7") == 2
    error = capsys.readouterr().err
    assert error.startswith("second_round: min_support")
    assert error.count("\n") == 1
