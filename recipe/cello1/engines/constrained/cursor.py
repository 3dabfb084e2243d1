"""Following one completion token by token, and masking the logits of a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recipe.cello1.engines.constrained.matching import SLACK, Matching, State
from recipe.cello1.engines.constrained.vocabulary import CLOSE_THINK, OPEN, Vocabulary, first_tag, tail_of

if TYPE_CHECKING:
    import torch

_OPENING, _THINKING, _ANSWERING, _LOST = range(4)


class Cursor:
    """Follows one completion."""

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
        self._state: State = matching.forced
        if opened:
            self._think(b"")

    def restarted(self) -> Cursor:
        """Return a cursor for the same completion from its start."""
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
        """Take note of a token."""
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
            left = OPEN[self._offset :]
            if text.startswith(left):
                self._think(text[len(left) :])
            elif left.startswith(text):
                self._offset += len(text)
            else:
                self._phase = _LOST

    def _think(self, text: bytes) -> None:
        self._phase = _THINKING
        at, tag = first_tag(text)
        if tag is None:
            self._tail = tail_of(text)
            self._close_in_time()
        elif tag == CLOSE_THINK:
            self._answer(self._matching.closed, text[at + len(tag) :])
        else:
            self._phase = _LOST

    def _close_in_time(self) -> None:
        if self._reasoning >= self._budget or self._limit - self.n <= self._matching.reserve:
            self._answer(self._matching.forced, b"")

    def _answer(self, state: State, text: bytes) -> None:
        found = self._matching.run(state, text)
        self._phase = _ANSWERING if found else _LOST
        self._state = found

    def only(self) -> Sequence[int] | None:
        """Tell which tokens may come next, where they are few."""
        matching = self._matching
        if self._phase == _ANSWERING:
            left = self._limit - self.n
            # `least` is from the start of the answer on: only near the limit the exact need matters.
            if left <= matching.least + SLACK and left <= matching.need(self._state) + SLACK:
                return matching.tight(self._state, left)
            return matching.allowed(self._state)
        if self._phase == _OPENING:
            return matching.vocabulary.opening(self._offset)
        return None

    def bans(self) -> tuple[int, ...]:
        """Tell which tokens must not come in the reasoning, beside those that stand for no text."""
        return self._matching.bans(self._tail) if self._phase == _THINKING else ()

    def closing(self) -> int:
        """Tell which token comes next if the reasoning is to be closed."""
        written = len(self._tail) if CLOSE_THINK.startswith(self._tail) else 0
        return self._matching.vocabulary.shortest(CLOSE_THINK[written:])[1]


def mask_logits(logits: torch.Tensor, cursors: Mapping[int, Cursor]) -> torch.Tensor:
    """Set the logits of all tokens that must not come next to minus infinity, in place."""
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
