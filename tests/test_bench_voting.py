"""The table of all ways of decoding, on puzzles whose first gene gives the type away, with an engine that knows it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from recipe.cello1.engines.protocol import Completion, EngineBase, Failure
from recipe.cello1.engines.start import ENGINES
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.task.answer import ANSWER_OPEN, format_answer
from recipe.cello1.task.puzzle import Puzzle

MARKERS = {"MS4A1": "B cell", "GNLY": "NK cell", "CD3D": "T cell"}
TYPES = tuple(sorted(MARKERS.values()))


def puzzles(n):
    genes = list(MARKERS)
    orders = [[genes[(i + j) % 3] for j in range(3)] for i in range(n)]
    return [
        Puzzle(tuple((g, f"X{i}") for g in own), TYPES, tuple(MARKERS[g] for g in own)) for i, own in enumerate(orders)
    ]


class Knowing(EngineBase):
    """Confuses the last two cells, unless it is held to a legal answer."""

    name, fingerprint, constraint, can_score = "transformers", "", "exact", True
    fail = False

    def __init__(self, model, **_):
        self.model = model

    @staticmethod
    def gold(messages):
        return [
            MARKERS[line.split(": ")[1].split(",")[0]]
            for line in messages[-1]["content"].splitlines()
            if "Cell " in line
        ]

    def generate(self, requests, sampling):
        for i, request in enumerate(requests):
            types = self.gold(request.messages)
            text = (
                " X"
                if request.prefix
                else format_answer(types if request.n_answers else [types[0], types[2], types[1]])
            )
            done = Completion(text, "stop", 2 if request.prefix else 10, 50, -1.0 if sampling.logprobs else None)
            yield i, Failure("out of memory") if self.fail else done

    def score(self, choices):
        for i, choice in enumerate(choices):
            slot = choice.prefix.partition(ANSWER_OPEN)[2].count("|")
            right = self.gold(choice.messages)[slot]
            yield i, np.log([0.8 if right in option else 0.1 for option in choice.options])


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setitem(ENGINES, "transformers", (__name__, "Knowing"))
    monkeypatch.setattr(Knowing, "fail", False)
    for name in ("test", "train"):
        write_puzzles(tmp_path / f"{name}.json", puzzles(6))
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "bench_voting.py"))
    files = ["--model", "m", "--data", tmp_path / "test.json", "--out", tmp_path / "out", "--engine", "transformers"]
    return lambda *more: script["main"](list(map(str, [*files, *more])))


def test_every_way_of_decoding_has_a_row(bench, tmp_path, capsys):
    assert bench("--baseline", tmp_path / "train.json", "--samples", "3") == 0
    out = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines() if line.startswith("|")
    ]
    assert rows[0][1:7] == [
        "partial accuracy",
        "strict accuracy",
        "exact match",
        "legal answers",
        "tokens a puzzle",
        "ECE",
    ]
    found = {row[0]: [cell.partition(" [")[0] for cell in row[1:]] for row in rows[2:]}
    third, sure = ["0.333", "0.333", "0.000", "1.000"], ["1.000"] * 4
    assert {name: row[:6] for name, row in found.items()} == {
        "free, greedy": [*third, "10.0", ""],
        "constrained, greedy": [*sure, "10.0", ""],
        "one sample": [*third, "10.0", ""],
        "consensus of 3": [*third, "30.0", "0.571"],
        "soft votes of 3": [*sure, "30.0", "0.034"],
        "matrix, 1 order": [*sure, "6.0", "0.034"],
        "matrix, 3 orders": [*sure, "12.0", "0.034"],  # of three cells there are two
        "best of all (needs the gold)": [*third, "30.0", ""],
        "naive Bayes, matched": [*sure, "", ""],
        "naive Bayes, cell by cell": [*sure, "", ""],
    }
    assert found["free, greedy"][6] == "+0.667" and found["matrix, 3 orders"][6] == ""
    kept = json.loads((tmp_path / "out" / "voting.json").read_text())
    assert kept["ways"]["soft votes of 3"]["calibration"]["n_bins"] == 10
    assert (tmp_path / "out" / "voting.md").read_text() in out


def test_what_failed_or_cannot_be_compared_is_said(bench, monkeypatch, capsys):
    assert bench("--samples", "1") == 2
    assert "--samples must be at least 2, got 1" in capsys.readouterr().err
    monkeypatch.setattr(Knowing, "fail", True)
    assert bench("--limit", "2") == 2
    assert "free, greedy: 2 answers failed (out of memory); run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(Knowing, "fail", False)
    assert bench("--limit", "2") == 0
