import asyncio

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402

from recipe.cello1.rl.reward_manager import PuzzleRewardManager  # noqa: E402
from recipe.cello1.task.prompt import render_user  # noqa: E402
from recipe.cello1.task.puzzle import Puzzle  # noqa: E402
from tests.helpers.rooms import RECIPE  # noqa: E402
from verl import DataProto  # noqa: E402

GOLD = "B cell | T cell"
EOS, PAD = 256, 257


class ByteTokenizer:
    """A tokenizer whose tokens are bytes, with an end and a padding token that are special."""

    all_special_ids = (EOS, PAD)

    def convert_ids_to_tokens(self, index):
        return {EOS: "<end>", PAD: "<pad>"}[index]

    def decode(self, ids, **options):
        return bytes(int(i) for i in ids if i < EOS).decode()


def config(reward: object = "dense", custom: str | None = None, shaping: object = None):
    return OmegaConf.create(
        {
            "cello1": {"reward": reward, "shaping": shaping},
            "reward": {"custom_reward_function": {"path": custom}},
            "data": {"max_response_length": 100},
        }
    )


def rollout(text: str, gold: str = GOLD, width: int = 120, **columns: object) -> DataProto:
    response = [*text.encode(), EOS]
    prompt = [*b"ask"]
    padding = width - len(response)
    return DataProto.from_dict(
        tensors={
            "prompts": torch.tensor([prompt]),
            "responses": torch.tensor([response + [PAD] * padding]),
            "attention_mask": torch.tensor([[1] * (len(prompt) + len(response)) + [0] * padding]),
        },
        non_tensors={
            "reward_model": np.array([{"style": "rule", "ground_truth": gold}], dtype=object),
            **{name: np.array([value], dtype=object) for name, value in columns.items()},
        },
    )


def score(text: str, extra_info: object = None, **options) -> dict:
    async def run() -> dict:
        columns = {} if extra_info is None else {"extra_info": extra_info}
        return await PuzzleRewardManager(config(**options), ByteTokenizer()).run_single(rollout(text, **columns))

    return asyncio.run(run())


def test_a_right_answer_is_paid_in_full():
    result = score(f"<think>x</think>\n<answer>{GOLD}</answer>")
    assert result["reward_score"] == 1.0
    assert result["reward_extra_info"] == {
        "score": 1.0,
        "acc": 1.0,
        "partial_accuracy": 1.0,
        "exact_match": 1.0,
        "format_validity": 1.0,
        "uniqueness": 1.0,
        "strict_accuracy": 1.0,
        "legal": 1.0,
    }


def test_padding_and_end_of_turn_are_not_part_of_the_answer():
    assert score(f"<think></think>\n<answer>{GOLD}</answer>\n")["reward_score"] == 1.0


@pytest.mark.parametrize(("reward", "expected"), [("dense", 0.0), ("sparse", 0.0)])
def test_all_wrong(reward, expected):
    result = score("<think></think>\n<answer>T cell | B cell</answer>", reward=reward)
    assert result["reward_score"] == expected
    assert result["reward_extra_info"]["format_validity"] == 1.0


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


def test_an_answer_is_legal_if_it_keeps_to_the_candidates_of_the_question():
    extra = {"question": render_user(Puzzle((("MS4A1",), ("CD3E",)), ("B cell", "T cell")))}
    for answer, legal in ((GOLD, 1), ("B cell | pericyte", 0), ("B cell | B cell", 0), ("B cell", 0)):
        info = score(f"<think></think>\n<answer>{answer}</answer>", extra)["reward_extra_info"]
        assert (info["legal"], info["acc"]) == (legal, info["partial_accuracy"])
    assert score("<think></think>\n<answer>B cell | pericyte</answer>")["reward_extra_info"]["legal"] == 1  # not told


SHAPING = {"overlong": {"buffer": 60, "factor": 1.0}, "reasoning": {"min_words": 2}, "candidates": {"credit": 0.1}}
EXTRA = {"question": render_user(Puzzle((("MS4A1",), ("CD3E",)), ("B cell", "T cell")))}


def test_shaped_terms_are_added_and_logged_beside_the_score():
    text = f"<think>x</think>\n<answer>{GOLD}</answer>"
    result = score(text, EXTRA, shaping=SHAPING)
    plain = score(text)["reward_extra_info"]
    terms = {
        "shaping_overlong": pytest.approx((100 - 60 - (len(text) + 1)) / 60),  # bytes and the end of turn
        "shaping_reasoning": -0.25,
        "shaping_candidates": 0.1,
    }
    assert result["reward_extra_info"] == {**plain, **terms}
    assert result["reward_score"] == pytest.approx(1.0 + sum(result["reward_extra_info"][name] for name in terms))
    assert terms["shaping_overlong"].expected < 0


def test_malformed_answers_report_the_same_terms():
    right, wrong = (score(text, EXTRA, shaping=SHAPING) for text in (f"<think></think>\n<answer>{GOLD}</answer>", ""))
    assert list(wrong["reward_extra_info"]) == list(right["reward_extra_info"])
    assert wrong["reward_score"] == -1.0


def test_the_variant_of_the_question_is_that_of_the_row():
    one = Puzzle((("MS4A1",),), ("B cell", "T cell"))
    extra = {"question": render_user(one, "single"), "variant": "single"}

    async def run():
        manager = PuzzleRewardManager(config(shaping={"candidates": {"credit": 0.5}}), ByteTokenizer())
        answer = "<think></think>\n<answer>T cell</answer>"
        return await manager.run_single(rollout(answer, gold="B cell", extra_info=extra))

    assert asyncio.run(run())["reward_score"] == 0.5


def test_bad_shaping_is_refused_before_training():
    with pytest.raises(ValueError, match=r"cello1\.shaping\.overlong\.buffer is 200 tokens"):
        score("", shaping={"overlong": {"buffer": 200}})


def test_credit_needs_the_question():
    with pytest.raises(ValueError, match=r"cello1\.shaping\.candidates reads the candidates"):
        score("", shaping={"candidates": {"credit": 0.5}})


@pytest.mark.parametrize("name", ["cello1_grpo", "cello1_ppo"])
@pytest.mark.slow
def test_the_shipped_configs_have_no_shaping_and_take_it_as_an_override(name):
    from hydra import compose, initialize_config_dir

    folder = RECIPE / "config"
    with initialize_config_dir(str(folder), version_base=None):
        plain = compose(name)
        shaped = compose(name, ["cello1.shaping={overlong: {buffer: 600}, candidates: {credit: 0.1}}"])
    assert not PuzzleRewardManager(plain, ByteTokenizer()).shaping
    shaping = PuzzleRewardManager(shaped, ByteTokenizer()).shaping
    assert (shaping.max_tokens, shaping.overlong.buffer, shaping.candidates.credit) == (3000, 600, 0.1)


def test_verl_makes_it_from_the_shipped_config():
    from hydra import compose, initialize_config_dir

    from verl.trainer.ppo.reward import load_reward_manager

    folder = RECIPE / "config"
    with initialize_config_dir(str(folder), version_base=None):
        shipped = compose("cello1_grpo")

    async def run() -> list[float]:
        manager = load_reward_manager(shipped, ByteTokenizer())
        answers = ("B cell | T cell", "T cell | B cell", "B cell")
        scored = [
            await manager.run_single(rollout(f"<think></think>\n<answer>{answer}</answer>")) for answer in answers
        ]
        return [result["reward_score"] for result in scored]

    assert asyncio.run(run()) == [1.0, 0.0, -1.0]
