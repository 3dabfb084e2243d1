"""Whether the sizes of an RL training go together: verl finds out when models are loaded and responses sampled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def check_rows(config: DictConfig, n_rows: int) -> None:
    """Check that there is a batch of puzzles."""
    batch = _number(config, "data.train_batch_size")
    if n_rows * _number(config, "data.augmented_epochs", 1) < batch:
        raise ValueError(
            f"there are {n_rows} puzzles to train on, and a step takes data.train_batch_size={batch}; give more, or "
            "lower data.train_batch_size and actor_rollout_ref.actor.ppo_mini_batch_size"
        )


def check_batches(config: DictConfig) -> None:
    """Check that batches can be shared by the GPUs."""
    # The deprecated place of the setting still counts.
    ulysses = [f"{_ACTOR}{place}.ulysses_sequence_parallel_size" for place in ("", ".fsdp_config")]
    per_sequence = max(_number(config, key, 1) for key in ulysses)
    n_gpus, rest = divmod(_number(config, "trainer.nnodes") * _number(config, "trainer.n_gpus_per_node"), per_sequence)
    if rest or not n_gpus:
        raise ValueError(f"{ulysses[1]}={per_sequence} does not divide the number of GPUs; choose a divisor")
    parallel = _number(config, f"{_ROLLOUT}.tensor_model_parallel_size", 1)
    if (n_gpus * per_sequence) % parallel:
        msg = f"{_ROLLOUT}.tensor_model_parallel_size={parallel} does not divide the number of GPUs; choose a divisor"
        raise ValueError(msg)
    n = _number(config, f"{_ROLLOUT}.n")
    batch, least = _number(config, "data.train_batch_size"), _number(config, f"{_ACTOR}.ppo_mini_batch_size")
    if batch < least and not get(config, f"{_ACTOR}.use_dynamic_bsz"):
        raise ValueError(
            f"data.train_batch_size={batch} is less than {_ACTOR}.ppo_mini_batch_size={least}; raise it, or lower that"
        )
    mini = least * n
    updates = [(f"{_ACTOR}.ppo_mini_batch_size", mini, f"{_ACTOR}.ppo_micro_batch_size_per_gpu")]
    multiple = math.lcm(n_gpus, mini)
    if get(config, "algorithm.adv_estimator") == "gae":
        critic = _number(config, "critic.ppo_mini_batch_size") * n
        updates.append(("critic.ppo_mini_batch_size", critic, "critic.fsdp.micro_batch_size_per_gpu"))
        multiple = math.lcm(multiple, critic)
    for key, size, micro_key in updates:
        if size % n_gpus:
            msg = f"{key} x rollout.n = {size} responses cannot be shared by {n_gpus} GPUs; make it a multiple of that"
            raise ValueError(msg)
        _check_micro(config, size // n_gpus, micro_key)
    sampled = -(-batch * n // multiple) * multiple
    for role in (_ROLLOUT, "actor_rollout_ref.ref"):
        _check_micro(config, sampled // n_gpus, f"{role}.log_prob_micro_batch_size_per_gpu")


def check_lengths(config: DictConfig, context: int | None) -> None:
    """Check that vLLM makes room for the longest prompt with the longest response, and that the model can take it."""
    prompt, response = (_number(config, f"data.max_{part}_length") for part in ("prompt", "response"))
    room = get(config, f"{_ROLLOUT}.max_model_len")
    if room is not None and room < prompt + response:
        raise ValueError(
            f"{_ROLLOUT}.max_model_len={room} is less than data.max_prompt_length={prompt} and "
            f"data.max_response_length={response} together, and requests would fail; set it to {prompt + response}"
        )
    if context is not None and context < (needed := room or prompt + response):
        raise ValueError(
            f"the model takes {context} tokens and the run needs {needed} ({_ROLLOUT}.max_model_len; data."
            "max_prompt_length and data.max_response_length together); lower them, or take another model"
        )


def _check_micro(config: DictConfig, size: int, key: str) -> None:
    if get(config, f"{_ACTOR}.use_dynamic_bsz") or not get(config, key):
        return
    if size % (micro := _number(config, key)):
        raise ValueError(
            f"{key}={micro} does not divide the {size} responses of each GPU; choose a divisor, or let verl make "
            "micro-batches of like length: +variant=balanced"
        )


def _number(config: DictConfig, key: str, default: int | None = None) -> int:
    value = get(config, key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive whole number, got {value!r}")
    return value


def get(config: DictConfig, key: str) -> Any:
    """Look a setting up; ``None`` where there is none."""
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key)
