"""The one table over all benchmarks; the benchmarks themselves are run by hand, on a machine that does nothing else."""

import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run_all

    return run_all


@pytest.fixture
def rows(run_all):
    import rows

    return rows


def test_a_benchmark_ends_in_the_table():
    command = [sys.executable, "benchmarks/run_all.py", "--quick", "--only", "scoring"]
    found = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    head, table = found.stdout.split("\n\n")
    assert "Python " in head and "numpy " in head and "logical processors" in head
    lines = table.splitlines()
    assert lines[0] == "| benchmark | what | ours | reference | ratio | wanted | met |"
    assert [line.startswith("| scoring | score a response of 500 words") for line in lines[2:]] == [True] * 3
    assert all(line.endswith("|  |  |  |  |") for line in lines[2:]), "a quick try has no bounds"


def test_what_cannot_run_says_so_and_is_no_failure(rows):
    why = rows.lacking("json", "no_such_package", "nor_this")
    assert why == "no_such_package, nor_this not installed"
    row = rows.not_run("answer puzzles", why)
    assert "| answer puzzles | not run: no_such_package, nor_this not installed |" in rows.markdown([row])
    assert rows.finish([row], None) == 0


def test_rows_survive_the_file_and_a_missed_bound_is_an_exit_code(rows, tmp_path):
    kept = rows.Row("a", "1 s", met=True, wanted="< 2 s")
    missed = rows.Row("b", "3 s", "6 s", "2.0", "> 3", False)
    path = tmp_path / "rows.json"
    assert (rows.finish([kept], path), rows.finish([kept, missed], path)) == (0, 1)
    assert rows.read_rows(path) == [kept, missed]
    assert rows.markdown([kept, missed], benchmark=["x", "y"]).splitlines()[2:] == [
        "| x | a | 1 s |  |  | < 2 s | yes |",
        "| y | b | 3 s | 6 s | 2.0 | > 3 | **no** |",
    ]


def test_a_failed_benchmark_is_a_row_and_an_exit_code(run_all, tmp_path, monkeypatch, capfd):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setitem(run_all.BENCHMARKS, "data", run_all.Benchmark(str(script), ()))
    assert run_all.main(["--only", "data", "--quick"]) == 1
    assert "| data | all of it | failed with exit code 3; its own output says why |" in capfd.readouterr().out


def test_the_result_file_does_not_name_the_machine(run_all):
    path = run_all.result_file()
    assert path.parent == FOLDER / "results"
    assert path.name.endswith("-processors.md")


def test_every_script_is_there(run_all):
    assert all((FOLDER / benchmark.script).is_file() for benchmark in run_all.BENCHMARKS.values())
