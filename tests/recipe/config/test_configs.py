"""Every shipped training configuration composes against the installed verl."""

import re
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytest.importorskip("hydra")

from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from recipe.cello1.rl.run_metrics import WINDOW  # noqa: E402
from tests.helpers.rooms import RECIPE  # noqa: E402
from tests.helpers.toy_model import build_toy_model  # noqa: E402

pytestmark = pytest.mark.slow

CONFIG = RECIPE / "config"
HARDWARE = sorted(path.stem for path in (CONFIG / "hardware").glob("[!_]*.yaml"))
SCALES = sorted(path.stem for path in (CONFIG / "scale").glob("*.yaml"))
VARIANTS = sorted(path.stem for path in (CONFIG / "variant").glob("*.yaml"))
TRAINERS = ["cello1_grpo", "cello1_ppo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model folder: verl reads that of the critic when it validates."""
    return build_toy_model(tmp_path_factory.mktemp("model"))


def composed(name: str, *overrides: str, model: Path | str = "m") -> DictConfig:
    if "hardware=multinode" in overrides:
        overrides = (*overrides, "trainer.nnodes=2")
    with initialize_config_dir(str(CONFIG), version_base=None):
        config = compose(name, overrides=[*overrides, "data.train_files=a", "data.val_files=b"])
    config.actor_rollout_ref.model.path = str(model)
    OmegaConf.resolve(config)
    return config


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("name", TRAINERS)
def test_composes_and_passes_verls_own_validation(name, hardware, model):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = composed(name, f"hardware={hardware}", model=model)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TRAINERS)
def test_scales_compose_on_the_cpu(name, scale):
    config = composed(name, "hardware=cpu", f"+scale=[embedded,{scale}]" if scale == "smoke" else f"+scale={scale}")
    assert config.trainer.device == "cpu"
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"
    rollout = config.actor_rollout_ref.rollout
    assert rollout.max_model_len >= config.data.max_prompt_length + config.data.max_response_length


def test_the_embedded_default_of_ppo():
    """Like that of GRPO, but for the critic: its learning rate, its checkpoints, its name."""
    grpo, ppo = (composed("cello1_ppo", "hardware=1x80gb", f"+scale={name}") for name in ("embedded", "embedded_ppo"))
    assert ppo.trainer.experiment_name == "ppo-embedded"
    assert (ppo.trainer.max_actor_ckpt_to_keep, ppo.trainer.max_critic_ckpt_to_keep) == (2, 2)
    assert ppo.algorithm.kl_ctrl.kl_coef == 0.02
    assert ppo.critic.optim.lr == 1e-3
    assert ppo.critic.fsdp.model_dtype == "fp32"
    assert ppo.data == grpo.data
    assert ppo.actor_rollout_ref.actor.optim == grpo.actor_rollout_ref.actor.optim
    assert ppo.actor_rollout_ref.rollout.n == grpo.actor_rollout_ref.rollout.n


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_compose_and_pass_verls_own_validation(variant):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = composed("cello1_grpo", f"+variant={variant}")
    assert config != composed("cello1_grpo")
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


@pytest.mark.parametrize("hardware", ["1x80gb", "1x140gb"])
def test_the_critic_leaves_the_only_gpu_to_the_rollout(hardware):
    config = composed("cello1_ppo", f"hardware={hardware}")
    assert (config.critic.fsdp.param_offload, config.critic.fsdp.optimizer_offload) == (True, True)
    assert config.critic.fsdp.model_dtype == "bf16"
    assert config.critic.optim.override_optimizer_config.bf16_stochastic_round
    assert config.actor_rollout_ref.actor.fsdp_config.param_offload
    assert config.actor_rollout_ref.rollout.free_cache_engine


@pytest.mark.parametrize("hardware", ["1x80gb", "1x140gb"])
def test_adapters_are_trained_in_fp32_and_wait_for_no_processors(hardware):
    config = composed("cello1_grpo", f"hardware={hardware}")
    assert config.actor_rollout_ref.actor.fsdp_config.model_dtype == "fp32"
    assert config.ray_kwargs.ray_init.num_cpus >= 20
    assert config.transfer_queue.backend.SimpleStorage.num_data_storage_units == 1


@pytest.mark.parametrize("hardware", ["1x80gb", "8x80gb"])
def test_attention_without_flash_attn(hardware):
    config = composed("cello1_grpo", f"hardware={hardware}", "+attention=sdpa")
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"
    assert not config.actor_rollout_ref.model.use_remove_padding


PUBLISHED_FOR_BOTH = {
    "data.seed": 1,
    "data.train_batch_size": 64,
    "data.max_prompt_length": 3072,
    "data.max_response_length": 3000,
    "data.filter_overlong_prompts": True,
    "data.truncation": "error",
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
    "actor_rollout_ref.actor.clip_ratio_c": 1e6,
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.ref.fsdp_config.model_dtype": "bf16",
    "actor_rollout_ref.ref.fsdp_config.param_offload": True,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 2,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.6,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 2,
    "cello1.reward": "dense",
    "cello1.shaping": None,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
}
PUBLISHED = {
    "cello1_grpo": {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        **PUBLISHED_FOR_BOTH,
        "actor_rollout_ref.actor.fsdp_config.param_offload": False,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": False,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.actor.entropy_coeff": 0,
        "actor_rollout_ref.rollout.n": 5,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 2,
        "trainer.save_freq": 100,
        "trainer.total_epochs": 20,
    },
    "cello1_ppo": {
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl.kl_coef": 0.001,
        **PUBLISHED_FOR_BOTH,
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.1,
        "actor_rollout_ref.actor.fsdp_config.param_offload": True,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.entropy_coeff": 0.001,
        "actor_rollout_ref.rollout.n": 1,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "critic.fsdp.param_offload": True,
        "critic.fsdp.optimizer_offload": True,
        "critic.fsdp.use_dynamic_bsz": False,
        "critic.model.use_remove_padding": True,
        "critic.model.enable_gradient_checkpointing": True,
        "critic.optim.lr": 1e-5,
        "critic.optim.lr_warmup_steps_ratio": 0.05,
        "trainer.total_epochs": 30,
    },
}


# What differs from the published settings: "Differences from the published run" in the recipe's README says why.
DIFFERENT = {
    "cello1_grpo": {"trainer.test_freq": 20},
    "cello1_ppo": {
        "trainer.test_freq": 20,
        "trainer.save_freq": 100,
        "critic.fsdp.micro_batch_size_per_gpu": 2,
        "critic.fsdp.infer_micro_batch_size_per_gpu": 2,
        "critic.ppo_micro_batch_size_per_gpu": 2,
    },
}


@pytest.mark.parametrize("name", TRAINERS)
def test_settings_that_differ_from_the_published_ones(name):
    config = composed(name)
    assert {key: OmegaConf.select(config, key) for key in DIFFERENT[name]} == DIFFERENT[name]


def test_dr_grpo_does_not_divide_by_a_length():
    assert composed("cello1_grpo", "+variant=dr_grpo").actor_rollout_ref.actor.loss_scale_factor == 3000


@pytest.mark.parametrize("name", TRAINERS)
def test_published_settings(name):
    config = composed(name)
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_last_steps_of_the_embedded_default_see_the_puzzles_of_the_first():
    """Rewards of puzzles differ more than training changes them: what is compared must be of the same puzzles."""
    if not (launcher := RECIPE / "launch" / "small_model.sh").exists():
        pytest.skip("not part of the recipe in verl-recipe")
    config = composed("cello1_grpo", "hardware=cpu", "+scale=embedded")
    n_puzzles = int(re.search(r" n_rl=(\d+)", launcher.read_text())[1])
    steps_of_a_pass, rest = divmod(n_puzzles, config.data.train_batch_size)
    assert rest == 0 and not config.data.shuffle
    assert config.trainer.total_training_steps > steps_of_a_pass
    assert config.trainer.total_training_steps % steps_of_a_pass == WINDOW


def test_classes_named_in_the_config_exist():
    from verl.utils.import_utils import load_class_from_fqn, load_extern_object

    config = composed("cello1_grpo")
    assert callable(load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class))
    sampler = config.trainer.v1.sampler.custom_sampler
    for path, name in (
        (config.data.custom_cls.path, config.data.custom_cls.name),
        (config.reward.reward_manager.module.path, config.reward.reward_manager.name),
        (sampler.path, sampler.name),
    ):
        assert callable(load_extern_object(path, name))
