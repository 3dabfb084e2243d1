"""The vocabulary of a model as bytes: which tokens a text begins with, and which ones write a tag."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from recipe.cello1.engines.constrained.tokens import token_bytes
from recipe.cello1.task.answer import TAGS, THINK_CLOSE, THINK_OPEN, THINK_TO_ANSWER

if TYPE_CHECKING:
    import torch

OPEN = THINK_OPEN.encode()
CLOSE_THINK = THINK_CLOSE.encode()
JOINT = THINK_TO_ANSWER.encode()
_TAGS = tuple(tag.encode() for tag in TAGS)
# Where a tag may have begun: every beginning of a tag. Tags start with "<" and have no other.
_BEGINNINGS = frozenset(tag[:end] for tag in _TAGS for end in range(1, len(tag)))

_REMEMBERED = 1 << 17  # spellings
_HEAD = 3  # bytes
LONGEST = 32  # bytes; longer tokens do not count when looking for the shortest spelling


class Vocabulary:
    """The bytes of every token."""

    def __init__(self, tokens: Sequence[bytes | None], eos: int) -> None:
        self.tokens = [token or None for token in tokens]
        self.eos = eos
        table: dict[bytes, list[int]] = {}
        for token_id, token in enumerate(self.tokens):
            if token is not None and token_id != eos:
                table.setdefault(token, []).append(token_id)
        # Tuples, which the garbage collector need not walk through in the middle of an answer.
        self.table = {key: tuple(ids) for key, ids in table.items()}
        self.keys = sorted(table)
        # How long the tokens with the same first bytes are at most, so that spelling looks no further.
        self._reach: dict[bytes, int] = {}
        for key in self.keys:
            self._reach[key[:_HEAD]] = min(LONGEST, max(len(key), self._reach.get(key[:_HEAD], 0)))
        self.ids = [self.table[key] for key in self.keys]
        self.silent = [i for i, token in enumerate(self.tokens) if token is None or i == eos]
        # Tokens after which a tag may be under way; all others cannot matter to free text.
        self.openers = frozenset(i for key, ids in table.items() if b"<" in key for i in ids)
        self._with_tag = [key for key in self.keys if any(tag in key for tag in _TAGS)]
        self._free: dict[bytes, tuple[tuple[int, ...], tuple[tuple[int, bytes], ...]]] = {}
        self._opening: dict[int, tuple[int, ...]] = {}
        self._silent_ids: dict[tuple[int, Any], torch.Tensor] = {}
        self._spellings: dict[bytes, tuple[int, int]] = {b"": (0, -1)}

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read the vocabulary of a tokenizer; done once for each."""
        found = _KNOWN.get(tokenizer)
        if found is None:
            found = cls(token_bytes(tokenizer), tokenizer.eos_token_id)
            _KNOWN[tokenizer] = found
        return found

    def silent_ids(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the ids that stand for no text, those that the model has beyond the tokenizer's included."""
        import torch

        key = (logits.shape[1], logits.device)
        if key not in self._silent_ids:
            ids = [*(i for i in self.silent if i < key[0]), *range(len(self.tokens), key[0])]
            self._silent_ids[key] = torch.tensor(ids, dtype=torch.long, device=logits.device)
        return self._silent_ids[key]

    def text(self, ids: Iterable[int]) -> str:
        """Decode, exactly as the constraint sees the text."""
        parts = [self.tokens[i] or b"" for i in ids if i != self.eos and i < len(self.tokens)]
        return b"".join(parts).decode(errors="replace")

    def shortest(self, text: bytes) -> tuple[int, int]:
        """Find the shortest spelling of a text."""
        if text not in self._spellings:
            self._spell(text)
        return self._spellings[text]

    def _spell(self, text: bytes) -> None:
        """Find the shortest spellings of a text and all its ends: what is left of a label under way is one of them."""
        if len(self._spellings) > _REMEMBERED:
            self._spellings = {b"": (0, -1)}
        table = self.table
        cost = [0] * (len(text) + 1)
        first = b""
        for start in range(len(text) - 1, -1, -1):
            best = len(text) + 1
            reach = self._reach.get(text[start : start + _HEAD], _HEAD)
            for end in range(start + 1, min(start + reach, len(text)) + 1):
                if cost[end] < best and text[start:end] in table:
                    best, first = cost[end], text[start:end]
            cost[start] = best + 1
            self._spellings[text[start:]] = cost[start], table[first][0]

    def starting_with(self, start: bytes) -> list[tuple[bytes, tuple[int, ...]]]:
        """Find the tokens that begin with some bytes."""
        low = bisect_left(self.keys, start)
        high = run_end(self.keys, start, low, len(self.keys))
        return list(zip(self.keys[low:high], self.ids[low:high], strict=True))

    def within(self, text: bytes) -> list[int]:
        """Find the tokens that a text begins with."""
        return [i for end in range(1, len(text) + 1) for i in self.table.get(text[:end], ())]

    def opening(self, offset: int) -> tuple[int, ...]:
        """Find the tokens that may follow the first ``offset`` bytes of ``<think>``."""
        if offset not in self._opening:
            rest = OPEN[offset:]
            found = self.within(rest[:-1])
            for token, ids in self.starting_with(rest):
                if first_tag(token[len(rest) :])[1] is None:
                    found += ids
            self._opening[offset] = tuple(found)
        return self._opening[offset]

    def tags_after(self, tail: bytes) -> tuple[tuple[int, ...], tuple[tuple[int, bytes], ...]]:
        r"""Find the tokens that would complete a tag in the reasoning."""
        if tail not in self._free:
            critical = dict.fromkeys(self._with_tag)
            for written in _TAGS:
                if tail and written.startswith(tail):
                    critical |= dict.fromkeys(key for key, _ in self.starting_with(written[len(tail) :]))
            banned: list[int] = []
            open_cases: list[tuple[int, bytes]] = []
            for key in critical:
                at, tag = first_tag(tail + key)
                if tag == CLOSE_THINK:
                    rest = (tail + key)[at:]
                    if JOINT.startswith(rest):
                        continue
                    if rest.startswith(JOINT):
                        open_cases += [(i, rest[len(JOINT) :]) for i in self.table[key]]
                        continue
                banned += self.table[key]
            self._free[tail] = tuple(banned), tuple(open_cases)
        return self._free[tail]


_KNOWN: weakref.WeakKeyDictionary[Any, Vocabulary] = weakref.WeakKeyDictionary()


def run_end(keys: Sequence[bytes], start: bytes, low: int, high: int) -> int:
    """Return the end of the run of keys that begin with ``start``."""
    last = start[-1]
    return high if last == 255 else bisect_left(keys, start[:-1] + bytes((last + 1,)), low, high)


def first_tag(text: bytes) -> tuple[int, bytes | None]:
    """Return the first tag with its position, -1 and ``None`` for none."""
    found = [(at, tag) for tag in _TAGS if (at := text.find(tag)) >= 0]
    return min(found, default=(-1, None))


def tail_of(text: bytes) -> bytes:
    """Return the beginning of a tag that a text ends with."""
    at = text.rfind(b"<")
    return text[at:] if at >= 0 and text[at:] in _BEGINNINGS else b""
