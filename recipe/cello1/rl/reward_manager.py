"""verl reward manager: the scorer of :mod:`recipe.cello1.task.scoring` as the reward of each response.

The terms of :mod:`recipe.cello1.rl.shaping` that ``cello1.shaping`` turns on are added to it (none by default).

Selected by ``reward.reward_manager.{source=importlib, name=PuzzleRewardManager, module.path=pkg://recipe.cello1.rl.reward_manager}``.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.cello1.formats.chat_template import ResponseReader
from recipe.cello1.rl.shaping import question_candidates, read_shaping
from recipe.cello1.task.scoring import MODES, score_answer
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

MODE_KEY = "cello1.reward"


class PuzzleRewardManager(RewardManagerBase):
    """Scores the text of a response against the gold answer of its puzzle.

    Parameters
    ----------
    config
        The training configuration; ``cello1.reward`` is ``dense`` (default) or ``sparse``, ``cello1.shaping`` null
        (default) or the options of :func:`recipe.cello1.rl.shaping.read_shaping`.
    tokenizer
        Tokenizer of the policy.
    compute_score
        Must be ``None``: the scorer is this class's own.
    reward_router_address, reward_model_tokenizer
        Part of verl's interface; unused, there is no reward model.

    Raises
    ------
    ValueError
        If the reward is unknown, a shaping option is bad, or a custom reward function is configured beside this
        manager.
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
        self._read = ResponseReader(tokenizer)
        self.mode = config.get("cello1", {}).get("reward", "dense")
        if self.mode not in MODES:
            raise ValueError(f"{MODE_KEY} must be one of {', '.join(MODES)}, got {self.mode!r}")
        shaping = config.get("cello1", {}).get("shaping")
        self.shaping = read_shaping(
            OmegaConf.to_container(shaping, resolve=True) if OmegaConf.is_config(shaping) else shaping,
            config.get("data", {}).get("max_response_length"),
        )
        if config.reward.get("custom_reward_function", {}).get("path"):
            raise ValueError(
                "reward.custom_reward_function.path is set, but PuzzleRewardManager scores by itself; "
                "set it to null, or choose another reward.reward_manager"
            )

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score one response.

        Parameters
        ----------
        data
            The sequences of one rollout; the last one holds the answer. Reads ``prompts`` and ``responses`` (token
            ids, int64, ``(1, length)``), ``attention_mask`` and ``reward_model["ground_truth"]``; for ``legal`` and
            for credit of the candidate set also ``extra_info["question"]``.

        Returns
        -------
        ``reward_score``: the score and the shaped terms together. ``reward_extra_info``: the metrics of
        :mod:`recipe.cello1.task.scoring` as floats, ``score`` without the terms, and each term (verl logs them for
        validation, ``replay_buffer`` for training).

        Raises
        ------
        ValueError
            If the gold answer, or the question that a shaped term needs, is unusable: an error of the data, never a
            score.
        """
        item = data[-1:][0]
        response = item.batch["responses"]
        length = int(item.batch["attention_mask"][-response.shape[-1] :].sum())
        ids, prompt = response[:length].tolist(), item.batch["prompts"].tolist()
        text = await self.loop.run_in_executor(None, lambda: self._read.after(prompt, ids))
        extra = item.non_tensor_batch.get("extra_info") or {}
        asked: tuple[Any, Any] = extra.get("question"), extra.get("variant") or "batch"
        try:
            candidates = question_candidates(*asked)[0]
        except ValueError:  # an open-ended question; whatever needs the candidates says so below
            candidates = None
        score = score_answer(text, item.non_tensor_batch["reward_model"]["ground_truth"], self.mode, candidates)
        terms = self.shaping.terms(score, text, length, *asked) if self.shaping else {}
        return {
            "reward_score": score.score + sum(terms.values()),
            # verl calls its core metric "acc"
            "reward_extra_info": {**score.metrics(), "acc": score.partial_accuracy, **terms},
        }
