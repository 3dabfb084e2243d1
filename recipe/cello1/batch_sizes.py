"""Whether the sizes of an RL training go together: verl finds out when models are loaded and responses sampled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def check_rows(config: DictConfig, n_rows: int) -> None:
    """Check that there is a batch of puzzles.

    Parameters
    ----------
    config
        Composed configuration of a training.
    n_rows
        Puzzles to train on.

    Raises
    ------
    ValueError
        If there are fewer than one step takes.
    """
    n_passes = _get(config, "data.augmented_epochs") or 1
    if n_rows * n_passes < (batch := _get(config, "data.train_batch_size")):
        msg = (
            f"there are {n_rows} puzzles to train on, and a step takes data.train_batch_size={batch}; give more, or "
            "lower data.train_batch_size and actor_rollout_ref.actor.ppo_mini_batch_size"
        )
        raise ValueError(msg)


def check_batches(config: DictConfig) -> None:
    """Check that batches can be shared by the GPUs.

    verl 0.9.1 asserts as much in ``workers/engine_workers.py`` (mini-batches) and ``workers/engine/utils.py``
    (micro-batches), after it has filled the batch up as ``PPOTrainer._get_required_batch_multiple`` says.

    Parameters
    ----------
    config
        Composed configuration of a training.

    Raises
    ------
    ValueError
        If they cannot, naming the setting.
    """
    n_gpus = _get(config, "trainer.nnodes") * _get(config, "trainer.n_gpus_per_node")
    n_gpus //= _get(config, f"{_ACTOR}.fsdp_config.ulysses_sequence_parallel_size", 1) or 1
    n = _get(config, f"{_ROLLOUT}.n")
    mini = _get(config, f"{_ACTOR}.ppo_mini_batch_size") * n
    updates = [(f"{_ACTOR}.ppo_mini_batch_size", mini, f"{_ACTOR}.ppo_micro_batch_size_per_gpu")]
    multiple = math.lcm(n_gpus, mini)
    if _get(config, "algorithm.adv_estimator") == "gae":
        critic = _get(config, "critic.ppo_mini_batch_size") * n
        updates.append(("critic.ppo_mini_batch_size", critic, "critic.fsdp.micro_batch_size_per_gpu"))
        multiple = math.lcm(multiple, critic)
    dynamic = _get(config, f"{_ACTOR}.use_dynamic_bsz", False)
    for key, size, micro_key in updates:
        if size % n_gpus:
            msg = f"{key} x rollout.n = {size} responses cannot be shared by {n_gpus} GPUs; make it a multiple of that"
            raise ValueError(msg)
        _check_micro(config, size // n_gpus, micro_key, dynamic)
    sampled = -(-_get(config, "data.train_batch_size") * n // multiple) * multiple
    _check_micro(config, sampled // n_gpus, f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu", dynamic)


def _check_micro(config: DictConfig, size: int, key: str, dynamic: bool) -> None:
    micro = _get(config, key)
    if not dynamic and micro and size % micro:
        msg = (
            f"{key}={micro} does not divide the {size} responses of each GPU; choose a divisor, or let verl make "
            "micro-batches of like length: +variant=balanced"
        )
        raise ValueError(msg)


def _get(config: DictConfig, key: str, default: Any = None) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key, default=default)
