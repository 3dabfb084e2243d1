"""The table over seeds."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "benchmarks" / "over_seeds.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("over_seeds", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(value):
    found = {"mean": value, "low": value - 0.1, "high": value + 0.1, "n": 4, "method": "bootstrap"}
    return {"partial_accuracy": found, "exact_match": found, "legal": found, "length": found | {"mean": 60 * value}}


@pytest.fixture
def folders(tmp_path):
    for seed, value in enumerate((0.5, 0.6, 0.8), 1):
        report = {
            "n": 4,
            "length_unit": "tokens",
            "training": {"window": 5, "first": value - 1, "last": value},
            "stages": {"after SFT, greedy": {"metrics": metrics(value)}},
            "baselines": {"naive_bayes": metrics(0.9)},
            "differences": {"after GRPO minus after SFT, greedy": {"metrics": metrics(value - 0.6)}},
            "calibration": {"ece": value / 10},
        }
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "summary.json").write_text(json.dumps(report))
    return sorted(map(str, tmp_path.iterdir()))


def test_the_mean_of_the_seeds_stands_beside_the_lowest_and_the_highest(bench, folders, capsys):
    assert bench.main(folders) == 0
    lines = capsys.readouterr().out.splitlines()
    three = "0.633 [0.500, 0.800]"
    assert f"| after SFT, greedy | {three} | {three} | {three} | 38.0 [30.0, 48.0] |" in lines
    assert (
        "| naive Bayes, cell by cell | 0.900 [0.900, 0.900] | 0.900 [0.900, 0.900] | 0.900 [0.900, 0.900] |  |" in lines
    )
    changes = [line for line in lines if line.startswith("| after GRPO minus")]
    assert changes == [
        f"| after GRPO minus after SFT, greedy | {run} | {value} | {value} |"
        for run, value in enumerate(
            ("-0.100 [-0.200, +0.000]", "+0.000 [-0.100, +0.100]", "+0.200 [+0.100, +0.300]"), 1
        )
    ]
    assert "4, 4, 4 held-out puzzles." in lines
    assert "Mean training reward, first to last 5 steps: -0.500 to +0.500; -0.400 to +0.600; -0.200 to +0.800." in lines
    assert "Expected calibration error of the last model's read-out: 0.050, 0.060, 0.080." in lines


def test_a_difference_that_is_the_same_on_every_puzzle_has_no_interval(bench, folders, capsys):
    path = Path(folders[0]) / "summary.json"
    report = json.loads(path.read_text())
    found = report["differences"]["after GRPO minus after SFT, greedy"]["metrics"]
    found["partial_accuracy"] |= {"mean": 0.0, "low": None, "high": None}
    path.write_text(json.dumps(report))
    assert bench.main(folders[:1]) == 0
    assert "| after GRPO minus after SFT, greedy | 1 | +0.000 | -0.100 [-0.200, +0.000] |" in capsys.readouterr().out


def test_what_is_no_summary_or_another_one_is_refused(bench, folders, tmp_path, capsys):
    assert bench.main([*folders, str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none' / 'summary.json'} does not exist; give the folders" in capsys.readouterr().err
    other = Path(folders[1]) / "summary.json"
    report = json.loads(other.read_text())
    other.write_text(json.dumps(report | {"stages": {}}))
    assert bench.main(folders) == 1
    assert f"{folders[1]} has other models or decodings than {folders[0]}" in capsys.readouterr().err
