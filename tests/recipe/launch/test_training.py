"""Real training through verl's own entry point, on models of a few thousand weights."""

import math
import sys
from pathlib import Path

import pytest

from recipe.cello1.formats.atomic import read_items, sha256
from recipe.cello1.formats.rl_parquet import CHECKED, check_rl_parquet, write_rl_parquet
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.launch.watch import failure_reason, watch
from recipe.cello1.rl.export import export
from recipe.cello1.rl.run_metrics import read_metrics
from tests.helpers.processes import IN_CPU_ENVIRONMENT, ROOT, launch, processes_of
from tests.helpers.toy_model import build_guessing_model, build_toy_model, guessing_puzzles

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
N_PROMPTS, N_RESPONSES = 4, 2
SMALL = [
    f"data.train_batch_size={N_PROMPTS}",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={N_PROMPTS}",
    f"actor_rollout_ref.rollout.n={N_RESPONSES}",
    "actor_rollout_ref.rollout.temperature=1",  # hotter, hardly any answer of these models is legal
    "data.max_prompt_length=400",
    "data.max_response_length=24",
    "actor_rollout_ref.rollout.max_model_len=424",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    *[f"actor_rollout_ref.{role}.log_prob_micro_batch_size_per_gpu=4" for role in ("ref", "rollout")],
    "trainer.max_actor_ckpt_to_keep=null",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    pytest.importorskip("verl")
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("inputs")
    build_toy_model(folder / "random", ends=True)
    build_guessing_model(folder / "guessing")
    write_rl_parquet(folder / "data.parquet", guessing_puzzles(8), "train")
    return folder


@pytest.fixture
def start(inputs, tmp_path):
    """Return a function that runs two steps of GRPO with some overrides and gives the exit code."""

    def run(*overrides: str) -> int:
        command = [*IN_CPU_ENVIRONMENT, sys.executable, "-m", "verl.trainer.main_ppo"]
        command += ["--config-path", str(ROOT / "recipe" / "cello1" / "config"), "--config-name", "cello1_grpo"]
        command += ["hardware=cpu", "+scale=embedded", *SMALL, "trainer.logger=[file]"]
        command += [f"data.train_files={inputs / 'data.parquet'}", f"data.val_files={inputs / 'data.parquet'}"]
        command += [f"actor_rollout_ref.model.path={inputs / 'guessing' / 'model'}"]
        command += [f"hydra.run.dir={tmp_path / 'hydra'}", f"trainer.default_local_dir={tmp_path / 'ckpt'}"]
        command += ["trainer.total_training_steps=2", "trainer.save_freq=-1", *overrides]
        code = watch(command, tmp_path / "log", tmp_path / "metrics")
        assert processes_of(tmp_path) == {}, "processes of the run are still there"
        return code

    return run


@pytest.fixture
def train(start, tmp_path):
    """Return a function that trains two steps of GRPO with some overrides and returns the metrics of each step."""

    def run(*overrides: str) -> list[dict]:
        code = start(*overrides)
        assert code == 0, failure_reason((tmp_path / "log").read_text(errors="replace"))
        steps = read_metrics(tmp_path / "metrics")
        assert [step["step"] for step in steps] == [1, 2]
        for step in steps:
            assert -1 <= step["training/reward/score"] <= 1
            assert 0 < step["training/reward/format_validity"] <= 1, "the model has learnt the format"
            assert math.isfinite(step["actor/grad_norm"])
        return steps

    return run


def scores_of_groups(rollouts: Path, step: int) -> list[list[float]]:
    """The scores of a step, a list for each prompt; one prompt's responses follow each other in verl's file."""
    scores = [row["score"] for row in read_items(rollouts / f"{step}.jsonl")]
    assert len(scores) == N_PROMPTS * N_RESPONSES
    return [scores[i : i + N_RESPONSES] for i in range(0, len(scores), N_RESPONSES)]


def check_advantages(steps: list[dict], rollouts: Path, share: float) -> None:
    """Compare the largest advantage of each step with this share of the largest difference within a group."""
    differences = [max(max(g) - min(g) for g in scores_of_groups(rollouts, step["step"])) for step in steps]
    assert any(differences), "a group with different scores"
    for step, difference in zip(steps, differences, strict=True):
        assert step["critic/advantages/max"] == pytest.approx(share * difference, abs=1e-5)
        assert step["critic/advantages/min"] == pytest.approx(-share * difference, abs=1e-5)


def test_ppo_with_a_critic_on_two_ranks(inputs, tmp_path):
    """Two FSDP processes over gloo, actor and value model, from the launcher to the model; the critic learns."""
    data, k = str(inputs / "data.parquet"), 3
    overrides = ["+scale=embedded_ppo", *SMALL, "trainer.n_gpus_per_node=2"]
    overrides += ["trainer.total_training_steps=8", "trainer.save_freq=8"]
    files = {"MODEL": str(inputs / "random"), "TRAIN_DATA": data, "VAL_DATA": data}
    result = launch("run_ppo.sh", tmp_path / "out", *overrides, HARDWARE="cpu", **files)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = read_metrics(tmp_path / "out" / "metrics")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert all("actor/reward_kl_penalty" in step for step in steps)
    # Every answer of this model is malformed: the value to learn is -1, whatever is sampled.
    losses = [step["critic/vf_loss"] for step in steps]
    assert sum(losses[-k:]) < sum(losses[:k]), losses
    shards = sorted(path.name for path in (tmp_path / "out" / "ppo" / "global_step_8" / "critic").glob("model_*"))
    assert shards == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    assert "after PPO" in result.stdout
    assert processes_of(tmp_path) == {}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tmp_path / "out" / "model"
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(model).eos_token == "<|im_end|>"


@pytest.mark.parametrize("broken", [1, 8])
def test_a_reward_that_raises_ends_the_run_with_the_fault_of_the_data(start, tmp_path, monkeypatch, capfd, broken):
    """Of one row, whose group fails, and of all, of which nothing is left; changed after the rows were checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [rl_row(puzzle, "train", i) for i, puzzle in enumerate(guessing_puzzles(8))]
    for row in rows[:broken]:
        row["reward_model"]["ground_truth"] = "T cell | t cell"
    data = tmp_path / "broken.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    with pytest.raises(ValueError, match="row 0, column 'reward_model': .* gold names 't cell' twice"):
        check_rl_parquet(data)
    monkeypatch.setenv(CHECKED, sha256(data))
    assert start(f"data.train_files={data}", "trainer.val_before_train=false") != 0
    (shown,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "ValueError: gold names 't cell' twice (case is ignored)" in shown
    assert "sync_refill_failed_groups" not in shown
    assert read_metrics(tmp_path / "metrics") == [], "nothing was trained on padding"


def test_dr_grpo_with_adapters(train, tmp_path, inputs):
    """The checkpoint holds adapters, which go into the base on export."""
    import torch
    from transformers import AutoModelForCausalLM

    rollouts = tmp_path / "rollouts"
    settings = ["actor_rollout_ref.model.lora_rank=8", "trainer.save_freq=2", f"trainer.rollout_data_dir={rollouts}"]
    steps = train("+variant=[dr_grpo,lora]", *settings)
    check_advantages(steps, rollouts, 0.5)  # from the mean of two; divided by their deviation they would be 0.707
    assert not any("actor/kl_loss" in step for step in steps)

    model = AutoModelForCausalLM.from_pretrained(export(tmp_path / "ckpt", tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(inputs / "guessing" / "model")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), base.get_parameter(name))
    name = "model.layers.0.input_layernorm.weight"  # has no adapter
    assert torch.equal(model.get_parameter(name).float(), base.get_parameter(name).to(torch.bfloat16).float())


def test_dapo_with_balanced_micro_batches(train, tmp_path):
    """Groups whose scores are all alike are sampled anew: every group that is trained on teaches something."""
    from omegaconf import OmegaConf

    rollouts = tmp_path / "rollouts"
    steps = train("+variant=[dapo,balanced]", f"trainer.rollout_data_dir={rollouts}")
    for step in steps:
        assert "actor/kl_loss" not in step
        groups = scores_of_groups(rollouts, step["step"])
        assert all(len(set(group)) > 1 for group in groups), groups
    actor = OmegaConf.load(tmp_path / "hydra" / ".hydra" / "config.yaml").actor_rollout_ref.actor
    assert (actor.clip_ratio_high, actor.loss_agg_mode, actor.use_dynamic_bsz) == (0.28, "token-mean", True)


def test_gspo_with_the_rest_of_the_group_as_baseline_in_the_asynchronous_mode(train, tmp_path):
    rollouts = tmp_path / "rollouts"
    # Each batch is gone over more than once, at a rate that moves every weight: what a group teaches leaves the range.
    updates = ["actor_rollout_ref.actor.ppo_epochs=3", "actor_rollout_ref.actor.optim.lr=1e-3"]
    steps = train("+variant=[gspo,rloo,colocate_async]", *updates, f"trainer.rollout_data_dir={rollouts}")
    check_advantages(steps, rollouts, 1)  # RLOO: the other's score is the baseline
    # GSPO: a clip range of 3e-4, which the later updates of a step leave.
    assert any(step["actor/pg_clipfrac"] > 0 for step in steps)
    assert not any("actor/kl_loss" in step for step in steps)
    # The second batch was begun before the update of the first.
    staleness = [step["training/off_policy/trajectory_staleness_worst/max"] for step in steps]
    assert max(staleness) >= 1, staleness
