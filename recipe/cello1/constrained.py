r"""Decoding that can only end in a legal answer: the reasoning is free, the answer a one-to-one matching.

A completion under the constraint is ``<think>``, any text without a tag, ``</think>\n<answer>``, different candidates
with the separator between them, ``</answer>`` and the end of the turn. The constraint is one on *text*, not on tokens:
a token is admitted if what has been written, followed by that token's bytes, is still the beginning of such a text. So
it does not matter how the tokenizer cuts labels, whether a token spans a label and a separator (or ``</think`` and the
line break), whether one candidate begins like another, or whether a character takes several tokens. The model may write
a label in any spelling the vocabulary has, its usual one included.

- :class:`Vocabulary` knows the bytes of every token; made once for a tokenizer.
- :class:`Matching` knows the legal texts for one list of candidates; shared by all completions that have that list.
- :class:`Cursor` follows one completion and tells which tokens may come next.
- :func:`mask_logits` applies that to a batch of logits, for vLLM and transformers alike.

Room: reasoning that goes on too long is closed (``</think>``) in time for the answer, or earlier if a budget is given.
If the model wants to end its turn within the reasoning, it closes the reasoning instead.
"""

from __future__ import annotations

import json
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any

from recipe.cello1.answer import ANSWER_CLOSE, ANSWER_OPEN, SEPARATOR, TAGS, THINK_CLOSE, THINK_OPEN, type_fault

if TYPE_CHECKING:
    import torch

_OPEN = THINK_OPEN.encode()
_CLOSE_THINK = THINK_CLOSE.encode()
_JOINT = f"{THINK_CLOSE}\n{ANSWER_OPEN}".encode()
_SEPARATOR = SEPARATOR.encode()
_CLOSE_ANSWER = ANSWER_CLOSE.encode()
_TAGS = tuple(tag.encode() for tag in TAGS)
# Where a tag may have begun: every beginning of a tag. Tags start with "<" and have no other.
_BEGINNINGS = frozenset(tag[:end] for tag in _TAGS for end in range(1, len(tag)))

_LONGEST = 32  # bytes; longer tokens do not count when looking for the shortest spelling
_SLACK = _LONGEST + 8  # tokens; an awkward spelling can cost no more than this before it is noticed

# Kinds of position in a text, see Matching.
_LITERAL, _LABEL, _SEP, _END_TAG, _END = range(5)
_TEXTS = {_LITERAL: _JOINT, _SEP: _SEPARATOR, _END_TAG: _CLOSE_ANSWER}
_Item = tuple[int, int, int]  # kind, position (in the text, or node of the label trie), labels used so far (bits)


class Vocabulary:
    """The bytes of every token.

    Parameters
    ----------
    tokens
        For each token id its bytes; ``None`` for tokens that stand for no text (special tokens, gaps).
    eos
        Id of the token that ends the model's turn.
    """

    def __init__(self, tokens: Sequence[bytes | None], eos: int) -> None:
        self.tokens = [token or None for token in tokens]
        self.eos = eos
        table: dict[bytes, list[int]] = {}
        for token_id, token in enumerate(self.tokens):
            if token is not None and token_id != eos:
                table.setdefault(token, []).append(token_id)
        self.table = table
        self.keys = sorted(table)
        self.ids = [table[key] for key in self.keys]
        self.silent = [i for i, token in enumerate(self.tokens) if token is None or i == eos]
        # Tokens after which a tag may be under way; all others cannot matter to free text.
        self.openers = frozenset(i for key, ids in table.items() if b"<" in key for i in ids)
        self._with_tag = [key for key in self.keys if any(tag in key for tag in _TAGS)]
        self._free: dict[bytes, tuple[tuple[int, ...], tuple[tuple[int, bytes], ...]]] = {}
        self._opening: dict[int, tuple[int, ...]] = {}
        self._silent_ids: dict[tuple[int, Any], torch.Tensor] = {}
        self.shortest = lru_cache(maxsize=1 << 14)(self._shortest)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read the vocabulary of a tokenizer; done once for each.

        Parameters
        ----------
        tokenizer
            A Hugging Face tokenizer: byte-level BPE, or SentencePiece-like with byte fallback.

        Returns
        -------
        The vocabulary.

        Raises
        ------
        ValueError
            If the tokenizer is of another kind.
        """
        found = _KNOWN.get(tokenizer)
        if found is None:
            found = cls(_token_bytes(tokenizer), tokenizer.eos_token_id)
            _KNOWN[tokenizer] = found
        return found

    def silent_ids(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the ids that stand for no text, those that the model has beyond the tokenizer's included.

        Parameters
        ----------
        logits
            Tensor of shape (rows, vocabulary).

        Returns
        -------
        int64 tensor on the same device.
        """
        import torch

        key = (logits.shape[1], logits.device)
        if key not in self._silent_ids:
            ids = [*(i for i in self.silent if i < key[0]), *range(len(self.tokens), key[0])]
            self._silent_ids[key] = torch.tensor(ids, dtype=torch.long, device=logits.device)
        return self._silent_ids[key]

    def text(self, ids: Iterable[int]) -> str:
        """Decode, exactly as the constraint sees the text.

        Parameters
        ----------
        ids
            Token ids.

        Returns
        -------
        The text; special tokens stand for none.
        """
        parts = [self.tokens[i] or b"" for i in ids if i != self.eos and i < len(self.tokens)]
        return b"".join(parts).decode(errors="replace")

    def _shortest(self, text: bytes) -> tuple[int, int]:
        """Return how many tokens the shortest spelling of a text has, and the first of them (-1 for no text)."""
        table = self.table
        cost = [0] * (len(text) + 1)
        first = b""
        for start in range(len(text) - 1, -1, -1):
            best = len(text) + 1
            for end in range(start + 1, min(start + _LONGEST, len(text)) + 1):
                if cost[end] < best and text[start:end] in table:
                    best, first = cost[end], text[start:end]
            cost[start] = best + 1
        return cost[0], table[first][0] if text else -1

    def starting_with(self, start: bytes) -> list[tuple[bytes, list[int]]]:
        """Find the tokens that begin with some bytes.

        Parameters
        ----------
        start
            The bytes, at least one.

        Returns
        -------
        Bytes and ids of each token.
        """
        low = bisect_left(self.keys, start)
        high = _after(self.keys, start, low, len(self.keys))
        return list(zip(self.keys[low:high], self.ids[low:high], strict=True))

    def within(self, text: bytes) -> list[int]:
        """Find the tokens that a text begins with.

        Parameters
        ----------
        text
            The text.

        Returns
        -------
        Token ids.
        """
        return [i for end in range(1, len(text) + 1) for i in self.table.get(text[:end], ())]

    def opening(self, offset: int) -> tuple[int, ...]:
        """Find the tokens that may follow the first ``offset`` bytes of ``<think>``.

        Parameters
        ----------
        offset
            Bytes written of the tag.

        Returns
        -------
        Token ids.
        """
        if offset not in self._opening:
            rest = _OPEN[offset:]
            found = self.within(rest[:-1])
            for token, ids in self.starting_with(rest):
                if _first_tag(token[len(rest) :])[1] is None:
                    found += ids
            self._opening[offset] = tuple(found)
        return self._opening[offset]

    def tags_after(self, tail: bytes) -> tuple[tuple[int, ...], tuple[tuple[int, bytes], ...]]:
        r"""Find the tokens that would complete a tag in the reasoning.

        Parameters
        ----------
        tail
            The beginning of a tag that the reasoning ends with, or nothing.

        Returns
        -------
        Ids of tokens that must not come, and (id, bytes) of those that write all of ``</think>\n<answer>`` and more,
        for which the candidates decide.
        """
        if tail not in self._free:
            critical = dict.fromkeys(self._with_tag)
            for tag in _TAGS:
                if tail and tag.startswith(tail):
                    critical |= dict.fromkeys(key for key, _ in self.starting_with(tag[len(tail) :]))
            banned: list[int] = []
            open_cases: list[tuple[int, bytes]] = []
            for key in critical:
                at, tag = _first_tag(tail + key)
                if tag == _CLOSE_THINK:
                    rest = (tail + key)[at:]
                    if _JOINT.startswith(rest):
                        continue
                    if rest.startswith(_JOINT):
                        open_cases += [(i, rest[len(_JOINT) :]) for i in self.table[key]]
                        continue
                banned += self.table[key]
            self._free[tail] = tuple(banned), tuple(open_cases)
        return self._free[tail]


_KNOWN: weakref.WeakKeyDictionary[Any, Vocabulary] = weakref.WeakKeyDictionary()


def _after(keys: Sequence[bytes], start: bytes, low: int, high: int) -> int:
    """Return the end of the run of keys that begin with ``start``."""
    last = start[-1]
    return high if last == 255 else bisect_left(keys, start[:-1] + bytes((last + 1,)), low, high)


def _first_tag(text: bytes) -> tuple[int, bytes | None]:
    found = [(at, tag) for tag in _TAGS if (at := text.find(tag)) >= 0]
    return min(found, default=(-1, None))


def _tail_of(text: bytes) -> bytes:
    """Return the beginning of a tag that a text ends with."""
    at = text.rfind(b"<")
    return text[at:] if at >= 0 and text[at:] in _BEGINNINGS else b""


_State = tuple[_Item, ...]  # several items: what follows decides (a label, or a longer one)


@dataclass(slots=True)
class _Continuations:
    """The tokens that go on with some literal text and then a label from a node of the trie on.

    Attributes
    ----------
    literal
        Ids of tokens that end within the literal text or at its end.
    inside
        Tokens that end within a label or at its end: bits of the labels that then can come, ids.
    beyond
        Tokens that go on after a label: its bit, what they write after it, ids.
    """

    literal: list[int]
    inside: list[tuple[int, list[int]]]
    beyond: list[tuple[int, bytes, list[int]]]


class Matching:
    r"""The legal texts from ``</think>`` on, for one list of candidates: an automaton over bytes.

    Parameters
    ----------
    vocabulary
        The tokens.
    candidates
        Candidate types. Scoring ignores case, so of two that differ only in case at most one is written.
    n_answers
        Types to write, at most as many as there are candidates.

    Raises
    ------
    ValueError
        If there are too few candidates, a candidate cannot stand in an answer, or the vocabulary cannot spell one.
    """

    def __init__(self, vocabulary: Vocabulary, candidates: Sequence[str], n_answers: int) -> None:
        for label in candidates:
            if fault := type_fault(label):
                msg = f"candidates: {label!r} {fault}; rename it"
                raise ValueError(msg)
        groups = {name: bit for bit, name in enumerate(dict.fromkeys(label.lower() for label in candidates))}
        if not 1 <= n_answers <= len(groups):
            msg = f"n_answers is {n_answers}, but there are {len(groups)} different candidates (case is ignored)"
            raise ValueError(msg)
        labels = list(dict.fromkeys(candidates))
        for text in (THINK_OPEN, THINK_CLOSE + "\n" + ANSWER_OPEN, SEPARATOR, ANSWER_CLOSE, *labels):
            if missing := [byte for byte in text.encode() if bytes((byte,)) not in vocabulary.table]:
                msg = f"the tokenizer has no token for the byte {missing[0]} of {text!r}; it cannot be constrained"
                raise ValueError(msg)
        self.vocabulary = vocabulary
        self.n_answers = n_answers
        self._bits = [1 << groups[label.lower()] for label in labels]
        self._labels = [label.encode() for label in labels]
        # The trie of the labels. `_under`: the labels at or below a node, `_below`: their bits.
        self._children: list[dict[int, int]] = [{}]
        self._ends: list[int] = [-1]
        self._below: list[int] = [0]
        self._under: list[list[int]] = [[]]
        self._depth: list[int] = [0]
        for number, label in enumerate(self._labels):
            self._insert(number, label)
        spell = vocabulary.shortest
        self._unit = [max(spell(label + end)[0] for end in (_SEPARATOR, _CLOSE_ANSWER)) for label in self._labels]
        self._by_cost = sorted(range(len(labels)), key=lambda i: -self._unit[i])
        self._continuations: dict[tuple[bytes, int], _Continuations] = {}
        self._bans: dict[bytes, tuple[int, ...]] = {}
        self.forced: _State = ((_LITERAL, 0, 0),)
        self.closed: _State = ((_LITERAL, len(_CLOSE_THINK), 0),)
        self.least = self.need(self.forced)
        # A model's own spelling is seldom the shortest: leave it some room.
        self.reserve = ceil(1.25 * self.least) + _SLACK

    def _insert(self, number: int, label: bytes) -> None:
        node = 0
        for depth, byte in enumerate(label, start=1):
            self._below[node] |= self._bits[number]
            self._under[node].append(number)
            if byte not in self._children[node]:
                self._children[node][byte] = len(self._children)
                self._children.append({})
                self._ends.append(-1)
                self._below.append(0)
                self._under.append([])
                self._depth.append(depth)
            node = self._children[node][byte]
        self._below[node] |= self._bits[number]
        self._under[node].append(number)
        self._ends[node] = number

    # ------------------------------------------------------------------------------------------------ automaton

    def run(self, state: _State, text: bytes) -> _State:
        """Follow a text.

        Parameters
        ----------
        state
            Where to start.
        text
            What is written.

        Returns
        -------
        Where one is then; empty if the text is not legal there.
        """
        for byte in text:
            if len(state) == 1:
                state = self._step(state[0], byte)
            else:
                state = tuple([after for item in state for after in self._step(item, byte)])
        return state

    def _step(self, item: _Item, byte: int) -> _State:
        kind, at, used = item
        if kind == _LABEL:
            node = self._children[at].get(byte)
            return () if node is None else self._enter(node, used)
        if kind == _END:
            return ()
        text = _TEXTS[kind]
        if text[at] != byte:
            return ()
        if at + 1 < len(text):
            return ((kind, at + 1, used),)
        return ((_END, 0, used),) if kind == _END_TAG else ((_LABEL, 0, used),)

    def _enter(self, node: int, used: int) -> _State:
        """Return where one is on a node of the label trie; nothing if only used labels lie there."""
        if not self._below[node] & ~used:
            return ()
        number = self._ends[node]
        if number < 0:
            return ((_LABEL, node, used),)
        items: _State = ()
        if any(self._below[child] & ~used for child in self._children[node].values()):
            items = ((_LABEL, node, used),)
        if not self._bits[number] & used:
            written = used | self._bits[number]
            items += ((self._after_label(written), 0, written),)
        return items

    def _after_label(self, used: int) -> int:
        return _END_TAG if used.bit_count() == self.n_answers else _SEP

    # --------------------------------------------------------------------------------------------------- tokens

    def allowed(self, state: _State) -> list[int]:
        """Find the tokens that may come next.

        Parameters
        ----------
        state
            Where one is.

        Returns
        -------
        Token ids, at least one.
        """
        found: list[int] = []
        for kind, at, used in state:
            if kind == _LABEL:
                found += self._label_tokens(b"", at, used)
            elif kind == _END:
                found.append(self.vocabulary.eos)
            elif kind == _END_TAG:
                found += self.vocabulary.within(_CLOSE_ANSWER[at:])
            else:
                found += self._label_tokens(_TEXTS[kind][at:], 0, used)
        return found if len(state) == 1 else list(dict.fromkeys(found))

    def _label_tokens(self, literal: bytes, node: int, used: int) -> list[int]:
        """Find the tokens that go on with a literal text and then with a label."""
        key = (literal, node)
        if key not in self._continuations:
            self._continuations[key] = self._walk(literal, node)
        table = self._continuations[key]
        found = list(table.literal)
        for bits, ids in table.inside:
            if bits & ~used:
                found += ids
        for bit, text, ids in table.beyond:
            if not bit & used and self._goes_on(used | bit, text):
                found += ids
        return found

    def _goes_on(self, used: int, text: bytes) -> bool:
        """Tell whether a text may follow a label."""
        return bool(self.run(((self._after_label(used), 0, used),), text))

    def _walk(self, literal: bytes, node: int) -> _Continuations:
        """Walk the sorted vocabulary and the label trie side by side."""
        keys, ids = self.vocabulary.keys, self.vocabulary.ids
        table = _Continuations(self.vocabulary.within(literal), [], [])
        low, high = 0, len(keys)
        if literal:
            low = bisect_left(keys, literal)
            high = _after(keys, literal, low, high)
        stack = [(literal, node, low, high)]
        while stack:
            text, here, low, high = stack.pop()
            if self._ends[here] >= 0:
                bit = self._bits[self._ends[here]]
                for end in (_SEPARATOR, _CLOSE_ANSWER):
                    first = text + end[:1]
                    start = bisect_left(keys, first, low, high)
                    for i in range(start, _after(keys, first, start, high)):
                        after = keys[i][len(text) :]
                        if end.startswith(after) or after.startswith(_SEPARATOR):
                            table.beyond.append((bit, after, ids[i]))
            for byte, child in self._children[here].items():
                longer = text + bytes((byte,))
                start = bisect_left(keys, longer, low, high)
                if start < high and keys[start].startswith(longer):
                    if keys[start] == longer:
                        table.inside.append((self._below[child], ids[start]))
                    stack.append((longer, child, start, _after(keys, longer, start, high)))
        return table

    @staticmethod
    def at_end(state: _State) -> bool:
        """Tell whether the answer is complete.

        Parameters
        ----------
        state
            Where one is.

        Returns
        -------
        Whether only the end of the turn may follow.
        """
        return state[0][0] == _END

    # ----------------------------------------------------------------------------------------------------- room

    def _remainders(self, state: _State) -> Iterator[tuple[bytes, int]]:
        """Give what is left of the label, separator or tag under way, and the labels used after it."""
        for kind, at, used in state:
            if kind == _LABEL:
                for number in self._under[at]:
                    if not self._bits[number] & used:
                        written = used | self._bits[number]
                        yield self._labels[number][self._depth[at] :] + _TEXTS[self._after_label(written)], written
            elif kind != _END:
                yield _TEXTS[kind][at:], used

    def _rest(self, used: int) -> int:
        """Bound the tokens for the labels still to come, each in its shortest spelling, and the end of the turn."""
        left = self.n_answers - used.bit_count()
        total = 1
        for number in self._by_cost:
            if not left:
                break
            if not self._bits[number] & used:
                total += self._unit[number]
                left -= 1
        return total

    def need(self, state: _State) -> int:
        """Bound the tokens it takes to end from here when the shortest spellings are used.

        Parameters
        ----------
        state
            Where one is.

        Returns
        -------
        Tokens, the end of the turn included.
        """
        spell = self.vocabulary.shortest
        return max((spell(text)[0] + self._rest(used) for text, used in self._remainders(state)), default=1)

    def tight(self, state: _State, room: int) -> list[int]:
        """Find the tokens that begin the shortest spellings of what still fits.

        If what is left fits by its shortest spelling before such a token, it does so after it.

        Parameters
        ----------
        state
            Where one is.
        room
            Tokens that may still come.

        Returns
        -------
        Token ids, at least one.
        """
        if self.at_end(state):
            return [self.vocabulary.eos]
        found: dict[int, int] = {}
        for text, used in self._remainders(state):
            cost, token = self.vocabulary.shortest(text)
            cost += self._rest(used)
            found[token] = min(cost, found.get(token, cost))
        fitting = [token for token, cost in found.items() if cost <= room]
        return fitting or [min(found, key=lambda token: found[token])]

    def bans(self, tail: bytes) -> tuple[int, ...]:
        """Find the tokens that must not come in the reasoning, beside those that stand for no text.

        Parameters
        ----------
        tail
            The beginning of a tag that the reasoning ends with.

        Returns
        -------
        Token ids.
        """
        if tail not in self._bans:
            banned, open_cases = self.vocabulary.tags_after(tail)
            root: _State = ((_LABEL, 0, 0),)
            self._bans[tail] = banned + tuple(i for i, rest in open_cases if not self.run(root, rest))
        return self._bans[tail]


_OPENING, _THINKING, _ANSWERING, _LOST = range(4)


class Cursor:
    """Follows one completion.

    Parameters
    ----------
    matching
        The legal answers.
    limit
        Most tokens the completion may have.
    reasoning_budget
        Most tokens of reasoning; ``None``: as many as leave room for the answer.
    opened
        Whether the prompt ends with ``<think>`` already.
    """

    __slots__ = (
        "_arguments",
        "_budget",
        "_limit",
        "_matching",
        "_offset",
        "_phase",
        "_reasoning",
        "_state",
        "_tail",
        "n",
    )

    def __init__(
        self, matching: Matching, limit: int, reasoning_budget: int | None = None, opened: bool = False
    ) -> None:
        self._arguments = (matching, limit, reasoning_budget, opened)
        self.n = 0  # tokens so far
        self._matching = matching
        self._limit = limit
        self._budget = limit if reasoning_budget is None else reasoning_budget
        self._phase = _OPENING
        self._offset = 0
        self._reasoning = 0
        self._tail = b""
        self._state: _State = matching.forced
        if opened:
            self._think(b"")

    def restarted(self) -> Cursor:
        """Return a cursor for the same completion from its start.

        Returns
        -------
        The cursor.
        """
        return Cursor(*self._arguments)

    @property
    def lost(self) -> bool:
        """Whether tokens have come that were not allowed (another processor's doing); nothing is constrained then."""
        return self._phase == _LOST

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self._phase == _ANSWERING and self._matching.at_end(self._state)

    def advance(self, token: int) -> None:
        """Take note of a token.

        Parameters
        ----------
        token
            Its id.
        """
        self.n += 1
        vocabulary = self._matching.vocabulary
        if self._phase == _THINKING:
            if not self._tail and token not in vocabulary.openers and token < len(vocabulary.tokens):
                self._reasoning += 1
                self._close_in_time()
                return
        elif self._phase == _LOST:
            return
        text = vocabulary.tokens[token] if token < len(vocabulary.tokens) else None
        if token == vocabulary.eos or text is None:
            self._phase = _LOST
        elif self._phase == _THINKING:
            self._reasoning += 1
            self._think(self._tail + text)
        elif self._phase == _ANSWERING:
            self._answer(self._state, text)
        else:
            left = _OPEN[self._offset :]
            if text.startswith(left):
                self._think(text[len(left) :])
            elif left.startswith(text):
                self._offset += len(text)
            else:
                self._phase = _LOST

    def _think(self, text: bytes) -> None:
        self._phase = _THINKING
        at, tag = _first_tag(text)
        if tag is None:
            self._tail = _tail_of(text)
            self._close_in_time()
        elif tag == _CLOSE_THINK:
            self._answer(self._matching.closed, text[at + len(tag) :])
        else:
            self._phase = _LOST

    def _close_in_time(self) -> None:
        if self._reasoning >= self._budget or self._limit - self.n <= self._matching.reserve:
            self._answer(self._matching.forced, b"")

    def _answer(self, state: _State, text: bytes) -> None:
        found = self._matching.run(state, text)
        self._phase = _ANSWERING if found else _LOST
        self._state = found

    def only(self) -> Sequence[int] | None:
        """Tell which tokens may come next, where they are few.

        Returns
        -------
        Token ids; ``None`` within the reasoning (see :meth:`bans`) and when lost.
        """
        matching = self._matching
        if self._phase == _ANSWERING:
            left = self._limit - self.n
            # `least` is from the start of the answer on: only near the limit the exact need matters.
            if left <= matching.least + _SLACK and left <= matching.need(self._state) + _SLACK:
                return matching.tight(self._state, left)
            return matching.allowed(self._state)
        if self._phase == _OPENING:
            return matching.vocabulary.opening(self._offset)
        return None

    def bans(self) -> tuple[int, ...]:
        """Tell which tokens must not come in the reasoning, beside those that stand for no text.

        Returns
        -------
        Token ids.
        """
        return self._matching.bans(self._tail) if self._phase == _THINKING else ()

    def closing(self) -> int:
        """Tell which token comes next if the reasoning is to be closed.

        Returns
        -------
        Its id.
        """
        written = len(self._tail) if _CLOSE_THINK.startswith(self._tail) else 0
        return self._matching.vocabulary.shortest(_CLOSE_THINK[written:])[1]


@lru_cache(maxsize=512)
def matching_for(vocabulary: Vocabulary, candidates: tuple[str, ...], n_answers: int) -> Matching:
    """Return the legal answers for a list of candidates; samples of one puzzle share them.

    Parameters
    ----------
    vocabulary, candidates, n_answers
        See :class:`Matching`.

    Returns
    -------
    The matching.

    Raises
    ------
    ValueError
        As for :class:`Matching`.
    """
    return Matching(vocabulary, candidates, n_answers)


def tokens_needed(matching: Matching) -> int:
    """Bound the tokens of the shortest legal completions: less room than this cannot hold every answer.

    Parameters
    ----------
    matching
        The legal answers.

    Returns
    -------
    Tokens.
    """
    return len(_OPEN) + matching.least


def mask_logits(logits: torch.Tensor, cursors: Mapping[int, Cursor]) -> torch.Tensor:
    """Set the logits of all tokens that must not come next to minus infinity, in place.

    Parameters
    ----------
    logits
        Float tensor of shape (rows, vocabulary); ids beyond the tokenizer's are never allowed.
    cursors
        For each constrained row its cursor.

    Returns
    -------
    ``logits``
    """
    import torch

    thinking: list[int] = []
    ban_rows: list[int] = []
    ban_ids: list[int] = []
    strict: list[int] = []
    keep_rows: list[int] = []
    keep_ids: list[int] = []
    vocabulary: Vocabulary | None = None
    for row, cursor in cursors.items():
        if cursor.lost:
            continue
        vocabulary = cursor._matching.vocabulary
        ids = cursor.only()
        if ids is None:
            thinking.append(row)
            bans = cursor.bans()
            ban_rows += [row] * len(bans)
            ban_ids += bans
        else:
            strict.append(row)
            keep_rows += [row] * len(ids)
            keep_ids += ids
    if vocabulary is None:
        return logits

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=logits.device)

    nothing = float("-inf")
    if thinking:
        rows = index(thinking)
        # Wanting to end the turn in the middle of the reasoning counts for ending the reasoning.
        close = index([cursors[row].closing() for row in thinking])
        logits[rows, close] = torch.logaddexp(logits[rows, close], logits[rows, vocabulary.eos])
        logits[rows[:, None], vocabulary.silent_ids(logits)] = nothing
        if ban_ids:
            logits[index(ban_rows), index(ban_ids)] = nothing
    if strict:
        rows, ids = index(keep_rows), index(keep_ids)
        kept = logits[rows, ids]
        logits[index(strict)] = nothing
        logits[rows, ids] = kept
    return logits


# ------------------------------------------------------------------------------------------------------- tokenizers


def _token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Return the bytes of every token id, ``None`` for special tokens other than our tags."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        msg = f"{type(tokenizer).__name__} is not a fast tokenizer with a decoder; constrained decoding needs one"
        raise ValueError(msg)
    if tokenizer.eos_token_id is None:
        msg = "the tokenizer has no eos_token, so that an answer cannot end; set it"
        raise ValueError(msg)
    kinds = _decoder_kinds(json.loads(backend.decoder.__getstate__()))
    if "ByteLevel" in kinds:
        convert = _byte_level()
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        convert = _sentence_piece
    else:
        msg = f"tokenizers that decode by {' and '.join(kinds)} cannot be constrained, only byte-level ones"
        raise ValueError(msg)
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
