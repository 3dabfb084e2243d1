import hashlib
import json
import math
import os

import pytest

from recipe.cello1.rl.export import ADAPTER, MAX_DIFFERENCE, _finish, export, find_actor, latest_step
from recipe.cello1.rl.model_card import model_card
from tests.helpers.cli import command
from tests.helpers.toy_model import build_toy_model

main = command("export")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for step in (2, 10):
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def test_the_last_complete_step_counts_not_the_largest(run):
    assert latest_step(run) == 2


def test_run_without_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint was completed there; train first"):
        latest_step(tmp_path)


def test_step_that_is_not_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it has \[2, 10\]"):
        export(run, tmp_path / "out", step=7)


def test_existing_output_is_kept(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="out exists; remove it or choose another folder"):
        export(run, out)


@pytest.mark.slow
def test_failure_of_the_merger_leaves_nothing(run, tmp_path, capsys):
    pytest.importorskip("verl")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 1
    assert "error: verl.model_merger failed on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def checkpoint(folder, mesh: tuple[int, ...], weights: dict) -> None:
    """Write weights as verl's FSDP checkpoints have them, split by rows over the last dimension of the mesh."""
    torch = pytest.importorskip("torch")
    folder.mkdir(parents=True)
    world_size = math.prod(mesh)
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
    for rank in range(world_size):
        shard = {name: Shard(weight.chunk(mesh[-1])[rank % mesh[-1]], mesh) for name, weight in weights.items()}
        torch.save(shard, folder / f"model_world_size_{world_size}_rank_{rank}.pt")


class Shard:
    """Stands in for a DTensor, which cannot be made without a process group."""

    def __init__(self, local, mesh):
        self._local_tensor = local
        self.shape = mesh
        self.placements = (self,)
        self.dim = 0

    @property
    def device_mesh(self):
        return self

    def is_shard(self) -> bool:
        return True


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (2, 2), (2, 1)])
@pytest.mark.slow
def test_shards_become_the_model_again(tmp_path, monkeypatch, mesh):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from recipe.cello1.rl.sharded import compare_logits, load_shards

    monkeypatch.setattr("torch.distributed.tensor.DTensor", Shard)
    build_toy_model(tmp_path / "model")
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    checkpoint(tmp_path / "actor", mesh, weights)
    loaded = load_shards(tmp_path / "actor", trusted=True)  # the stand-in is no tensor
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert compare_logits(tmp_path / "model", loaded) == 0

    name = "model.layers.1.mlp.down_proj.weight"
    loaded[name] = 1.05 * loaded[name]
    assert compare_logits(tmp_path / "model", loaded) > MAX_DIFFERENCE
    with pytest.raises(ValueError, match=f"do not have the same weights: missing .*{name}"):
        compare_logits(tmp_path / "model", {key: value for key, value in loaded.items() if key != name})


def test_adapters_are_added_as_peft_does(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from recipe.cello1.rl.sharded import merge_adapters

    build_toy_model(tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, settings)
    merged = merge_adapters({name: weight.clone() for name, weight in model.state_dict().items()}, 2.0)
    wanted = model.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-6) for name in wanted)


@pytest.mark.slow
def test_an_adapter_that_is_kept_is_compared_as_well(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from recipe.cello1.rl.sharded import round_weights

    build_toy_model(tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, settings)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    rounded = dict(weights)
    round_weights(rounded)
    model.load_state_dict(rounded)  # as the merger writes base and adapter
    model.unload().save_pretrained(tmp_path / "model")
    model = peft.get_peft_model(base, settings)
    model.load_state_dict(rounded)
    monkeypatch.setattr("recipe.cello1.rl.sharded.load_shards", lambda actor, **options: dict(weights))
    model.save_pretrained(tmp_path / "model" / ADAPTER)
    assert _finish(tmp_path / "model", tmp_path, keep_adapter=True) < MAX_DIFFERENCE
    assert (tmp_path / "model" / ADAPTER).is_dir()

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.neg_()
    model.save_pretrained(tmp_path / "model" / ADAPTER)
    assert _finish(tmp_path / "model", tmp_path, keep_adapter=True) > MAX_DIFFERENCE


def test_one_checkpoint_may_be_named(tmp_path):
    actor = tmp_path / "run" / "global_step_7" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").touch()
    assert find_actor(actor) == find_actor(actor.parent) == (actor, 7)


@pytest.fixture
def published(tmp_path):
    """A checkpoint as the published code left it: one rank, nothing but weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("verl")
    build_toy_model(tmp_path / "base")
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    weights = {name: (weight * 1.5).clone() for name, weight in weights.items()}
    actor = tmp_path / "run" / "global_step_9" / "actor"
    actor.mkdir(parents=True)
    torch.save(weights, actor / "model_world_size_1_rank_0.pt")
    return actor, weights


@pytest.mark.slow
def test_checkpoint_of_the_published_code(published, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    actor, weights = published
    assert find_actor(actor) == (actor, 9)
    out = tmp_path / "out"
    old = os.umask(0o022)
    try:
        assert main([actor, tmp_path / "base", out]) == 0
    finally:
        os.umask(old)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], weights[name].bfloat16().to(loaded[name].dtype)) for name in weights)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o644"}
    assert [path.name for path in actor.iterdir()] == ["model_world_size_1_rank_0.pt"]


def test_what_a_published_checkpoint_needs(published, tmp_path, capsys):
    actor, _ = published
    with pytest.raises(FileNotFoundError, match="has no fsdp_config.json .*; set base to the model that was trained"):
        export(actor, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="model: /nowhere does not exist"):
        export(actor, tmp_path / "out", base="/nowhere")
    for arguments in ([actor], [actor, "base"], [actor, "base", "out", "--out", "x"]):
        assert main(arguments) == 1
        assert "error: give the model's folder: `export RUN --out OUT`" in capsys.readouterr().err


def test_world_size_is_that_of_the_files(tmp_path):
    pytest.importorskip("torch")
    from recipe.cello1.rl.sharded import find_world_size

    with pytest.raises(ValueError, match="must hold .* of one world size, found none; give one checkpoint"):
        find_world_size(tmp_path)
    (tmp_path / "model_world_size_16_rank_3.pt").touch()
    assert find_world_size(tmp_path) == 16
    (tmp_path / "model_world_size_8_rank_0.pt").touch()
    with pytest.raises(ValueError, match=r"found \['16', '8'\]"):
        find_world_size(tmp_path)


def test_card_says_where_the_model_comes_from(tmp_path):
    data = tmp_path / "train.parquet"
    data.write_bytes(b"x")
    config = {
        "actor_rollout_ref": {"model": {"path": str(tmp_path / "sft" / "model")}},
        "algorithm": {"adv_estimator": "grpo"},
        "cello1": {"reward": "dense"},
        "data": {"seed": 3, "prompt_layout": None, "train_files": str(data)},
    }
    steps = [{"step": n, "critic/score/mean": float(n)} for n in range(1, 12)]
    card = model_card(config, steps, step=10, difference=0.0123)
    assert card.startswith("---\n") and "base_model: sft/model\n" in card
    assert hashlib.sha256(b"x").hexdigest() in card
    assert "| reward, 5 steps | 3.000 | 8.000 |" in card, "step 11 came after the checkpoint"
    assert "by 1.2e-02 of their norm" in card
    assert str(tmp_path) not in card, "a card is made to be shared"


def test_card_of_an_unknown_run():
    assert "base_model" not in model_card({}, [], 1, 0.0)
