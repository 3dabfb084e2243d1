"""The vLLM logits processor of :mod:`recipe.cello1.engines.constrained` (imports vLLM: load it by name only).

In process it is loaded by :class:`recipe.cello1.engines.vllm.VllmEngine`. For a server::

    vllm serve MODEL --logits-processors recipe.cello1.engines.constrained.vllm_processor:MatchingLogitsProcessor

and each request asks for it with ``vllm_xargs`` (``protocol.constraint_args``); other requests are
left alone.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeGuard

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from recipe.cello1.engines.constrained import Cursor, Vocabulary, mask_logits, matching_for
from recipe.cello1.engines.protocol import CANDIDATES_ARG, N_ANSWERS_ARG, REASONING_BUDGET_ARG
from recipe.cello1.task.answer import THINK_OPEN, type_fault

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)
_PROMPT_END = 16  # tokens at the end of the prompt, where the chat template may have put <think>


class _Row:
    """The cursor of one request, and how much of its output it has seen."""

    def __init__(self, cursor: Cursor, output: list[int]) -> None:
        self.cursor = cursor
        self.output = output  # vLLM goes on appending to this list

    def catch_up(self) -> None:
        if len(self.output) < self.cursor.n:  # vLLM has taken tokens back, to compute them again
            self.cursor = self.cursor.restarted()
        for token in self.output[self.cursor.n :]:
            if token >= 0:  # -1: not known yet
                self.cursor.advance(token)


class MatchingLogitsProcessor(LogitsProcessor):
    """Keeps requests that ask for it to a legal one-to-one matching."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._config = vllm_config.model_config
        self._vocabulary: Vocabulary | None = None  # made when first needed: it takes a moment for large vocabularies
        self._rows: dict[int, _Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse requests that cannot be met."""
        args = sampling_params.extra_args or {}
        if not any(name in args for name in (CANDIDATES_ARG, N_ANSWERS_ARG, REASONING_BUDGET_ARG)):
            return
        candidates, n_answers = args.get(CANDIDATES_ARG), args.get(N_ANSWERS_ARG)
        if not isinstance(candidates, list) or not candidates or not all(isinstance(c, str) for c in candidates):
            raise ValueError(f"{CANDIDATES_ARG} must be a list of cell types, got {candidates!r}")
        for name in candidates:
            if fault := type_fault(name):
                raise ValueError(f"{CANDIDATES_ARG}: {name!r} {fault}; rename it")
        if not _is_int(n_answers) or not 1 <= n_answers <= len({c.lower() for c in candidates}):
            msg = f"{N_ANSWERS_ARG} must be an integer between 1 and the number of candidates, got {n_answers!r}"
            raise ValueError(msg)
        budget = args.get(REASONING_BUDGET_ARG, 0)
        if not _is_int(budget) or budget < 0:
            raise ValueError(f"{REASONING_BUDGET_ARG} must be an integer of at least 0, got {budget!r}")

    def is_argmax_invariant(self) -> bool:
        """Return ``False``: the likeliest token may be forbidden."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take note of requests that come, go and move."""
        process_dict_updates(self._rows, batch_update, self._new_row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask the logits."""
        if self._rows:
            for row in self._rows.values():
                row.catch_up()
            mask_logits(logits, {index: row.cursor for index, row in self._rows.items()})
        return logits

    def _new_row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Row | None:
        if CANDIDATES_ARG not in (params.extra_args or {}):
            return None
        try:
            return self._constrained(params, prompt, output)
        except Exception:
            # An exception would end the engine, and with it everybody's requests. What only the vocabulary can tell (a
            # byte that no token stands for) shows here first. The row goes on free: who asks us checks the answer, and
            # to force an end instead could leave no token at all beside another processor (min_tokens).
            logger.exception("a request cannot be constrained; it is answered without the constraint")
            return None

    def _constrained(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Row:
        args = params.extra_args or {}
        if self._vocabulary is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                self._config.tokenizer,
                revision=self._config.tokenizer_revision,
                trust_remote_code=self._config.trust_remote_code,
            )
            self._vocabulary = Vocabulary.from_tokenizer(tokenizer)
        matching = matching_for(self._vocabulary, tuple(args[CANDIDATES_ARG]), int(args[N_ANSWERS_ARG]))
        budget = args.get(REASONING_BUDGET_ARG)
        room = self._config.max_model_len - len(prompt or ())
        limit = min(room, params.max_tokens or room)
        end = self._vocabulary.text(prompt[-_PROMPT_END:]) if prompt else ""
        opened = end.rstrip().endswith(THINK_OPEN)
        return _Row(Cursor(matching, limit, None if budget is None else int(budget), opened), output)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
