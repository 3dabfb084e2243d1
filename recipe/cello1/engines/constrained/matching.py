"""The legal texts from the end of the reasoning on, as an automaton over bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from recipe.cello1.engines.constrained.vocabulary import CLOSE_THINK, JOINT, LONGEST, OPEN, Vocabulary, run_end
from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN, SEPARATOR, THINK_CLOSE, THINK_OPEN, type_fault

_SEPARATOR = SEPARATOR.encode()
_CLOSE_ANSWER = ANSWER_CLOSE.encode()

SLACK = LONGEST + 8  # tokens; an awkward spelling can cost no more than this before it is noticed

# Kinds of position in a text, see Matching.
_LITERAL, _LABEL, _SEP, _END_TAG, _END = range(5)
_TEXTS = {_LITERAL: JOINT, _SEP: _SEPARATOR, _END_TAG: _CLOSE_ANSWER}
_Item = tuple[int, int, int]  # kind, position (in the text, or node of the label trie), labels used so far (bits)
State = tuple[_Item, ...]  # several items: what follows decides (a label, or a longer one)


@dataclass(slots=True)
class _Continuations:
    """The tokens that go on with some literal text and then a label from a node of the trie on."""

    # Ids of tokens that end within the literal text or at its end
    literal: list[int]
    # Tokens that end within a label or at its end: bits of the labels that then can come, ids
    inside: list[tuple[int, tuple[int, ...]]]
    # Tokens that go on after a label: its bit, what they write after it, ids
    beyond: list[tuple[int, bytes, tuple[int, ...]]]


class Matching:
    r"""The legal texts from ``</think>`` on, for one list of candidates: an automaton over bytes."""

    def __init__(self, vocabulary: Vocabulary, candidates: Sequence[str], n_answers: int) -> None:
        for label in candidates:
            if fault := type_fault(label):
                raise ValueError(f"candidates: {label!r} {fault}; rename it")
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
        for number, spelt in enumerate(self._labels):
            self._insert(number, spelt)
        spell = vocabulary.shortest
        self._unit = [max(spell(label + end)[0] for end in (_SEPARATOR, _CLOSE_ANSWER)) for label in self._labels]
        self._by_cost = sorted(range(len(labels)), key=lambda i: -self._unit[i])
        self._continuations: dict[tuple[bytes, int], _Continuations] = {}
        self._bans: dict[bytes, tuple[int, ...]] = {}
        self.forced: State = ((_LITERAL, 0, 0),)
        self.closed: State = ((_LITERAL, len(CLOSE_THINK), 0),)
        self.least = self.need(self.forced)
        # Some room for a spelling that is not the shortest. More would be taken from the reasoning; where it is short,
        # `tight` holds the answer to the shortest spellings.
        self.reserve = ceil(1.25 * self.least) + 4

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

    def run(self, state: State, text: bytes) -> State:
        """Follow a text."""
        for byte in text:
            if len(state) == 1:
                state = self._step(state[0], byte)
            else:
                state = tuple([after for item in state for after in self._step(item, byte)])
        return state

    def _step(self, item: _Item, byte: int) -> State:
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

    def _enter(self, node: int, used: int) -> State:
        """Return where one is on a node of the label trie; nothing if only used labels lie there."""
        if not self._below[node] & ~used:
            return ()
        number = self._ends[node]
        if number < 0:
            return ((_LABEL, node, used),)
        items: State = ()
        if any(self._below[child] & ~used for child in self._children[node].values()):
            items = ((_LABEL, node, used),)
        if not self._bits[number] & used:
            written = used | self._bits[number]
            items += ((self._after_label(written), 0, written),)
        return items

    def _after_label(self, used: int) -> int:
        return _END_TAG if used.bit_count() == self.n_answers else _SEP

    # --------------------------------------------------------------------------------------------------- tokens

    def allowed(self, state: State) -> list[int]:
        """Find the tokens that may come next."""
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
            high = run_end(keys, literal, low, high)
        stack = [(literal, node, low, high)]
        while stack:
            text, here, low, high = stack.pop()
            if self._ends[here] >= 0:
                bit = self._bits[self._ends[here]]
                # What can follow a label is looked up; to go through all tokens with a blank in front takes 20 ms.
                for end in (_SEPARATOR, _CLOSE_ANSWER):
                    for size in range(1, len(end) + 1):
                        if found := self.vocabulary.table.get(text + end[:size]):
                            table.beyond.append((bit, end[:size], found))
                first = text + _SEPARATOR
                start = bisect_left(keys, first, low, high)
                for i in range(start, run_end(keys, first, start, high)):
                    if keys[i] != first:
                        table.beyond.append((bit, keys[i][len(text) :], ids[i]))
            for byte, child in self._children[here].items():
                longer = text + bytes((byte,))
                start = bisect_left(keys, longer, low, high)
                if start < high and keys[start].startswith(longer):
                    if keys[start] == longer:
                        table.inside.append((self._below[child], ids[start]))
                    stack.append((longer, child, start, run_end(keys, longer, start, high)))
        return table

    @staticmethod
    def at_end(state: State) -> bool:
        """Tell whether the answer is complete."""
        return state[0][0] == _END

    # ----------------------------------------------------------------------------------------------------- room

    def _remainders(self, state: State) -> Iterator[tuple[bytes, int]]:
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

    def need(self, state: State) -> int:
        """Bound the tokens it takes to end from here when the shortest spellings are used."""
        spell = self.vocabulary.shortest
        return max((spell(text)[0] + self._rest(used) for text, used in self._remainders(state)), default=1)

    def tight(self, state: State, room: int) -> list[int]:
        """Find the tokens that begin the shortest spellings of what still fits."""
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
        """Find the tokens that must not come in the reasoning, beside those that stand for no text."""
        if tail not in self._bans:
            banned, open_cases = self.vocabulary.tags_after(tail)
            root: State = ((_LABEL, 0, 0),)
            self._bans[tail] = banned + tuple(i for i, rest in open_cases if not self.run(root, rest))
        return self._bans[tail]


@lru_cache(maxsize=512)
def matching_for(vocabulary: Vocabulary, candidates: tuple[str, ...], n_answers: int) -> Matching:
    """Return the legal answers for a list of candidates; samples of one puzzle share them."""
    return Matching(vocabulary, candidates, n_answers)


def tokens_needed(matching: Matching) -> int:
    """Bound the tokens of the shortest legal completions: less room than this cannot hold every answer."""
    return len(OPEN) + matching.least
