"""The main job as a user runs it, in miniature."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipe" / "cello1" / "run_grpo.sh"
TRACKER = "latest_checkpointed_iteration.txt"


def environment(output: Path, **variables: str) -> dict[str, str]:
    foreign = ("MODEL", "TRAIN_DATA", "VAL_DATA", "HARDWARE", "NNODES", "SMOKE", "SEED")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    # The tests' own interpreter is the environment to train in, whether or not it was activated.
    venv = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {**kept, **venv, "OUTPUT": str(output), **variables}


def run(output: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment(output, **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def processes_of(output: Path) -> list[str]:
    return subprocess.run(["pgrep", "-f", str(output)], capture_output=True, text=True, check=False).stdout.split()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MODEL": "m"}, "MODEL is set but TRAIN_DATA is not"),
        ({"MODEL": "m", "TRAIN_DATA": "t.json"}, "MODEL is set but VAL_DATA is not"),
        ({"TRAIN_DATA": "t.json"}, "MODEL is not"),
        ({"HARDWARE": "abacus"}, "HARDWARE=abacus is unknown; it is one of"),
        ({"MODEL": "./no-model", "TRAIN_DATA": "t.json", "VAL_DATA": "v.json"}, "MODEL=./no-model does not exist"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(tmp_path, variables, message):
    result = run(tmp_path / "out", **variables)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0
    assert len(errors) == 1 and message in errors[0]
    assert processes_of(tmp_path) == []


@pytest.mark.integration
@pytest.mark.timeout(1500)
def test_smoke_run_survives_a_kill_and_ends_with_the_table(tmp_path):
    output = tmp_path / "out"
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(
            ["bash", str(SCRIPT)],
            env=environment(output, SMOKE="1"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while not (output / "grpo" / TRACKER).exists():
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    sft = (output / "sft" / "model" / "model.safetensors").stat().st_mtime_ns

    second = run(output, SMOKE="1")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Held-out puzzles" in second.stdout
    assert (output / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == sft
    attempts = sorted((output / "metrics").glob("*.jsonl"))
    first_steps, second_steps = [
        [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")] for path in attempts
    ]
    assert first_steps[:1] == [1]
    assert second_steps == [2]

    summary = json.loads((output / "summary" / "summary.json").read_text())
    assert list(summary["stages"]) == ["before SFT", "after SFT", "after GRPO"]
    assert all(stage["n_errors"] == stage["n_missing"] == 0 for stage in summary["stages"].values())
    assert (output / "summary" / "training.png").exists()
    assert len(second.stderr) < 100_000, "the log belongs into the file, not on the terminal"

    third = run(output, SMOKE="1")
    assert third.returncode == 0, third.stderr[-3000:]
    assert len(list((output / "metrics").glob("*.jsonl"))) == 2, "a finished run trains no more"
    assert processes_of(output) == []
