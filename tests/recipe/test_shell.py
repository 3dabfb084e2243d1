"""One shell around every command: help, exit codes, one line for an error, what follows ``--``."""

import argparse
import subprocess
import sys
import types

import pytest

from recipe.cello1 import __main__ as shell
from tests.helpers.processes import ROOT, environment

HEAVY = {"numpy", "scipy", "torch", "transformers", "scanpy", "anndata", "pandas", "pyarrow", "ray", "vllm", "verl"}


@pytest.fixture
def command(monkeypatch):
    """Put a command of one's own into the shell; returns the module, whose ``run`` the test sets."""
    module = types.ModuleType("made_up")
    module.build_parser = lambda: argparse.ArgumentParser(description="made up")
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setitem(shell.STEPS, "made up", "made_up")
    return module


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = "import sys; from recipe.cello1.__main__ import main; main(['--help']); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    *text, loaded = run.stdout.splitlines()
    for name, module in shell.commands().items():
        (line,) = [line for line in text if line.startswith(f"  {name}  ")]
        assert line.split(maxsplit=len(name.split()))[-1].strip() == shell.summary(module) != ""
    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize("words", [[], ["predit"], ["traces"], ["prepare-data", "--out", "x"]])
def test_wrong_usage(words, capsys):
    assert shell.main(words) == 2
    error = capsys.readouterr().err
    assert "usage: cello1 COMMAND" in error if not words else error.startswith("cello1: error: there is no command")
    assert ("traces markers, traces teacher" in error) == (words == ["traces"])


@pytest.mark.parametrize(
    ("outcome", "code", "error"),
    [(None, 0, ""), (7, 7, ""), ("3 of 4 are missing", 1, "cello1 made up: error: 3 of 4 are missing\n")],
)
def test_outcome_is_the_exit_code(command, capsys, outcome, code, error):
    command.run = lambda args: outcome
    assert shell.main(["made", "up"]) == code
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("raised", "code", "error"),
    [
        (ValueError("no cells"), 1, "error: no cells"),
        (OSError("disk full"), 1, "error: disk full"),
        (MemoryError(), 1, "error: memory ran out; give less at once, or use a larger machine"),
        (MemoryError("5 GB for cells"), 1, "error: 5 GB for cells"),
        (RuntimeError(), 1, "error: RuntimeError, without a message; --traceback shows where it was raised"),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            1,
            "error: the package x is not installed: pip install x",
        ),
        (KeyboardInterrupt(), 130, "interrupted; run it again"),
    ],
)
def test_errors_are_one_line(command, capsys, raised, code, error):
    def run(args):
        raise raised

    command.run, command.AFTER_INTERRUPT = run, "; run it again"
    assert shell.main(["made", "up"]) == code
    assert capsys.readouterr().err == f"cello1 made up: {error}\n"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("top_genes must be at least 1, got 0", "--top-genes must be at least 1, got 0"),
        ("layer: there is none", "--layer: there is none"),
        ("no X; choose a layer=, it has ['a'], or use_raw=True", "no X; choose a --layer, it has ['a'], or --use-raw"),
        ("split='puzzle' leaks (top_genes=3,4)", "--split puzzle leaks (--top-genes 3,4)"),
        ("layer=['a', 'b'] is no name; see layer=/x/y.z.", "--layer ['a', 'b'] is no name; see --layer /x/y.z."),
        ("use_raw=False, and layer is 'a'", "use_raw=False, and layer is 'a'"),  # no option says it; prose
        ("/seed=1/layer=2: it has no layers, data.layer=1", "/seed=1/layer=2: it has no layers, data.layer=1"),
        ("input is empty, input=1 and other=2", "input is empty, input=1 and other=2"),  # no option
    ],
)
@pytest.mark.parametrize("raised", [True, False])
def test_parameters_are_called_as_the_options_are(command, capsys, said, shown, raised):
    def parser():
        made = argparse.ArgumentParser(description="made up")
        made.add_argument("input", nargs="?")
        made.add_argument("-t", "--genes", "--listed", dest="top_genes")
        for option in ("--layer", "--use-raw", "--split"):
            made.add_argument(option)
        return made

    def run(args):
        if raised:
            raise ValueError(said)
        return said

    command.build_parser, command.run = parser, run
    assert shell.main(["made", "up"]) == 1
    assert capsys.readouterr().err == f"cello1 made up: error: {shown.replace('--top-genes', '--genes')}\n"


def test_traceback_on_request(command):
    def run(args):
        raise ValueError("here")

    command.run = run
    with pytest.raises(ValueError, match="here"):
        shell.main(["made", "up", "--traceback"])


def test_what_follows_two_dashes_goes_to_those_who_take_it(command, capsys):
    command.run = lambda args: " ".join(args.rest)

    def parser():
        made = argparse.ArgumentParser(description="made up")
        made.set_defaults(rest=[])
        made.add_argument("--flag", action="store_true")
        return made

    with pytest.raises(SystemExit, match="2"):
        shell.main(["made", "up", "--", "--x"])
    assert "nothing can follow --, got --x" in capsys.readouterr().err
    command.build_parser = parser
    assert shell.main(["made", "up", "--flag", "--", "--traceback", "-c", "--"]) == 1
    assert capsys.readouterr().err == "cello1 made up: error: --traceback -c --\n"
