"""What a model is asked, in its own chat template, and which text is its response: the same for training and asking.

Templates of reasoning models open ``<think>`` themselves (Qwen3 Thinking, QwQ, distillations of R1). The model writes
what follows, and the response is both together. Other tokenizers have ``<think>`` as a special token, which a decoder
that leaves special tokens out would lose. SFT, reward and engines all go through this module.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from recipe.cello1.formats.memory import limited_memory
from recipe.cello1.task.answer import TAGS, THINK_OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_BACK = 16  # tokens of a prompt that may hold what the template has opened
# For one prompt: a template is a program, of whoever made the model.
_TIME_LIMIT_S = 20
_MEMORY_LIMIT = 1 << 30  # bytes
_MOST_ADDED = 1 << 20  # characters, beside what the messages have


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Write messages as the text of a prompt, or say why the template cannot."""
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template; use a chat model, or add chat_template.jinja to its folder"
        raise ValueError(msg)
    try:
        with _limits():
            text = tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
            )
        if len(text) > _MOST_ADDED + 4 * sum(len(m["content"]) for m in messages):
            raise ValueError(f"it makes {len(text):,} characters of them")
        return text
    except Exception as error:  # templates raise errors of their own, on roles they do not know for example
        remedy = "; set prompt_layout=user" if any(m["role"] == "system" for m in messages) else ""
        reason = " ".join(str(error).split()) or f"it takes more than {_MEMORY_LIMIT >> 20} MiB"
        raise ValueError(
            f"the model's chat template cannot be applied to {'/'.join(m['role'] for m in messages)}: {reason}{remedy}"
        ) from error


@contextmanager
def _limits() -> Iterator[None]:
    """Stop what takes too long or too much memory; only the main thread has the means."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(signal_number: int, frame: object) -> None:
        raise TimeoutError(f"it is not done after {_TIME_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _TIME_LIMIT_S)
    try:
        with limited_memory(_MEMORY_LIMIT):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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

    def __call__(self, ids: Sequence[int], opened: str = "") -> str:
        """Return the response: what the template had opened, then what the model wrote."""
        kept = [token for token in ids if token not in self._left_out]
        return opened + self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

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
    with _limits():
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(probe)[2].strip()
    ids = prompt_ids(tokenizer, rest)
    if not ids or ids[0] not in special_ids(tokenizer):
        msg = f"the chat template ends a turn with {rest!r}, which is no special token; a model could not learn to stop"
        raise ValueError(msg)
    return tokenizer.convert_ids_to_tokens(ids[0])
