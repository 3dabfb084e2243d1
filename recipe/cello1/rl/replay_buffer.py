"""Log the reward's metrics for training steps, and stop a run that fails quietly.

verl's V1 trainer aggregates what a reward manager returns beside the score for validation only. Its replay buffer is
exchangeable (``trainer.v1.sampler.custom_sampler``) and returns, with every batch, metrics that the trainer logs: the
buffers here add the means of partial accuracy, exact match and so on over the sampled responses.

They also bound what verl passes over: requests that failed, which it replaces with padding, and DAPO's groups without
different rewards. A reward that raises is no failed request but ends the run: the agent loop, which is exchangeable as
well, leaves word of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import transfer_queue as tq
from ray.exceptions import RayTaskError, UnserializableException

from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

_PREFIX = "training/reward"
# verl polls every 2 s, which is longer than a whole rollout of a small model takes.
POLL_INTERVAL_S = 0.2
_FAULTS = "reward_faults"  # the partition for what rewards have raised


def mean_metrics(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average the numbers that all responses of a batch report."""
    if not infos:
        return {}
    keys = [key for key in infos[0] if all(isinstance(info.get(key), int | float) for info in infos)]
    return {f"{_PREFIX}/{key}": sum(float(info[key]) for info in infos) / len(infos) for key in keys}


class _Watched:
    """Adds the reward's metrics to those that ``sample`` returns for the training partition, and sets bounds."""

    limits: Mapping[str, Any] = {}
    _failed = _alike = 0

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()  # type: ignore[misc]
        for tag in self.partitions.pop(_FAULTS, {}).values():  # type: ignore[attr-defined]
            raise RuntimeError(f"the reward of a response raised {tag['fault']}; mend the data, or the reward")

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, float]]:
        self._failed = self._alike = 0
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
        failed = {"training/rollout/failed_requests": float(self._failed)}
        return batch, {**metrics, **mean_metrics(infos), **failed}

    def _select_prompt_uids(self, partition_id: str, sampleable_keys: set[str], batch_size: int) -> Any:
        selected = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)  # type: ignore[misc]
        lost = self.failure_keys[partition_id].intersection(selected[0])  # type: ignore[attr-defined]
        n = self.limits.get("n_val" if partition_id == "val" else "n", 1)
        there = sum(key.split("_")[0] in lost for key in selected[1])
        self._count_failed(n * len(lost) - there, n * batch_size)
        return selected

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, eviction_reasons: Any) -> Any:
        n, batch = self.limits.get("n", 1), self.limits.get("train_batch_size", 1)
        self._count_failed(n * len(eviction_reasons[2]), n * batch)
        self._alike += len(eviction_reasons[1])
        most = self.limits.get("max_num_gen_batches") or 0
        if 0 < most * batch < self._alike:
            raise RuntimeError(
                f"the responses to each of {self._alike} puzzles had one reward, more than algorithm.filter_groups."
                f"max_num_gen_batches={most} batches of {batch} may in a step; the puzzles are too hard or too easy "
                "for this model: give others, raise actor_rollout_ref.rollout.n, or leave +variant=dapo out"
            )
        return super()._evict_terminal_groups(global_steps, partition_id, eviction_reasons)  # type: ignore[misc]

    def _count_failed(self, failed: int, total: int) -> None:
        self._failed += failed
        share = self.limits.get("max_failed_share", 0.1)
        if failed and self._failed > share * total:
            raise RuntimeError(
                f"{self._failed} of the {total} requests of a step failed, and cello1.max_failed_share={share} of them "
                'may; the log has their errors after "Error in _run_prompt"'
            )


class _Reporting:
    """A worker of verl's reward loop that leaves word of what the reward raises, of which verl would make padding."""

    def __init__(self, worker: Any):
        self._worker = worker
        self.compute_score = self  # called as the methods of actors are: compute_score.remote(data)

    async def remote(self, data: Any) -> dict[str, Any]:
        try:
            return await self._worker.compute_score.remote(data)
        except (RayTaskError, UnserializableException) as error:  # raised in the worker, which is there as before
            cause = getattr(error, "cause", error)
            fault = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            await tq.async_kv_put(key=uuid4().hex, partition_id=_FAULTS, tag={"fault": fault})
            raise


class PuzzleAgentLoopManager(AgentLoopManagerTQ):
    """verl's, for any reward; named by ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``."""

    def __init__(self, *, reward_loop_worker_handles: Sequence[Any] | None = None, **kwargs: Any):
        handles = reward_loop_worker_handles and [_Reporting(worker) for worker in reward_loop_worker_handles]
        super().__init__(reward_loop_worker_handles=handles, **kwargs)


class PuzzleReplayBuffer(_Watched, ReplayBuffer):
    """The buffer of the synchronous trainer."""


class PuzzleReplayBufferAsync(_Watched, ReplayBufferAsync):
    """The buffer of the asynchronous trainers."""


def make_replay_buffer(
    *, trainer_mode: str, sampler_kwargs: Mapping[str, Any], **kwargs: Any
) -> PuzzleReplayBuffer | PuzzleReplayBufferAsync:
    """Build the buffer for a trainer mode; what verl calls as ``custom_sampler``."""
    given = dict(sampler_kwargs)
    filter_groups = given.pop("filter_groups", None) or {}
    dapo = bool(filter_groups.get("enable"))
    metric = filter_groups.get("metric") if dapo else None
    refill = given.get("sync_refill_failed_groups", False)
    options = {"filter_groups_metric": metric, "sync_refill_failed_groups": refill}
    kwargs.setdefault("poll_interval", POLL_INTERVAL_S)
    kind: Any = PuzzleReplayBufferAsync
    if trainer_mode == "sync":
        kind = PuzzleReplayBuffer
        # As verl: what is evicted is replaced one prompt at a time.
        one_by_one = metric is not None or refill
        options["train_batch_size"] = given["train_batch_size"]
        options["gen_batch_size"] = 1 if one_by_one else given.get("gen_batch_size") or given["train_batch_size"]
        options["max_inflight_gen_batches"] = filter_groups.get("max_inflight_gen_batches", 1) if dapo else 1
    buffer = kind(trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, **kwargs, **options)
    buffer.limits = {**given, "max_num_gen_batches": filter_groups.get("max_num_gen_batches")}
    return buffer
