"""Real training through verl's own entry point, on a random model of a few thousand weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.cello1.export import export
from recipe.cello1.rl_parquet import write_rl_parquet
from recipe.cello1.watch import failure_reason, read_metrics, watch
from tests.recipe.toy_model import build_toy_model, toy_puzzles

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
CONFIG = Path(__file__).parents[2] / "recipe" / "cello1" / "config"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    pytest.importorskip("verl")
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("inputs")
    build_toy_model(folder / "model")
    write_rl_parquet(folder / "data.parquet", toy_puzzles(8), "train")
    return folder


@pytest.fixture
def train(inputs, tmp_path, monkeypatch):
    """Return a function that trains with some overrides and returns the metrics of each step."""
    for name, value in {
        "VERL_PLATFORM": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        monkeypatch.setenv(name, value)

    def run(*overrides: str) -> list[dict]:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(CONFIG)]
        command += ["--config-name", "cello1_grpo", "hardware=cpu", "+scale=embedded"]
        command += [f"data.train_files={inputs / 'data.parquet'}", f"data.val_files={inputs / 'data.parquet'}"]
        command += [
            f"actor_rollout_ref.model.path={inputs / 'model'}",
            f"trainer.default_local_dir={tmp_path / 'ckpt'}",
        ]
        command += [f"hydra.run.dir={tmp_path / 'hydra'}", "trainer.logger=[file]"]
        command += ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
        command += ["data.max_prompt_length=700", "data.max_response_length=16", "actor_rollout_ref.rollout.n=2"]
        command += ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
        command += [f"actor_rollout_ref.{role}.log_prob_micro_batch_size_per_gpu=4" for role in ("ref", "rollout")]
        command += ["actor_rollout_ref.rollout.max_model_len=720", *overrides]
        code = watch(command, tmp_path / "log", tmp_path / "metrics")
        assert code == 0, failure_reason((tmp_path / "log").read_text(errors="replace"))
        return read_metrics(tmp_path / "metrics")

    return run


def test_ppo_with_a_critic_on_two_ranks(train, tmp_path):
    """Two FSDP processes over gloo, actor and value model, and their sharded checkpoint made whole."""
    steps = train(
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "algorithm.adv_estimator=gae",
        "actor_rollout_ref.actor.use_kl_loss=false",
        "+critic.fsdp.micro_batch_size_per_gpu=4",
        "+critic.fsdp.infer_micro_batch_size_per_gpu=4",
        "+critic.fsdp.use_dynamic_bsz=false",
        "critic.ppo_micro_batch_size_per_gpu=4",
        "critic.model.path=" + "${actor_rollout_ref.model.path}",
        "trainer.total_training_steps=2",
        "trainer.save_freq=2",
    )
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert -1 <= step["critic/score/mean"] <= 1
        assert "critic/vf_loss" in step and "actor/pg_loss" in step
        assert 0 <= step["training/reward/format_valid"] <= 1

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = export(tmp_path / "ckpt", tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(model).eos_token == "<|im_end|>"
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout.split()
    assert left == [], "processes of the run are still there"
