"""Real training through verl's own entry point, on a random model of a few thousand weights."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.cello1.export import export
from recipe.cello1.rl_parquet import write_rl_parquet
from recipe.cello1.watch import failure_reason, read_metrics, watch
from tests.recipe.processes import IN_CPU_ENVIRONMENT, ROOT
from tests.recipe.toy_model import build_toy_model, toy_puzzles

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    pytest.importorskip("verl")
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("inputs")
    build_toy_model(folder / "model", ends=True)
    write_rl_parquet(folder / "data.parquet", toy_puzzles(8), "train")
    return folder


@pytest.fixture
def train(inputs, tmp_path):
    """Return a function that trains with some overrides and returns the metrics of each step."""

    def run(algorithm: str, *overrides: str) -> list[dict]:
        command = [*IN_CPU_ENVIRONMENT, sys.executable, "-m", "verl.trainer.main_ppo"]
        command += ["--config-path", str(ROOT / "recipe" / "cello1" / "config")]
        command += ["--config-name", f"cello1_{algorithm}", "hardware=cpu", "+scale=embedded"]
        command += [f"data.train_files={inputs / 'data.parquet'}", f"data.val_files={inputs / 'data.parquet'}"]
        command += [f"actor_rollout_ref.model.path={inputs / 'model'}", f"hydra.run.dir={tmp_path / 'hydra'}"]
        command += [f"trainer.default_local_dir={tmp_path / 'ckpt'}", "trainer.logger=[file]"]
        command += ["trainer.total_training_steps=2", "trainer.save_freq=-1", "trainer.max_actor_ckpt_to_keep=null"]
        command += ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
        command += ["data.max_prompt_length=700", "data.max_response_length=16", "actor_rollout_ref.rollout.n=2"]
        command += ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
        command += [f"actor_rollout_ref.{role}.log_prob_micro_batch_size_per_gpu=4" for role in ("ref", "rollout")]
        command += ["actor_rollout_ref.rollout.max_model_len=720", *overrides]
        code = watch(command, tmp_path / "log", tmp_path / "metrics")
        assert code == 0, failure_reason((tmp_path / "log").read_text(errors="replace"))
        steps = read_metrics(tmp_path / "metrics")
        assert [step["step"] for step in steps] == [1, 2]
        for step in steps:
            assert -1 <= step["training/reward/score"] <= 1
            assert 0 <= step["training/reward/format_valid"] <= 1
            assert math.isfinite(step["actor/grad_norm"])
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
        assert left == "", "processes of the run are still there"
        return steps

    return run


def test_ppo_with_a_critic_on_two_ranks(train, tmp_path):
    """Two FSDP processes over gloo, actor and value model, and their sharded checkpoint made whole."""
    steps = train("ppo", "trainer.n_gpus_per_node=2", "trainer.save_freq=2")
    for step in steps:
        assert "critic/vf_loss" in step
        assert "actor/reward_kl_penalty" in step

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = export(tmp_path / "ckpt", tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(model).eos_token == "<|im_end|>"


def test_dr_grpo_with_adapters(train, tmp_path, inputs):
    """The checkpoint holds adapters, which go into the base on export."""
    import torch
    from transformers import AutoModelForCausalLM

    train("grpo", "+variant=[dr_grpo,lora]", "actor_rollout_ref.model.lora_rank=8", "trainer.save_freq=2")
    model = AutoModelForCausalLM.from_pretrained(export(tmp_path / "ckpt", tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), base.get_parameter(name))


def test_dapo_with_balanced_micro_batches(train):
    """Groups whose rewards are all alike are sampled anew: every group that is trained on teaches something."""
    # This model's answers are all malformed; what differs is the penalty for their length.
    differing = ["cello1.shaping={overlong:{buffer:8}}", "algorithm.filter_groups.metric=reward"]
    steps = train("grpo", "+variant=[dapo,balanced]", *differing)
    for step in steps:
        assert step["critic/advantages/max"] > 0 > step["critic/advantages/min"]
        assert -1 <= step["training/reward/shaping_overlong"] < 0


def test_gspo_with_the_rest_of_the_group_as_baseline_in_the_asynchronous_mode(train):
    train("grpo", "+variant=[gspo,rloo,colocate_async]")
