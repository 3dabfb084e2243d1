"""Log the reward's metrics for training steps.

verl's V1 trainer aggregates what a reward manager returns beside the score for validation only. Its replay buffer is
exchangeable (``trainer.v1.sampler.custom_sampler``) and returns, with every batch, metrics that the trainer logs: the
buffers here add the means of partial accuracy, exact match and so on over the sampled responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transfer_queue as tq

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

PREFIX = "training/reward"
# verl polls every 2 s, which is longer than a whole rollout of a small model takes.
POLL_INTERVAL_S = 0.2


def mean_metrics(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average the numbers that all responses of a batch report."""
    if not infos:
        return {}
    keys = [key for key in infos[0] if all(isinstance(info.get(key), int | float) for info in infos)]
    return {f"{PREFIX}/{key}": sum(float(info[key]) for info in infos) / len(infos) for key in keys}


class _RewardMetrics:
    """Adds the reward's metrics to those that ``sample`` returns for the training partition."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, float]]:
        # mypy: of the buffer that this is mixed into
        batch, metrics = super().sample(  # type: ignore[misc]
            global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
        )
        if partition_id != "train":
            return batch, metrics
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=["extra_fields"])
        # A column of dicts comes back as tensordict's list of wrapped values.
        extras = [getattr(extra, "data", extra) for extra in fields["extra_fields"]]
        infos = [extra["reward_extra_info"] for extra in extras]
        return batch, {**metrics, **mean_metrics(infos)}


class PuzzleReplayBuffer(_RewardMetrics, ReplayBuffer):
    """The buffer of the synchronous trainer."""


class PuzzleReplayBufferAsync(_RewardMetrics, ReplayBufferAsync):
    """The buffer of the asynchronous trainers."""


def make_replay_buffer(
    *, trainer_mode: str, sampler_kwargs: Mapping[str, Any], **kwargs: Any
) -> PuzzleReplayBuffer | PuzzleReplayBufferAsync:
    """Build the buffer for a trainer mode; what verl calls as ``custom_sampler``."""
    given = dict(sampler_kwargs)
    filter_groups = given.pop("filter_groups", None) or {}
    metric = filter_groups.get("metric") if filter_groups.get("enable") else None
    refill = given.get("sync_refill_failed_groups", False)
    options = {"filter_groups_metric": metric, "sync_refill_failed_groups": refill}
    kwargs.setdefault("poll_interval", POLL_INTERVAL_S)
    if trainer_mode != "sync":
        return PuzzleReplayBufferAsync(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, **kwargs, **options)
    # As verl: what is evicted is replaced one prompt at a time.
    exact = metric is not None or refill
    options["train_batch_size"] = given["train_batch_size"]
    options["gen_batch_size"] = 1 if exact else given.get("gen_batch_size") or given["train_batch_size"]
    options["max_inflight_gen_batches"] = filter_groups.get("max_inflight_gen_batches", 1) if metric is not None else 1
    return PuzzleReplayBuffer(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, **kwargs, **options)
