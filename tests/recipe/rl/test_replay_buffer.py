from types import SimpleNamespace

import pytest

pytest.importorskip("verl")
pytest.importorskip("transfer_queue")

from recipe.cello1.rl import replay_buffer  # noqa: E402
from recipe.cello1.rl.replay_buffer import (  # noqa: E402
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
