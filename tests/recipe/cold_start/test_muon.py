import io

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from recipe.cello1.cold_start.muon import Muon, MuonAdamW, orthogonal, split_parameters  # noqa: E402

RATES = {"lr": 1e-2, "adam_lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def model(tied=True):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=tied))


def learn(net, optimizer, steps, rng):
    for _ in range(steps):
        ids = torch.randint(0, 32, (4, 6), generator=rng)
        net(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
@pytest.mark.slow
def test_muon_gets_the_matrices_of_the_layers_and_nothing_else(tied, tables):
    net = model(tied)
    matrices, ends, vectors = split_parameters(net)
    assert len(matrices) == 2 * 7  # q, k, v, o, gate, up, down
    assert len(ends) == tables
    assert all(p.ndim == 1 for p in vectors)
    assert len(matrices) + len(ends) + len(vectors) == len(list(net.parameters()))


def test_frozen_parameters_are_left_alone():
    net = model()
    net.get_input_embeddings().weight.requires_grad_(False)
    assert split_parameters(net)[1] == []
    MuonAdamW(net, **RATES)


def test_a_scheduler_changes_the_rates_of_both():
    optimizer = MuonAdamW(model(), **RATES | {"lr": 0.1, "adam_lr": 0.01})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.muon.param_groups] == [0.05]
    assert [group["lr"] for group in optimizer.adamw.param_groups] == [0.005, 0.005]
    assert [group["weight_decay"] for group in optimizer.adamw.param_groups] == [0.1, 0.0]


def test_it_trains_everything_and_goes_on_from_a_checkpoint_as_if_it_had_not_stopped():
    rng = torch.Generator().manual_seed(1)
    net = model()
    optimizer = MuonAdamW(net, **RATES)
    before = [p.clone() for p in net.parameters()]
    learn(net, optimizer, 5, rng)
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), rng.get_state()), buffer)
    learn(net, optimizer, 5, rng)
    buffer.seek(0)
    weights, state, position = torch.load(buffer, weights_only=True)
    again = model()
    again.load_state_dict(weights)
    other = MuonAdamW(again, **RATES | {"lr": 1.0})  # overwritten by the checkpoint
    other.load_state_dict(state)
    rng.set_state(position)
    learn(again, other, 5, rng)
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_model_without_matrices_is_refused():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(4, 4)

        def get_input_embeddings(self):
            return self.table

        def get_output_embeddings(self):
            return None

    with pytest.raises(ValueError, match="optimizer=adamw"):
        MuonAdamW(Bare(), **RATES)


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_an_update_is_that_of_torch_but_for_the_rounding_of_bfloat16(shape):
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    rng = torch.Generator().manual_seed(3)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for _ in range(3)] for _ in range(2))
    optimizers = Muon([*ours, torch.nn.Parameter(torch.ones(4, 5))], **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = right.grad = torch.randn(shape, generator=rng)
        for optimizer in optimizers:
            optimizer.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=0.02, rtol=0.02)
        assert not torch.equal(left, torch.ones(shape))


def test_singular_values_come_near_one():
    matrices = torch.randn(2, 6, 30, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(orthogonal(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert ((values > 0.5) & (values < 1.3)).all()
