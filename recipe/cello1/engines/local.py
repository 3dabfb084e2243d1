"""What the engines that run a model in this process share: its folder, its prompts, and what room an answer has."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.cello1.engines.constrained import Vocabulary, matching_for, tokens_needed
from recipe.cello1.engines.protocol import Choice, EngineBase, Failure, Request, Sampling
from recipe.cello1.engines.token_tree import Context, TokenTree, token_tree
from recipe.cello1.formats.chat_template import ResponseReader, opened_by, prompt_ids, render_chat, with_prefix
from recipe.cello1.formats.model_folder import check_model_path, model_fingerprint, read_json_object

_DIGITS = 12  # of a fingerprint, which every prediction holds
_SCORED_TOGETHER = 64  # choices
_HIGHEST_RANK = 1 << 14


class Prompt(NamedTuple):
    """A request as the model gets it."""

    # Token ids of the prompt
    ids: list[int]
    # What the chat template has already put into the assistant's turn
    opened: str
    # Most tokens that the completion may have
    room: int


class LocalEngine(EngineBase):
    """The common part of the engines that load a model here."""

    can_score = True

    def __init__(self, model: str, lora: str | None) -> None:
        check_model_path(model)
        self.model = model
        self.fingerprint = model_fingerprint(model)[:_DIGITS]
        if lora is not None:
            lora_rank(lora)
            self.fingerprint += "+" + model_fingerprint(lora)[:_DIGITS]

    def _set_tokenizer(self, tokenizer: Any, max_len: int, constrained: bool) -> None:
        self._tokenizer = tokenizer
        self._max_len = max_len
        self._vocabulary = Vocabulary.from_tokenizer(tokenizer) if constrained else None
        self.constraint = "exact" if constrained else ""
        self._read = ResponseReader(tokenizer)

    def _prompt(self, request: Request, sampling: Sampling) -> Prompt | Failure:
        """Read a request, or say why it cannot be answered."""
        if request.prefix and request.n_answers:
            return Failure("a constrained answer cannot begin with a prefix; leave out one of them")
        try:
            text = render_chat(self._tokenizer, request.messages)
        except ValueError as error:
            return Failure(str(error))
        ids = prompt_ids(self._tokenizer, with_prefix(text, request.prefix))
        if len(ids) >= self._max_len:
            return Failure(f"the prompt is too long: the engine takes {self._max_len} tokens, the answer's included")
        room = min(sampling.max_tokens, self._max_len - len(ids))
        if fault := constraint_fault(self._vocabulary, request, room):
            return Failure(fault)
        return Prompt(ids, "" if request.prefix else opened_by(text), room)

    def _text(self, ids: Sequence[int], opened: str, constrained: bool, stop: str) -> str:
        """Read what a model has written; of a constrained answer, all bytes that the constraint has counted."""
        if constrained and self._vocabulary is not None:
            text = opened + self._vocabulary.text(ids)
        else:
            text = self._read(ids, opened)
        return text.partition(stop)[0] if stop else text

    def score(self, choices: Iterable[Choice]) -> Iterator[tuple[int, np.ndarray | Failure]]:
        """Compare texts, as :meth:`recipe.cello1.engines.protocol.Engine.score` says; not once it is closed."""
        waiting = enumerate(choices)
        while batch := list(islice(waiting, _SCORED_TOGETHER)):
            trees = [(i, self._tree(choice)) for i, choice in batch]
            contexts = [context for _, tree in trees if isinstance(tree, TokenTree) for context in tree.contexts]
            found = iter(self._next_logprobs(contexts))
            for position, tree in trees:
                if isinstance(tree, Failure):
                    yield position, tree
                    continue
                values = [next(found) for _ in tree.contexts]
                failure = next((value for value in values if isinstance(value, Failure)), None)
                yield position, failure or tree.total([value for value in values if not isinstance(value, Failure)])

    def _tree(self, choice: Choice) -> TokenTree | Failure:
        """Find what must be computed for a choice, or say why it cannot be."""
        try:
            text = with_prefix(render_chat(self._tokenizer, choice.messages), choice.prefix)
            texts = [prompt_ids(self._tokenizer, text + option) for option in choice.options]
            tree = token_tree(texts)
        except ValueError as error:
            return Failure(str(error))
        if max(map(len, texts)) > self._max_len:
            return Failure(f"the prompt is too long: the engine takes {self._max_len} tokens, the options' included")
        return tree

    def _next_logprobs(self, contexts: Sequence[Context]) -> Sequence[np.ndarray | Failure]:
        """Return the log-probabilities of the tokens behind each context."""
        raise NotImplementedError


def lora_rank(lora: str) -> int:
    """Read the rank of a LoRA adapter."""
    path = Path(lora) / "adapter_config.json"
    if not path.is_file():
        msg = f"lora: {lora} holds no adapter_config.json; give the folder of a LoRA adapter as PEFT saves it"
        raise FileNotFoundError(msg)
    rank = read_json_object(path).get("r")
    if not isinstance(rank, int) or not 0 < rank <= _HIGHEST_RANK:
        raise ValueError(f"lora: {path} has the rank r={rank!r:.80}; it must be from 1 to {_HIGHEST_RANK}")
    return rank


def cpu_dtype(model: str) -> str:
    """Choose the number format of a model on CPUs, the same for every engine."""
    import torch
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(model, trust_remote_code=False).dtype == torch.float32:
        return "float32"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "auto"
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "auto" if any(getattr(torch.cpu, check, bool)() for check in checks) else "float32"


def constraint_fault(vocabulary: Vocabulary | None, request: Request, room: int) -> str:
    """Say why a request's answer cannot be constrained."""
    if not request.n_answers:
        return ""
    if vocabulary is None:
        return "the engine was not started for constrained answers; start it with constrained=True"
    try:
        matching = matching_for(vocabulary, request.candidates, request.n_answers)
    except ValueError as error:
        return str(error)
    if (needed := tokens_needed(matching)) > room:
        return f"the answer may need {needed} tokens and there is room for {room}; give more max_tokens"
    return ""
