"""The main job as a user runs it, in miniature."""

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from recipe.cello1.formats.rl_parquet import iter_parquet
from recipe.cello1.rl.run_metrics import read_metrics
from tests.helpers.processes import ROOT, launch, launcher_environment, processes_of

SCRIPT = ROOT / "recipe" / "cello1" / "run_grpo.sh"
TRACKER = "latest_checkpointed_iteration.txt"
WORKER = "ray::WorkerDict"  # holds the model that is trained


def run(output: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return launch("run_grpo.sh", output, *arguments, **variables)


def stages(*models: str) -> list[str]:
    found = [f"{model}, {decoding}" for model in models for decoding in ("greedy", "constrained", "matrix")]
    return [name for name in found if name != "before SFT, matrix"]  # chance, and the longest to read out


@pytest.mark.integration
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MODEL": "m"}, "MODEL is set but TRAIN_DATA is not"),
        ({"MODEL": "m", "TRAIN_DATA": "t.json"}, "MODEL is set but VAL_DATA is not"),
        ({"TRAIN_DATA": "t.json"}, "MODEL is not"),
        ({"HARDWARE": "abacus"}, "HARDWARE=abacus is unknown; it is one of"),
        ({"OUTPUT": "/proc/none"}, "OUTPUT=/proc/none cannot be written"),
        ({"MODEL": "./no-model", "TRAIN_DATA": "t.json", "VAL_DATA": "v.json"}, "MODEL=./no-model does not exist"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(tmp_path, variables, message):
    result = run(tmp_path / "out", **variables)
    errors = [line for line in result.stderr.splitlines() if re.match(r"(cello1 preflight: )?error: ", line)]
    assert result.returncode != 0
    assert len(errors) == 1 and message in errors[0]
    assert processes_of(tmp_path) == {}


@pytest.fixture
def home_and_temp(tmp_path):
    """An empty home, and an empty folder for temporary files whose path is short enough for Ray's sockets."""
    (tmp_path / "home").mkdir()
    temp = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    yield tmp_path / "home", temp
    shutil.rmtree(temp)


def held_elsewhere() -> set[str]:
    """What verl, Ray, vLLM and torch have left at places of their own, and no process has any more."""
    names = [path for pattern in ("ckpt_*", "rl-colocate-*", "torchinductor_*") for path in Path("/tmp").glob(pattern)]
    maps = ""
    for file in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            maps += file.read_text(errors="replace")
    return set(map(str, names)) | {str(path) for path in Path("/dev/shm").iterdir() if str(path) not in maps}


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses at which processes wait for connections."""
    connections = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in set(pids)]
    addresses = {ipaddress.ip_address(connection.laddr.ip) for connection in connections}
    # gRPC writes 127.0.0.1 as ::ffff:127.0.0.1.
    return {str(getattr(address, "ipv4_mapped", None) or address) for address in addresses}


@pytest.mark.integration
@pytest.mark.timeout(2400)
def test_smoke_run_survives_the_death_of_a_worker_and_ends_with_the_table(tmp_path, home_and_temp):
    """It listens to nobody else, and leaves nothing outside its folder but what numba caches."""
    (home, temp), before = home_and_temp, held_elsewhere()
    places = {"HOME": str(home), "TMPDIR": str(temp), "SMOKE": "1"}
    # A name with much of what means something to Hydra.
    output, rollouts = tmp_path / "lr=1e-6, (é) 'a' #1", tmp_path / "rollouts"
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "numpy.py").write_text("raise SystemExit('a module of the working directory was run')")
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(
            ["bash", str(SCRIPT), f"trainer.rollout_data_dir={rollouts}"],
            env=launcher_environment(output, **places),
            cwd=stranger,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # verl logs a step after its checkpoint: killed between the two, the first step would have no metrics.
        while not any(path.stat().st_size for path in (output / "metrics").glob("*.jsonl")):
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.2)
        assert (output / "grpo" / TRACKER).exists()
        processes = processes_of(output)
        # docs/scaling.md names no exception for this.
        addresses = listening(processes)
        assert addresses and addresses <= {"127.0.0.1", "::1"}
        workers = [pid for pid, command in processes.items() if command.startswith(WORKER)]
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert first.wait(180) > 0, "training cannot go on, and says so"
    assert "error: GRPO failed" in (tmp_path / "first.log").read_text()
    assert processes_of(output) == {}, "processes of the run are still there"
    shutil.rmtree(rollouts, ignore_errors=True)
    sft = (output / "sft" / "model" / "model.safetensors").stat().st_mtime_ns

    second = run(output, f"trainer.rollout_data_dir={rollouts}", **places)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Held-out puzzles" in second.stdout
    assert (output / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == sft
    attempts = sorted((output / "metrics").glob("*.jsonl"))
    first_steps, second_steps = [
        [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")] for path in attempts
    ]
    assert first_steps[:1] == [1]
    assert second_steps == [2]
    # The second step is of the second batch: it was not begun anew.
    n_prompts, n_responses = 6, 4
    batch = [row["reward_model"]["ground_truth"] for row in iter_parquet(output / "data" / "train.parquet")]
    trained = [json.loads(line)["gts"] for line in (rollouts / "2.jsonl").read_text().splitlines()]
    assert Counter(trained) == Counter(batch[n_prompts : 2 * n_prompts] * n_responses)

    summary = json.loads((output / "summary" / "summary.json").read_text())
    assert list(summary["stages"]) == stages("before SFT", "after SFT", "after GRPO")
    assert all(stage["n_errors"] == stage["n_missing"] == 0 for stage in summary["stages"].values())
    assert (output / "summary" / "training.png").exists()
    assert len(second.stderr) < 100_000, "the log belongs into the file, not on the terminal"

    third = run(output, **places)
    assert third.returncode == 0, third.stderr[-3000:]
    assert len(list((output / "metrics").glob("*.jsonl"))) == 2, "a finished run trains no more"
    assert processes_of(output) == {}
    left = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    assert [path for path in left if path.parts[:2] != (".cache", "numba")] == []
    assert list(temp.iterdir()) == []
    if "PYTEST_XDIST_WORKER" not in os.environ:  # else other tests use these places at the same time
        assert held_elsewhere() <= before


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_smoke_run_of_ppo(tmp_path):
    """The embedded default with a critic, in one process."""
    output = tmp_path / "out"
    result = launch("run_ppo.sh", output, SMOKE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    steps = read_metrics(output / "metrics")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["critic/lr"] <= 1e-3 and step["critic/vf_loss"] > 0 for step in steps)
    assert steps[-1]["critic/lr"] == pytest.approx(1e-3)
    assert len(list((output / "ppo").glob("global_step_*/critic"))) == 2, "both are kept"
    summary = json.loads((output / "summary" / "summary.json").read_text())
    assert list(summary["stages"]) == stages("before SFT", "after SFT", "after PPO")
    assert json.loads((output / "run.json").read_text())["name"] == "cello1_ppo"
    assert (output / "model" / "config.json").is_file()
    assert processes_of(output) == {}
