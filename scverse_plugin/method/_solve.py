"""The rounds: draw puzzles, ask them, count; with a screening first where the types do not fit one puzzle."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipe.cello1.task.puzzle import Puzzle
from scverse_plugin.method._ask import Reply
from scverse_plugin.method._plan import (
    Draft,
    Members,
    arrange,
    candidate_blocks,
    leading_candidates,
)
from scverse_plugin.method._tally import Tally, count
from scverse_plugin.method._units import Unit

SCREENINGS = 3  # how often every unit meets every type
STAGES = 3  # how often the leading types are looked at anew afterwards

ORDERS = 20  # how many orders of the candidates are tried for a question that has been asked before

Ask = Callable[[Sequence[Draft]], list[Reply]]
Wording = Callable[[Draft], Hashable]


@dataclass(frozen=True, slots=True)
class Lists:
    """The candidates."""

    # Every type, sorted
    types: tuple[str, ...]
    # For each donor the types on its list, sorted
    of: Mapping[str, tuple[str, ...]]
    # Types that no cell should be
    decoys: tuple[str, ...] = ()
    # Most candidates in a puzzle, decoys included
    size: int = 15
    # Whether candidates are shown in random order instead of sorted
    shuffle: bool = False

    def n_decoys(self, donor: str) -> int:
        """Count the decoys in a puzzle: all if there is room, else a fifth of the list, at least one."""
        room = self.size - len(self.of[donor])
        return min(len(self.decoys), max(room, self.size // 5, 1))

    def n_types(self, donor: str) -> int:
        """Count the types in a puzzle, decoys not included."""
        return max(1, min(len(self.of[donor]), self.size - self.n_decoys(donor)))

    def full(self, size: Mapping[str, int]) -> list[str]:
        """Name the donors whose puzzles can have as many cells as types, as in training: these are filled up."""
        # Decoys do not count: one to one, one would have to be chosen in every puzzle.
        return [donor for donor in self.of if size[donor] == self.n_types(donor)]

    def needs_screening(self, donor: str) -> bool:
        """Say whether the types do not fit one puzzle."""
        return self.n_types(donor) < len(self.of[donor])


def screening(units: Sequence[Unit], lists: Lists, size: Mapping[str, int], rng: np.random.Generator) -> list[Draft]:
    """Draw puzzles in which every unit meets every type of its list, several times in different company."""
    if not any(lists.needs_screening(donor) for donor in lists.of):
        return []
    members_of = Members(units, size, rng, lists.full(size))
    drafts = []
    for number in range(1 - SCREENINGS, 1):
        for donor, members, cells in members_of.round():
            if lists.needs_screening(donor):
                for block in candidate_blocks(lists.of[donor], max(lists.n_types(donor), len(members)), rng):
                    candidates = arrange(block, rng if lists.shuffle else None)
                    drafts.append(Draft(number, donor, members, cells, candidates, True))
    return drafts


def final_rounds(
    units: Sequence[Unit],
    lists: Lists,
    size: Mapping[str, int],
    n_rounds: int,
    rng: np.random.Generator,
    screened: Tally | None = None,
    first: int = 1,
    wording: Wording | None = None,
    asked: set[Hashable] | None = None,
) -> list[Draft]:
    """Draw the puzzles that decide."""
    asked = set() if asked is None else asked
    members_of = Members(units, size, rng, lists.full(size))
    drafts = []
    for number in range(first, first + n_rounds):
        for donor, members, cells in members_of.round():
            shown = list(lists.of[donor])
            if lists.needs_screening(donor):
                if screened is None:  # a dry run: which types lead is not known yet
                    shown = candidate_blocks(shown, lists.n_types(donor), rng)[0]
                else:
                    columns = [screened.types.index(name) for name in shown]
                    rates = screened.weighed[:, columns]
                    shown = leading_candidates(rates, shown, members, max(lists.n_types(donor), len(members)), rng)
            if lists.decoys:
                extra = rng.choice(len(lists.decoys), lists.n_decoys(donor), replace=False)
                shown += [lists.decoys[i] for i in extra]
            draft = Draft(number, donor, members, cells, arrange(shown, rng if lists.shuffle else None))
            new = draft if wording is None else _unasked(draft, wording, asked, rng)
            if new is not None:
                drafts.append(new)
    return drafts


def _unasked(draft: Draft, wording: Wording, asked: set[Hashable], rng: np.random.Generator) -> Draft | None:
    """Return the draft, or the same in another order, if it has not been asked yet."""
    for _ in range(ORDERS):
        if (key := (draft.members, wording(draft))) not in asked:
            asked.add(key)
            return draft
        draft = replace(draft, candidates=arrange(draft.candidates, rng))
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What came out."""

    # Votes of the deciding rounds
    tally: Tally
    # All puzzles and their replies, the screening first
    drafts: list[Draft]
    replies: list[Reply]


def solve(
    units: Sequence[Unit],
    lists: Lists,
    size: Mapping[str, int],
    n_rounds: int,
    ask: Ask,
    rng: np.random.Generator,
    wording: Wording | None = None,
) -> Solved:
    """Ask all rounds."""
    drafts = screening(units, lists, size, rng)
    replies = ask(drafts) if drafts else []
    n_screening = len(drafts)
    stages = min(STAGES, n_rounds) if drafts else 1

    def tally(start: int) -> Tally:
        texts = [reply.text for reply in replies[start:]]
        tables = [reply.probabilities for reply in replies[start:]]
        return count(drafts[start:], texts, len(units), lists.types, lists.decoys, tables)

    done = 0
    asked: set[Hashable] = set()
    for stage in range(stages):
        n = (n_rounds - done) // (stages - stage)
        more = final_rounds(units, lists, size, n, rng, tally(0) if n_screening else None, done + 1, wording, asked)
        drafts = drafts + more
        replies = replies + ask(more)
        done += n
    return Solved(tally(n_screening), drafts, replies)


def fill(draft: Draft, genes: Mapping[int, tuple[str, ...]], context: str) -> Puzzle:
    """Make the puzzle of a draft."""
    return Puzzle(tuple([genes[row] for row in draft.cells]), draft.candidates, None, context)
