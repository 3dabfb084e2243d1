"""The benchmark of our parts of a training step fails when a bound is missed."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("verl")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_training_overhead.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_training_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "measure_dataset", lambda *_: (0.0, 0.0))
    return module


@pytest.mark.parametrize(
    ("seconds", "reward_us", "limit_us", "message"),
    [
        (1.0, 10.0, 1e6, ""),
        (1.0, 1000.0, 1e6, "our parts take 2"),
        (100.0, 1000.0, 1e6, ""),
        (1.0, 10.0, 0.0, "scoring a response takes"),
    ],
)
def test_bounds(bench, monkeypatch, tmp_path, capsys, seconds, reward_us, limit_us, message):
    monkeypatch.setattr(bench, "measure_reward", lambda *_: (reward_us, 1))
    monkeypatch.setattr(bench, "MAX_SCORE_US", limit_us)
    (tmp_path / "attempt-000.jsonl").write_text(json.dumps({"step": 1, "data": {"timing_s/step": seconds}}) + "\n")
    code = bench.main(["--repeats", "3", "--batch", "5x4", "64x5", "--metrics", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == bool(message)
    missed = [line for line in err.splitlines() if line.startswith("missed: ")]
    assert [line.startswith(f"missed: {message}") for line in missed] == [True] * bool(message)
    assert "step of 5 prompts x 4 responses" in out
    assert "metrics of a step to file and tensorboard" in out


def test_the_default_is_the_batch_of_the_embedded_default(bench):
    from recipe.cello1.preflight import compose

    config = compose("cello1_grpo", ["hardware=cpu", "+scale=embedded"])
    batch = (config["data"]["train_batch_size"], config["actor_rollout_ref"]["rollout"]["n"])
    assert bench.build_parser().parse_args([]).batch[0] == batch
