"""What preflight passes verl accepts, and what cannot run preflight refuses with the figure that is short.

840 configurations: every algorithm on every hardware, each with an attention and a variant drawn with a fixed seed, and
70 drawn combinations of lengths, batches, GPUs and model sizes. Each pair is composed once; what varies is put into it,
and verl is asked once for each of the batches and GPUs, which are all of it that its validation looks at.
"""

import copy
import itertools
import random
import re

import pytest

pytest.importorskip("verl")
pytest.importorskip("torch")

from omegaconf import OmegaConf  # noqa: E402

from recipe.cello1.launch.batch_sizes import check_batches, check_lengths, check_rows  # noqa: E402
from recipe.cello1.launch.preflight import compose  # noqa: E402
from recipe.cello1.launch.resources import check_cpus, check_memory  # noqa: E402
from tests.helpers.rooms import RECIPE  # noqa: E402
from tests.helpers.toy_model import build_toy_model  # noqa: E402

pytestmark = pytest.mark.slow

HARDWARE = sorted(path.stem for path in (RECIPE / "config" / "hardware").glob("[!_]*.yaml"))
VARIANTS = ["", *sorted(path.stem for path in (RECIPE / "config" / "variant").glob("*.yaml"))]
PAIRS = list(itertools.product(("grpo", "ppo"), HARDWARE))
LENGTHS = [(3072, 3000), (1024, 512), (3072, 6000), (9000, 3000)]
BATCHES = [(64, 64, 2), (60, 60, 1), (64, 16, 2), (16, 64, 2), (64, 64, 3), (2000, 64, 2)]  # of data, mini, micro
GPUS = [1, 2, 8]
MODELS = {"0.5B": (494_032_768, 32_768), "7B": (7_615_616_512, 32_768), "short": (494_032_768, 4_096)}
ROWS, HOST = 1_000, 2 * 10**12
_DRAWN = random.Random(17)
CASES = {
    pair: (
        *(_DRAWN.choice(["", "sdpa"]), _DRAWN.choice(VARIANTS)),
        _DRAWN.sample(list(itertools.product(LENGTHS, BATCHES, GPUS, MODELS)), 70),
    )
    for pair in PAIRS
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_toy_model(tmp_path_factory.mktemp("model")))


def refusal(config, n_parameters, context, gpu) -> str:
    """What preflight says of the sizes."""
    try:
        check_rows(config, ROWS)
        check_batches(config)
        check_lengths(config, context)
        check_cpus(config)
        if gpu:
            check_memory(config, n_parameters, gpu, HOST)
    except ValueError as error:
        return str(error)
    return ""


def shortage(config, n_parameters, context, gpu, lengths, batches) -> str:
    """What cannot run, by arithmetic of its own."""
    n_gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    if batches[0] > ROWS:
        return "puzzles to train on"
    if batches[0] < batches[1] and not config.actor_rollout_ref.actor.use_dynamic_bsz:
        return "ppo_mini_batch_size"
    if sum(lengths) > config.actor_rollout_ref.rollout.max_model_len:
        return "max_model_len"
    if config.actor_rollout_ref.rollout.max_model_len > context:
        return "the model takes"
    if n_gpus % config.actor_rollout_ref.rollout.tensor_model_parallel_size:
        return "tensor_model_parallel_size"
    if batches[1] * config.actor_rollout_ref.rollout.n % n_gpus:
        return "cannot be shared by"
    adapters = config.actor_rollout_ref.model.lora_rank > 0
    if gpu and config.algorithm.adv_estimator != "gae" and not adapters:
        offloaded = config.actor_rollout_ref.actor.fsdp_config
        stays = (0 if offloaded.param_offload else 4) + (0 if offloaded.optimizer_offload else 8)
        share = config.actor_rollout_ref.rollout.gpu_memory_utilization
        if stays * n_parameters / n_gpus > (1 - share) * gpu:
            return "GB for vLLM"
    return ""


def test_the_sample_is_840():
    assert sum(len(cases) for *_, cases in CASES.values()) == 840


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_what_preflight_passes_verl_accepts_and_what_cannot_run_it_refuses(pair, model):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    (algorithm, hardware), (attention, variant, cases) = pair, CASES[pair]
    overrides = [f"hardware={hardware}", "ray_kwargs.ray_init.num_cpus=999", f"actor_rollout_ref.model.path={model}"]
    overrides += [f"+attention={attention}"] * bool(attention and hardware != "cpu")
    overrides += [f"+variant={variant}"] * bool(variant) + ["trainer.nnodes=2"] * (hardware == "multinode")
    config = compose(f"cello1_{algorithm}", [*overrides, "data.train_files=a", "data.val_files=b"])
    gpu = {"cpu": 0, "1x140gb": 150 * 10**9}.get(hardware, 85 * 10**9)
    passed, asked = 0, set()
    for lengths, batches, n_gpus, size in cases:
        n_parameters, context = MODELS[size]
        OmegaConf.update(config, "data.max_prompt_length", lengths[0])
        OmegaConf.update(config, "data.max_response_length", lengths[1])
        OmegaConf.update(config, "data.train_batch_size", batches[0])
        OmegaConf.update(config, "actor_rollout_ref.actor.ppo_mini_batch_size", batches[1])
        OmegaConf.update(config, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", batches[2])
        OmegaConf.update(config, "trainer.n_gpus_per_node", n_gpus)
        case = (variant, lengths, batches, n_gpus, size)
        said = refusal(config, n_parameters, context, gpu)
        if short := shortage(config, n_parameters, context, gpu, lengths, batches):
            assert said, (case, short)
        if said:
            assert re.search(r"\d", said) and "; " in said, (case, said)
            continue
        passed += 1
        if (batches, n_gpus) in asked:
            continue
        asked.add((batches, n_gpus))
        whole = copy.deepcopy(config)
        OmegaConf.resolve(whole)
        try:
            validate_config(whole, use_reference_policy=need_reference_policy(whole), use_critic=need_critic(whole))
        except (AssertionError, ValueError) as error:
            pytest.fail(f"preflight passes {case}, and verl says: {error}")
    assert 0 < passed < len(cases)
