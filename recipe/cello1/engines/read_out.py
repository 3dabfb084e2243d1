"""Answers by read-out: a probability for each cell and candidate, and the best one-to-one matching of them.

A model that writes one answer decides on cell after cell, and the first wrong decision takes a type away from another
cell. Here its probabilities of the candidates are read where it decides. Their mean over several samples is a matrix;
the matching with the highest expected number of right cells is the answer. It is always a legal one, and its
probabilities are the model's own. There are two ways:

``matrix``
    Each cell in turn is moved to the front of the puzzle, where all candidates are still left. The model is asked for
    the evidence of this one cell, and its probabilities are read where the decision would stand. Needs a model whose
    reasoning has the form of :mod:`recipe.cello1.task.trace`. A puzzle costs a short piece of evidence for each cell
    and sample.
``soft``
    The model answers the whole puzzle, reasoning as it likes, and its probabilities are read in each slot of its
    answer, behind the reasoning and the types that it wrote before: votes that are averaged instead of counted.

Where an engine gives no probabilities each sample votes for the type that it names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from recipe.cello1.engines.asking import NO_RESULT
from recipe.cello1.engines.protocol import Choice, Decoding, Engine, Failure, Message, Request, Sampling, sample_seed
from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN, SEPARATOR, format_answer, parse_answer
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.trace import DECISION, SECOND_LINE, first_decision, first_line
from recipe.cello1.task.voting import assign, matched, vote_entropy

EVIDENCE_TOKENS = 64  # room for the evidence of one cell
_TOGETHER = 64  # puzzles in work at a time
_DIGITS = 6

Write = Callable[[Puzzle], Sequence[Message]]


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read out for one puzzle: rows are cells, columns candidates."""

    candidates: tuple[str, ...]
    probabilities: np.ndarray
    # Tokens generated, and of the prompts and beginnings that were sent for that
    tokens: int
    prompt_tokens: int
    # Beginnings for which the candidates were scored
    scored: int = 0
    # What the probabilities are: the "model"'s own, or shares of "votes"
    source: str = "model"
    # What the first sample says: of the whole puzzle, or of each cell
    said: tuple[str, ...] = ()

    def answer(self) -> tuple[str, ...]:
        """Name the types of the matching with the highest expected number of right cells."""
        return tuple(self.candidates[j] for j in self._columns.tolist())

    @cached_property
    def _support(self) -> np.ndarray:
        return matched(self.probabilities)

    @cached_property
    def _columns(self) -> np.ndarray:
        # What a cell is expected to be already counts what the others leave it.
        return assign(self._support, smoothing=0.0)

    def facts(self) -> dict[str, Any]:
        """Give what a record holds: ``support`` of each type beside the others, its own lead (``margin``), bits."""
        chosen = np.arange(len(self._support)), self._columns
        rest = self.probabilities.copy()
        rest[chosen] = 0
        facts = {"probabilities": self.probabilities, "support": self._support[chosen]}
        facts["margin"] = self.probabilities[chosen] - rest.max(axis=1)
        facts["entropy"] = vote_entropy(self.probabilities)
        shown: dict[str, Any] = {name: values.round(_DIGITS).tolist() for name, values in facts.items()}
        return shown | {"probabilities_from": self.source, "scored": self.scored}

    @property
    def text(self) -> str:
        """The answer as a response."""
        return format_answer(self.answer())


class Slot(NamedTuple):
    """A place in a sample where the model decides on one cell."""

    cell: int
    # What stands before it, and what may come next: one text for each candidate
    prefix: str
    options: tuple[str, ...]
    # The type that the sample names there; empty where it ends before it
    said: str


def read_out_sampling(decode: Decoding, sampling: Sampling, can_score: bool) -> Sampling:
    """Say how samples are taken: for ``matrix`` up to the decision on the first cell, or just beyond it to vote."""
    if decode != "matrix":
        return sampling
    if not can_score:
        return replace(sampling, stop=SECOND_LINE)
    return replace(sampling, max_tokens=min(sampling.max_tokens, EVIDENCE_TOKENS), stop=DECISION)


def cell_first(puzzle: Puzzle, cell: int, turn: int = 0) -> Puzzle:
    """Move one cell to the front; the others follow in a circle, further along it at each turn."""
    # A model that looks at a wrong cell mostly looks at a neighbour. In one order for all, each row of the matrix would
    # lean to the type of the same neighbour, and no matching takes that out again.
    others = [(cell + 1 + i) % puzzle.n_cells for i in range(puzzle.n_cells - 1)]
    turn %= max(1, len(others))
    order = [cell, *others[turn:], *others[:turn]]
    return replace(puzzle, cells=tuple(puzzle.cells[i] for i in order), answer=None, meta={})


def closed(names: Sequence[str], following: str) -> tuple[str, ...]:
    """Where a name begins like another, write each with what follows it, so that its end is compared as well."""
    if any(a != b and b.startswith(a) for a in names for b in names):
        return tuple(name + following for name in names)
    return tuple(names)


def _requests(
    engine: Engine, index: int, puzzle: Puzzle, decode: Decoding, samples: int, seed: int | None, write: Write
) -> Iterator[tuple[int, int, Request]]:
    """Ask for the samples of a puzzle; with its index, and for ``matrix`` the cell at the front."""
    matrix = decode == "matrix"
    # Answers are held to legal ones where the engine is: then every sample can be read.
    held, n = bool(engine.constraint) and not matrix, puzzle.n_cells
    prefix = first_line() if engine.can_score and matrix else ""
    orders = min(samples, max(1, n - 1)) if matrix else 1
    for cell in range(n if matrix else 1):
        shown = [cell_first(puzzle, cell, turn) for turn in range(orders)] if matrix else [puzzle]
        asked = [write(each) for each in shown]
        # Without chance, a turn that brings back the same order brings back the same evidence.
        for turn in range(orders if matrix and seed is None else samples):
            own = None if seed is None else sample_seed(seed, index, cell * samples + turn)
            legal = (puzzle.candidates, n) if held else ((), 0)
            yield index, cell, Request(asked[turn % orders], own, *legal, prefix)


def _slots(decode: Decoding, puzzle: Puzzle, cell: int, request: Request, text: str) -> list[Slot]:
    """Find where a sample decides; nowhere if it is malformed or names another number of types."""
    n, names = puzzle.n_cells, puzzle.candidates
    if decode == "matrix":
        # Evidence that found no end, or broke off at a tag, is still asked what it leads to: it weighs as the others.
        options = closed([f" {name}" for name in names], SECOND_LINE if n > 1 else "\n</think>")
        return [Slot(cell, request.prefix + text.rstrip() + DECISION, options, first_decision(text))]
    if len(items := parse_answer(text).items) != n:
        return []
    head = text[: text.rindex(ANSWER_OPEN)] + ANSWER_OPEN
    options, last = closed(names, SEPARATOR.rstrip()), closed(names, ANSWER_CLOSE)
    return [
        Slot(i, head + "".join(name + SEPARATOR for name in items[:i]), options if i < n - 1 else last, items[i])
        for i in range(n)
    ]


def read_out(
    engine: Engine,
    puzzles: Sequence[tuple[int, Puzzle]],
    sampling: Sampling,
    decode: Decoding = "matrix",
    *,
    samples: int = 1,
    seed: int = 0,
    write: Write = messages,
) -> Iterator[tuple[int, Reading | Failure]]:
    """Read out puzzles, each given with its index in the data set, in order."""
    own = seed if sampling.temperature > 0 else None
    sampling = read_out_sampling(decode, sampling, engine.can_score)
    for start in range(0, len(puzzles), _TOGETHER):
        part = dict(puzzles[start : start + _TOGETHER])
        asked = [
            each for i, puzzle in part.items() for each in _requests(engine, i, puzzle, decode, samples, own, write)
        ]
        yield from _read_part(engine, part, asked, sampling, decode)


def _read_part(
    engine: Engine,
    puzzles: Mapping[int, Puzzle],
    asked: Sequence[tuple[int, int, Request]],
    sampling: Sampling,
    decode: Decoding,
) -> Iterator[tuple[int, Reading | Failure]]:
    """Read some puzzles: first all samples, then all decisions in them."""
    failures: dict[int, Failure] = {}
    costs = {index: Counter[str]() for index in puzzles}
    votes = {index: np.zeros((puzzle.n_cells, len(puzzle.candidates))) for index, puzzle in puzzles.items()}
    # The same decision twice is scored once.
    times: dict[tuple[Any, ...], int] = {}
    choices: list[Choice] = []
    said: dict[int, dict[int, str]] = {index: {} for index in puzzles}
    unanswered = set(range(len(asked)))
    requests = (request for _, _, request in asked)
    for number, done in sorted(engine.generate(requests, sampling), key=lambda found: found[0]):
        unanswered.discard(number)
        index, cell, request = asked[number]
        if isinstance(done, Failure):
            failures.setdefault(index, done)
            continue
        costs[index].update(tokens=done.tokens, prompt_tokens=done.prompt_tokens)
        said[index].setdefault(cell, done.text)
        puzzle = puzzles[index]
        names = [name.lower() for name in puzzle.candidates]
        for slot in _slots(decode, puzzle, cell, request, done.text):
            key = index, slot.cell, *(message["content"] for message in request.messages), slot.prefix
            if not engine.can_score:
                if slot.said.lower() in names:
                    votes[index][slot.cell, names.index(slot.said.lower())] += 1
            elif key in times:
                times[key] += 1
            else:
                choices.append(Choice(request.messages, slot.prefix, slot.options))
                times[key] = 1
                costs[index].update(scored=1)
    scored = dict(engine.score(choices)) if choices else {}
    for number, ((index, cell, *_), count) in enumerate(times.items()):
        row = _probabilities(scored.get(number, NO_RESULT))
        if isinstance(row, Failure):
            failures.setdefault(index, row)
        else:
            votes[index][cell] += count * row
    for number in unanswered:
        failures.setdefault(asked[number][0], NO_RESULT)
    for index, puzzle in puzzles.items():
        if index in failures:
            yield index, failures[index]
            continue
        totals = votes[index].sum(axis=1, keepdims=True)
        even = np.full(votes[index].shape, 1 / len(puzzle.candidates))  # where no sample could be read
        rows = np.divide(votes[index], totals, out=even, where=totals > 0)
        took, source = costs[index], "model" if engine.can_score else "votes"
        facts = took["tokens"], took["prompt_tokens"], took["scored"], source
        yield index, Reading(puzzle.candidates, rows, *facts, tuple(said[index].values()))


def _probabilities(logprobs: np.ndarray | Failure) -> np.ndarray | Failure:
    """Share the probability among the candidates; evenly where none of them is possible."""
    if isinstance(logprobs, Failure):
        return logprobs
    if not (np.asarray(logprobs) < np.inf).all():
        return Failure("the engine gave a log-probability that is no number below infinity")
    return softmax(logprobs) if np.isfinite(logprobs).any() else np.full(len(logprobs), 1 / len(logprobs))
