"""What a model is asked, in its own chat template, and which text is its response: the same for training and asking.

Templates of reasoning models open ``<think>`` themselves (Qwen3 Thinking, QwQ, distillations of R1). The model writes
what follows, and the response is both together. Other tokenizers have ``<think>`` as a special token, which a decoder
that leaves special tokens out would lose. SFT, reward and engines all go through this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipe.cello1.task.answer import ANSWER_OPEN, TAGS, THINK_CLOSE, THINK_OPEN, THINK_TO_ANSWER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_BACK = 16  # tokens of a prompt that may hold what the template has opened


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Write messages as the text of a prompt, or say why the template cannot."""
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template; use a chat model, or add chat_template.jinja to its folder"
        raise ValueError(msg)
    from recipe.cello1.formats.template_limits import MOST_ADDED, TemplateLimitError, limit_templates

    limit_templates()
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
        if len(text) > MOST_ADDED + 4 * sum(len(m["content"]) for m in messages):
            raise ValueError(f"it makes {len(text):,} characters of them")
        if left := [m["role"] for m in messages if max(m["content"].split() or [""], key=len) not in text]:
            raise ValueError(f"it leaves out what the {left[0]} says")
        return text
    except Exception as error:  # templates raise errors of their own, on roles they do not know for example
        other = "mend the template, or take another model"
        no_role = not isinstance(error, TemplateLimitError) and any(m["role"] == "system" for m in messages)
        remedy = "set prompt_layout=user" if no_role else other
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = "/".join(m["role"] for m in messages)
        raise ValueError(f"the model's chat template cannot be applied to {roles}: {reason}; {remedy}") from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Give the tokens of a prompt; the template has written the special ones, so that none are added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def opened_by(text: str) -> str:
    """Find what a prompt has already put into the response: ``<think>`` and white space at its end, or nothing."""
    return text[text.rfind(THINK_OPEN) :] if text.rstrip().endswith(THINK_OPEN) else ""


def with_prefix(text: str, prefix: str) -> str:
    """Let the response to a prompt begin with a text, of which the template may have opened the start already."""
    opened = opened_by(text)
    return (text.removesuffix(opened) if prefix.startswith(opened.rstrip()) else text) + prefix


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Give all special tokens, also those that only the list of added tokens marks as such."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset({*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)})


class ResponseReader:
    """Reads the text of responses from their tokens: without special tokens, but with the tags of an answer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        special = special_ids(tokenizer)
        self._left_out = frozenset(i for i in special if tokenizer.convert_ids_to_tokens(i) not in TAGS)
        # Tags that are tokens may lose the white space beside them, or gain some; what was one newline is read as that.
        self._joint = THINK_TO_ANSWER
        if {THINK_CLOSE, ANSWER_OPEN} & {
            str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        }:
            before, opened, _ = self(prompt_ids(tokenizer, f"a{THINK_TO_ANSWER}b")).partition(ANSWER_OPEN)
            self._joint = before[before.find(THINK_CLOSE) :] + opened

    def __call__(self, ids: Sequence[int], opened: str = "") -> str:
        """Return the response: what the template had opened, then what the model wrote."""
        kept = [token for token in ids if token not in self._left_out]
        text = self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return opened + text.replace(self._joint, THINK_TO_ANSWER)

    def after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the response to a prompt that is known by its tokens."""
        return self(ids, opened_by(self._tokenizer.decode(list(prompt[-_LOOK_BACK:]), skip_special_tokens=False)))


def completion_of(response: str, opened: str) -> str:
    """Give the part of a response that the model itself has to write."""
    return response.removeprefix(THINK_OPEN).lstrip() if opened else response


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the text that ends a turn of the assistant in a chat template (``<|im_end|>`` for Qwen)."""
    probe = "0123456789"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    render_chat(tokenizer, turns[:1])
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(probe)[2].strip()
    ids = prompt_ids(tokenizer, rest)
    if not ids or ids[0] not in special_ids(tokenizer):
        msg = f"the chat template ends a turn with {rest!r}, which is no special token; a model could not learn to stop"
        raise ValueError(msg)
    return tokenizer.convert_ids_to_tokens(ids[0])
