"""The bytes that each token of a Hugging Face tokenizer stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN, SEPARATOR, TAGS, THINK_CLOSE, THINK_OPEN


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Return the bytes of every token id, ``None`` for special tokens other than our tags."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        msg = f"{type(tokenizer).__name__} is not a fast tokenizer with a decoder; constrained decoding needs one"
        raise ValueError(msg)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so that an answer cannot end; set it")
    kinds = _decoder_kinds(json.loads(backend.decoder.__getstate__()))
    if "ByteLevel" in kinds:
        convert = _byte_level()
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        convert = _sentence_piece
    else:
        raise ValueError(f"tokenizers that decode by {' and '.join(kinds)} cannot be constrained, only byte-level ones")
    vocabulary = tokenizer.get_vocab()
    tokens: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for name, token_id in vocabulary.items():
        tokens[token_id] = convert(name)
    for token_id, added in tokenizer.added_tokens_decoder.items():
        is_text = not added.special or added.content in TAGS
        tokens[token_id] = added.content.encode() if is_text else None
    for token_id in tokenizer.all_special_ids:
        if tokens[token_id] is not None and tokens[token_id].decode(errors="replace") not in TAGS:
            tokens[token_id] = None
    _check_bytes(tokenizer, tokens)
    return tokens


def _decoder_kinds(state: Mapping[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [kind for part in state["decoders"] for kind in _decoder_kinds(part)]
    return [state["type"]]


def _byte_level() -> Any:
    """Return the inverse of GPT-2's table, which shows each byte as a printable character."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in shown}
    others = [byte for byte in range(256) if byte not in set(shown)]
    table |= {chr(256 + n): byte for n, byte in enumerate(others)}

    def convert(name: str) -> bytes | None:
        try:
            return bytes([table[character] for character in name])
        except KeyError:  # an added token; its text is taken from elsewhere
            return None

    return convert


def _sentence_piece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes((int(name[3:5], 16),))
    return name.replace("\u2581", " ").encode()


def _check_bytes(tokenizer: Any, tokens: Sequence[bytes | None]) -> None:
    text = f"{THINK_OPEN}CD4\u207a γδ T, 3  x{THINK_CLOSE}\n{ANSWER_OPEN}NK{SEPARATOR}B-1a{ANSWER_CLOSE}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = b"".join(tokens[i] or b"" for i in ids)
    # SentencePiece writes a blank before the first word.
    if found.removeprefix(b" ") != text.encode():
        msg = f"the tokenizer's tokens do not add up to the text ({found!r} for {text!r}); it cannot be constrained"
        raise ValueError(msg)
