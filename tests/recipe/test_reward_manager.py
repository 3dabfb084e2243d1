import asyncio

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402

from recipe.cello1.reward_manager import PuzzleRewardManager  # noqa: E402
from verl import DataProto  # noqa: E402

GOLD = "B cell | T cell"
EOS, PAD = 256, 257


class ByteTokenizer:
    """A tokenizer whose tokens are bytes, with an end and a padding token that are special."""

    def decode(self, ids, skip_special_tokens=False):
        assert skip_special_tokens
        return bytes(int(i) for i in ids if i < EOS).decode()


def config(reward: object = "dense", custom: str | None = None):
    return OmegaConf.create({"cello1": {"reward": reward}, "reward": {"custom_reward_function": {"path": custom}}})


def rollout(text: str, gold: str = GOLD, width: int = 120) -> DataProto:
    response = [*text.encode(), EOS]
    prompt = [1, 2, 3]
    padding = width - len(response)
    return DataProto.from_dict(
        tensors={
            "responses": torch.tensor([response + [PAD] * padding]),
            "attention_mask": torch.tensor([[1] * (len(prompt) + len(response)) + [0] * padding]),
        },
        non_tensors={"reward_model": np.array([{"style": "rule", "ground_truth": gold}], dtype=object)},
    )


def score(text: str, **options) -> dict:
    async def run() -> dict:
        return await PuzzleRewardManager(config(**options), ByteTokenizer()).run_single(rollout(text))

    return asyncio.run(run())


def test_a_right_answer_is_paid_in_full():
    result = score(f"<think>x</think>\n<answer>{GOLD}</answer>")
    assert result["reward_score"] == 1.0
    assert result["reward_extra_info"] == {
        "score": 1.0,
        "acc": 1.0,
        "cell_accuracy": 1.0,
        "exact_match": 1.0,
        "format_valid": 1.0,
        "unique": 1.0,
    }


def test_padding_and_end_of_turn_are_not_part_of_the_answer():
    assert score(f"<think></think>\n<answer>{GOLD}</answer>\n")["reward_score"] == 1.0


@pytest.mark.parametrize(("reward", "expected"), [("dense", 0.0), ("sparse", 0.0)])
def test_all_wrong(reward, expected):
    result = score("<think></think>\n<answer>T cell | B cell</answer>", reward=reward)
    assert result["reward_score"] == expected
    assert result["reward_extra_info"]["format_valid"] == 1.0


def test_half_right_differs_between_the_rewards():
    text = "<think></think>\n<answer>B cell | NK cell</answer>"
    assert score(text)["reward_score"] == 0.25
    assert score(text, reward="sparse")["reward_score"] == 0.0


def test_malformed():
    assert score("B cell | T cell")["reward_score"] == -1.0


def test_values_are_floats_so_that_verl_can_average_them():
    info = score("nonsense")["reward_extra_info"]
    assert all(type(value) is float for value in info.values())


def test_unknown_reward():
    with pytest.raises(ValueError, match=r"cello1\.reward must be one of dense, sparse, got 'thick'"):
        score("", reward="thick")


def test_second_scorer_is_refused():
    with pytest.raises(ValueError, match="custom_reward_function.path is set"):
        score("", custom="other.py")


def test_unusable_gold_is_an_error_not_a_score():
    async def run():
        return await PuzzleRewardManager(config(), ByteTokenizer()).run_single(rollout("<think>", gold=""))

    with pytest.raises(ValueError, match="gold is empty"):
        asyncio.run(run())
