"""verl reward manager: the scorer of :mod:`recipe.cello1.scoring` as the reward of each response.

Selected by ``reward.reward_manager.{source=importlib, name=PuzzleRewardManager, module.path=pkg://recipe.cello1.reward_manager}``.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from recipe.cello1.scoring import MODES, score_answer
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

MODE_KEY = "cello1.reward"


class PuzzleRewardManager(RewardManagerBase):
    """Scores the text of a response against the gold answer of its puzzle.

    Parameters
    ----------
    config
        The training configuration; ``cello1.reward`` is ``dense`` (default) or ``sparse``.
    tokenizer
        Tokenizer of the policy.
    compute_score
        Must be ``None``: the scorer is this class's own.
    reward_router_address, reward_model_tokenizer
        Part of verl's interface; unused, there is no reward model.

    Raises
    ------
    ValueError
        If the reward is unknown, or a custom reward function is configured beside this manager.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ):
        super().__init__(config, tokenizer, compute_score)
        self.mode = config.get("cello1", {}).get("reward", "dense")
        if self.mode not in MODES:
            msg = f"{MODE_KEY} must be one of {', '.join(MODES)}, got {self.mode!r}"
            raise ValueError(msg)
        if config.reward.get("custom_reward_function", {}).get("path"):
            msg = (
                "reward.custom_reward_function.path is set, but PuzzleRewardManager scores by itself; "
                "set it to null, or choose another reward.reward_manager"
            )
            raise ValueError(msg)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score one response.

        Parameters
        ----------
        data
            The sequences of one rollout; the last one holds the answer. Reads ``responses`` (token ids, int64,
            ``(1, response_length)``), ``attention_mask`` and ``reward_model["ground_truth"]``.

        Returns
        -------
        ``reward_score``, and ``reward_extra_info`` with one float a metric (verl logs them for validation,
        :mod:`recipe.cello1.replay_buffer` for training).

        Raises
        ------
        ValueError
            If the gold answer is unusable: an error of the data, never a score.
        """
        item = data[-1:][0]
        response = item.batch["responses"]
        length = int(item.batch["attention_mask"][-response.shape[-1] :].sum())
        text = await self.loop.run_in_executor(
            None, lambda: self.tokenizer.decode(response[:length], skip_special_tokens=True)
        )
        score = score_answer(text, item.non_tensor_batch["reward_model"]["ground_truth"], self.mode)
        return {
            "reward_score": score.score,
            "reward_extra_info": {**score.metrics(), "acc": score.cell_accuracy},  # verl calls its core metric "acc"
        }
