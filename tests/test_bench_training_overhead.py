"""The benchmark of our parts of a training step fails when a bound is missed."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("verl")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_training_overhead.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_training_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "measure_dataset", lambda *_: (0.0, 0.0))
    return module


@pytest.mark.parametrize(("seconds", "reward_us", "code"), [(1.0, 10.0, 0), (1.0, 1000.0, 1), (100.0, 1000.0, 0)])
def test_a_share_of_more_than_two_per_cent_is_missed(bench, monkeypatch, tmp_path, capsys, seconds, reward_us, code):
    monkeypatch.setattr(bench, "measure_reward", lambda *_: (reward_us, 1))
    (tmp_path / "attempt-000.jsonl").write_text(json.dumps({"step": 1, "data": {"timing_s/step": seconds}}) + "\n")
    rows = tmp_path / "rows.json"
    assert bench.main(["--repeats", "3", "--batch", "5x5", "--metrics", str(tmp_path), "--json", str(rows)]) == code
    assert [row["met"] for row in json.loads(rows.read_text()) if row["wanted"]] == [not code]
    out = capsys.readouterr().out
    assert "step of 5 prompts x 5 responses" in out
    assert "metrics of a step to file and tensorboard" in out


def test_the_default_is_the_batch_of_the_embedded_default(bench):
    from recipe.cello1.launch.preflight import compose

    config = compose("cello1_grpo", ["hardware=cpu", "+scale=embedded"])
    batch = (config["data"]["train_batch_size"], config["actor_rollout_ref"]["rollout"]["n"])
    assert bench.build_parser().parse_args([]).batch[0] == batch
