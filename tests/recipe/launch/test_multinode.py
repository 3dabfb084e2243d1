"""GRPO across a Ray cluster of two nodes, which here are two Ray node processes on one machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from recipe.cello1.formats.rl_parquet import write_rl_parquet
from tests.helpers.processes import IN_CPU_ENVIRONMENT, ROOT, environment, free_port
from tests.helpers.toy_model import build_toy_model, toy_puzzles

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]


@pytest.fixture
def address(monkeypatch):
    """Start a head node and a second node, and yield the address of the cluster."""
    pytest.importorskip("verl")
    pytest.importorskip("vllm")
    port = free_port()
    ray = [*IN_CPU_ENVIRONMENT, sys.executable, "-m", "ray.scripts.scripts"]
    size = ["--num-cpus=32", "--num-gpus=1", "--object-store-memory=200000000"]
    # Ray's sockets lie below the folders, and their paths must be short.
    folders = [f"/tmp/ray-{port}-{node}-" for node in "ab"]
    head = [f"--port={port}", "--head", "--include-dashboard=false", f"--temp-dir={folders[0]}"]
    second = [f"--address=127.0.0.1:{port}", f"--temp-dir={folders[1]}"]
    # Left to itself, Ray 2.60 gives the head a token that the second node is not told of.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    try:
        for options in (head, second):
            subprocess.run([*ray, "start", *options, *size], check=True, capture_output=True, env=environment())
        yield f"127.0.0.1:{port}"
    finally:
        # Not `ray stop`, which would stop every cluster of this machine.
        for mark in (*folders, rf"127\.0\.0\.1:{port}\b"):
            subprocess.run(["pkill", "-KILL", "-f", mark], check=False)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_train_together(address, tmp_path):
    build_toy_model(tmp_path / "model")
    write_rl_parquet(tmp_path / "data.parquet", toy_puzzles(8), "train")
    overrides = ["trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.val_before_train=false"]
    overrides += ["trainer.test_freq=-1", "data.train_batch_size=4", "data.max_prompt_length=700"]
    overrides += ["data.max_response_length=16", "data.dataloader_num_workers=0", "actor_rollout_ref.rollout.n=2"]
    overrides += ["actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.max_model_len=720"]
    overrides += ["actor_rollout_ref.rollout.agent.num_workers=1"]
    names = {"MODEL": "model", "TRAIN_DATA": "data.parquet", "VAL_DATA": "data.parquet", "OUTPUT": "out"}
    variables = {name: str(tmp_path / path) for name, path in names.items()}
    script = ROOT / "recipe" / "cello1" / "run_grpo.sh"
    result = subprocess.run(
        ["bash", str(script), *overrides],
        env={**os.environ, **variables, "HARDWARE": "cpu", "NNODES": "2", "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (metrics,) = (tmp_path / "out" / "metrics").glob("*.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]
    shards = sorted(path.name for path in (tmp_path / "out" / "grpo" / "global_step_2" / "actor").glob("model_*"))
    assert shards == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    assert (tmp_path / "out" / "model" / "README.md").is_file()
