import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")
pytest.importorskip("transfer_queue")

from recipe.cello1.rl import replay_buffer  # noqa: E402
from recipe.cello1.rl.replay_buffer import (  # noqa: E402
    PuzzleAgentLoopManager,
    PuzzleReplayBuffer,
    PuzzleReplayBufferAsync,
    make_replay_buffer,
    mean_metrics,
)

INFOS = [{"partial_accuracy": 1.0, "exact_match": 1.0, "text": "x"}, {"partial_accuracy": 0.5, "exact_match": 0.0}]


def test_means_over_the_batch():
    assert mean_metrics(INFOS) == {"training/reward/partial_accuracy": 0.75, "training/reward/exact_match": 0.5}


def test_nothing_to_average():
    assert mean_metrics([]) == {}


def build(mode: str, train_batch_size: int = 4, **sampler_kwargs):
    sampler_kwargs["train_batch_size"] = train_batch_size
    return make_replay_buffer(
        trainer_mode=mode,
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs=sampler_kwargs,
        refill_fn=lambda n: None,
    )


@pytest.mark.parametrize(
    ("mode", "buffer"), [("sync", PuzzleReplayBuffer), ("colocate_async", PuzzleReplayBufferAsync)]
)
def test_buffer_fits_the_trainer_mode(mode, buffer):
    assert type(build(mode)) is buffer


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_dynamic_sampling_settings_reach_the_buffer(mode):
    filters = {"enable": True, "metric": "reward", "max_inflight_gen_batches": 2}
    buffer = build(mode, filter_groups=filters, gen_batch_size=8)
    assert buffer.filter_groups_metric == "reward"
    if mode == "sync":
        assert (buffer.train_batch_size, buffer.gen_batch_size, buffer.max_inflight_gen_batches) == (4, 1, 2)


def test_no_dynamic_sampling_unless_enabled():
    buffer = build("sync", filter_groups={"enable": False, "metric": "reward", "max_inflight_gen_batches": 2})
    assert buffer.filter_groups_metric is None
    assert (buffer.gen_batch_size, buffer.max_inflight_gen_batches) == (4, 1)


def test_failed_groups_are_refilled_when_asked():
    buffer = build("sync", sync_refill_failed_groups=True)
    assert buffer.sync_refill_failed_groups and buffer.gen_batch_size == 1


@pytest.mark.parametrize(("partition", "logged"), [("train", True), ("val", False)])
def test_sample_adds_the_metrics_to_training_batches(monkeypatch, partition, logged):
    batch = SimpleNamespace(keys=["a", "b"])
    column = [SimpleNamespace(data={"reward_extra_info": info}) for info in INFOS]
    monkeypatch.setattr(replay_buffer.ReplayBuffer, "sample", lambda self, **_: (batch, {"other": 1.0}))
    monkeypatch.setattr(replay_buffer.tq, "kv_batch_get", lambda **_: {"extra_fields": column})
    found, metrics = build("sync").sample(global_steps=1, partition_id=partition, batch_size=2)
    assert found is batch
    assert metrics["other"] == 1.0
    assert ("training/reward/partial_accuracy" in metrics) is logged
    assert ("training/rollout/failed_requests" in metrics) is logged


def group(buffer, uid, got, status):
    """Enter a group of two responses, of which some are there."""
    buffer.partitions["train"] |= {f"{uid}_{i}_0": {} for i in range(got)}
    getattr(buffer, f"{status}_keys")["train"].add(uid)


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_requests_that_failed_are_counted_and_end_the_run_beyond_a_share(mode):
    buffer = build(mode, train_batch_size=10, n=2, max_failed_share=0.1)
    for i in range(8):
        group(buffer, f"a{i}", 2, "finished")
    group(buffer, "b", 1, "failure")
    group(buffer, "c", 1, "failure")
    uids = {*buffer.finished_keys["train"], "b", "c"}
    assert len(buffer._select_prompt_uids("train", uids, 10)[0]) == 10
    assert buffer._failed == 2, "a tenth may"
    buffer.limits["max_failed_share"] = 0.05
    buffer._failed = 0
    with pytest.raises(RuntimeError, match=r"2 of the 20 requests of a step failed, .* cello1.max_failed_share=0.05"):
        buffer._select_prompt_uids("train", uids, 10)


def test_failed_groups_that_are_replaced_count_too(monkeypatch):
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **_: None)
    buffer = build("colocate_async", train_batch_size=10, n=2, max_failed_share=0.2)
    buffer._evict_terminal_groups(1, "train", (set(), set(), {"a", "b"}, {}))
    assert buffer._failed == 4
    with pytest.raises(RuntimeError, match="6 of the 20 requests of a step failed"):
        buffer._evict_terminal_groups(1, "train", (set(), set(), {"c"}, {}))


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_groups_without_different_rewards_are_replaced_up_to_a_bound(mode, monkeypatch):
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **_: None)
    filters = {"enable": True, "metric": "score", "max_num_gen_batches": 2}
    buffer = build(mode, train_batch_size=4, filter_groups=filters)
    buffer._evict_terminal_groups(1, "train", (set(), set("abcdefgh"), set(), {-1.0: 8}))
    with pytest.raises(RuntimeError, match=r"each of 9 puzzles had one reward, .*max_num_gen_batches=2 batches of 4"):
        buffer._evict_terminal_groups(1, "train", (set(), {"i"}, set(), {-1.0: 1}))
    endless = build(mode, filter_groups={**filters, "max_num_gen_batches": 0})
    endless._evict_terminal_groups(1, "train", (set(), set(map(str, range(99))), set(), {-1.0: 99}))


class Queue(dict):
    """TransferQueue, as far as a tag is put and listed."""

    async def async_kv_put(self, key, partition_id, tag):
        self.setdefault(partition_id, {})[key] = tag

    def kv_list(self):
        return self


def raised(kind):
    """What Ray raises where a worker of the reward loop has raised, or has died."""
    from ray.exceptions import ActorDiedError, RayTaskError, UnserializableException

    return {
        "value": RayTaskError("compute_score", "", ValueError("no key\n'gold'")).as_instanceof_cause(),
        "key": RayTaskError("compute_score", "", KeyError("answer")).as_instanceof_cause(),
        "unreadable": UnserializableException("Traceback: Unreadable: 7"),
        "died": ActorDiedError(),
    }[kind]


@pytest.fixture
def scored(monkeypatch):
    """Return a function that has responses scored by a foreign reward; it gives what comes of them, and the queue."""
    queue = Queue({"train": {f"p{i}": {"is_prompt": True, "status": "finished", "global_steps": 1} for i in range(40)}})
    monkeypatch.setattr(replay_buffer, "tq", queue)
    monkeypatch.setattr("verl.trainer.ppo.v1.replay_buffer.tq", queue)

    def score(*kinds):
        async def remote(data):
            if data:
                raise raised(data)
            return {"reward_score": 1.0}

        config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=None, model=None))
        worker = SimpleNamespace(compute_score=SimpleNamespace(remote=remote))
        manager = PuzzleAgentLoopManager(config=config, llm_client=None, reward_loop_worker_handles=[worker])
        (handle,) = manager.reward_loop_worker_handles

        async def all_of_them():
            asked = [handle.compute_score.remote(kind) for kind in kinds]
            return await asyncio.gather(*asked, return_exceptions=True)

        return asyncio.run(all_of_them()), queue

    return score


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("partition", ["train", "val"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("value", r"raised ValueError: no key 'gold'; mend the data"),
        ("key", "raised KeyError: 'answer'; mend the data"),
        ("unreadable", "raised UnserializableException: .* Traceback: Unreadable: 7; mend"),
    ],
)
def test_one_reward_that_raises_ends_the_run_whatever_its_share(scored, mode, partition, kind, said):
    results, _ = scored(*[""] * 399, kind)
    assert results[:399] == [{"reward_score": 1.0}] * 399 and isinstance(results[399], Exception)
    buffer = build(mode, train_batch_size=40, n=10, max_failed_share=1.0)
    with pytest.raises(RuntimeError, match=f"^the reward of a response {said}"):
        buffer.sample(global_steps=1, partition_id=partition, batch_size=40)


def test_a_reward_worker_that_dies_is_a_failed_request(scored):
    results, queue = scored("died", "")
    assert type(results[0]).__name__ == "ActorDiedError" and results[1] == {"reward_score": 1.0}
    assert set(queue) == {"train"}


def test_a_reward_model_has_no_workers_to_watch():
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=None, model=None))
    manager = PuzzleAgentLoopManager(config=config, llm_client=None, reward_loop_worker_handles=None)
    assert manager.reward_loop_worker_handles is None, "verl then scores when a batch is complete"
