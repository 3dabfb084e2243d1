"""The rounds: draw puzzles, ask them, count; with a screening first where the types do not fit one puzzle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recipe.cello1.puzzle import Puzzle
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

Ask = Callable[[Sequence[Draft]], list[Reply]]


@dataclass(frozen=True, slots=True)
class Lists:
    """The candidates.

    Attributes
    ----------
    types
        Every type, sorted.
    of
        For each donor the types on its list, sorted.
    decoys
        Types that no cell should be.
    size
        Most candidates in a puzzle, decoys included.
    shuffle
        Whether candidates are shown in random order instead of sorted.
    """

    types: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]]
    decoys: tuple[str, ...] = ()
    size: int = 15
    shuffle: bool = False

    def n_decoys(self, donor: str) -> int:
        """Count the decoys in a puzzle: all if there is room, else a fifth of the list, at least one."""
        room = self.size - len(self.of[donor])
        return min(len(self.decoys), max(room, self.size // 5, 1))

    def n_types(self, donor: str) -> int:
        """Count the types in a puzzle, decoys not included."""
        return max(1, min(len(self.of[donor]), self.size - self.n_decoys(donor)))

    def needs_screening(self, donor: str) -> bool:
        """Say whether the types do not fit one puzzle."""
        return self.n_types(donor) < len(self.of[donor])


def screening(units: Sequence[Unit], lists: Lists, size: Mapping[str, int], rng: np.random.Generator) -> list[Draft]:
    """Draw puzzles in which every unit meets every type of its list, several times in different company.

    Where the right type is not shown a wrong one must be chosen: once proves nothing. The right one is chosen again.

    Parameters
    ----------
    units
        The units.
    lists
        The candidates.
    size
        Most cells in a puzzle, for each donor.
    rng
        Random generator.

    Returns
    -------
    The puzzles; none if all types fit one.
    """
    if not any(lists.needs_screening(donor) for donor in lists.of):
        return []
    members_of = Members(units, size, rng)
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
) -> list[Draft]:
    """Draw the puzzles that decide.

    Parameters
    ----------
    units, lists, size
        As for :func:`screening`.
    n_rounds
        How often each unit is asked about at least.
    rng
        Random generator.
    screened
        Votes so far.
    first
        Number of the first round.

    Returns
    -------
    The puzzles.
    """
    members_of = Members(units, size, rng)
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
            drafts.append(Draft(number, donor, members, cells, arrange(shown, rng if lists.shuffle else None)))
    return drafts


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What came out.

    Attributes
    ----------
    tally
        Votes of the deciding rounds.
    drafts, replies
        All puzzles and their replies, the screening first.
    """

    tally: Tally
    drafts: list[Draft]
    replies: list[Reply]


def solve(
    units: Sequence[Unit],
    lists: Lists,
    size: Mapping[str, int],
    n_rounds: int,
    ask: Ask,
    rng: np.random.Generator,
) -> Solved:
    """Ask all rounds.

    Parameters
    ----------
    units, lists, size, n_rounds, rng
        As for :func:`final_rounds`.
    ask
        Puts puzzles to the engine.

    Returns
    -------
    Votes, puzzles and replies.
    """
    drafts = screening(units, lists, size, rng)
    replies = ask(drafts) if drafts else []
    n_screening = len(drafts)
    stages = min(STAGES, n_rounds) if drafts else 1

    def tally(start: int) -> Tally:
        texts = [reply.text for reply in replies[start:]]
        return count(drafts[start:], texts, len(units), lists.types, lists.decoys)

    done = 0
    for stage in range(stages):
        n = (n_rounds - done) // (stages - stage)
        more = final_rounds(units, lists, size, n, rng, tally(0) if n_screening else None, done + 1)
        drafts = drafts + more
        replies = replies + ask(more)
        done += n
    return Solved(tally(n_screening), drafts, replies)


def fill(draft: Draft, genes: Mapping[int, tuple[str, ...]], context: str) -> Puzzle:
    """Make the puzzle of a draft.

    Parameters
    ----------
    draft
        The draft.
    genes
        Listed genes of each row.
    context
        Donor sentences.

    Returns
    -------
    The puzzle, without an answer.
    """
    return Puzzle(tuple([genes[row] for row in draft.cells]), draft.candidates, None, context)
