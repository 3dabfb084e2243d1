"""What the engines that run a model in this process share: its folder, its prompts, and what room an answer has."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipe.cello1.engines.constrained import Vocabulary, matching_for, tokens_needed
from recipe.cello1.engines.protocol import EngineBase, Failure, Message, Request, Sampling
from recipe.cello1.formats.model_folder import check_model_path, model_fingerprint
from recipe.cello1.task.answer import TAGS, THINK_OPEN

_DIGITS = 12  # of a fingerprint, which every prediction holds


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
        # Tags that are special tokens would be left out of the text.
        self._skip_special = not any(tag in tokenizer.all_special_tokens for tag in TAGS)

    def _prompt(self, request: Request, sampling: Sampling) -> Prompt | Failure:
        """Read a request, or say why it cannot be answered."""
        try:
            ids, opened = render_prompt(self._tokenizer, request.messages)
        except Exception as error:  # templates raise errors of their own, on message orders they do not allow
            return Failure(f"{type(error).__name__}: {error}")
        if len(ids) >= self._max_len:
            return Failure(f"the prompt is too long: the engine takes {self._max_len} tokens, the answer's included")
        room = min(sampling.max_tokens, self._max_len - len(ids))
        if fault := constraint_fault(self._vocabulary, request, room):
            return Failure(fault)
        return Prompt(ids, opened, room)


def lora_rank(lora: str) -> int:
    """Read the rank of a LoRA adapter."""
    path = Path(lora) / "adapter_config.json"
    if not path.is_file():
        msg = f"lora: {lora} holds no adapter_config.json; give the folder of a LoRA adapter as PEFT saves it"
        raise FileNotFoundError(msg)
    return int(json.loads(path.read_text())["r"])


def cpu_dtype(model: str) -> str:
    """Choose the number format of a model on CPUs, the same for every engine."""
    import torch
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(model).dtype == torch.float32:
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


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], str]:
    """Apply the chat template."""
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template; use a chat model, or add chat_template.jinja to its folder"
        raise ValueError(msg)
    text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens, so the tokenizer must not add its own.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    opened = text.rfind(THINK_OPEN) if text.rstrip().endswith(THINK_OPEN) else len(text)
    return ids, text[opened:]
