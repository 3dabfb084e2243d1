"""Matching by read-out: one probability for each cell and candidate, and the best one-to-one matching of them.

A model that writes one answer decides on cell after cell, and the first wrong decision takes a type away from another
cell. Here each cell in turn is moved to the front of the puzzle, where all candidates are still left. The model is
asked for the evidence of this one cell, and instead of letting it decide, its probabilities of the candidates are read
where the decision would stand. Their mean over the samples is one row of a matrix; the matching with the highest
expected number of right cells is the answer. It is always a legal one, and its probabilities are the model's own.

This needs an engine that can score and a model whose reasoning has the form of :mod:`recipe.cello1.task.trace`. What is
left at the front is known, so that it is not generated: a puzzle costs a short piece of evidence for each cell and
sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax

from recipe.cello1.engines.asking import NO_RESULT
from recipe.cello1.engines.protocol import Choice, Engine, Failure, Request, Sampling, sample_seed
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import Layout, Variant, messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.trace import DECISION, first_line
from recipe.cello1.task.voting import assign, vote_entropy

EVIDENCE_TOKENS = 64  # room for the evidence of one cell
_TOGETHER = 64  # puzzles in work at a time
_DIGITS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What was read out for one puzzle: rows are cells, columns candidates."""

    candidates: tuple[str, ...]
    probabilities: np.ndarray
    # Generated tokens; those of prompts and beginnings, without the scoring passes
    tokens: int
    prompt_tokens: int

    def answer(self) -> tuple[str, ...]:
        """Name the types of the matching with the highest expected number of right cells."""
        return tuple(self.candidates[j] for j in self._columns().tolist())

    def _columns(self) -> np.ndarray:
        return assign(self.probabilities, smoothing=0.0)

    def facts(self) -> dict[str, Any]:
        """Give what a record holds: ``support`` of each cell's type, its lead over the next (``margin``), bits."""
        chosen = np.arange(len(self.probabilities)), self._columns()
        rest = self.probabilities.copy()
        rest[chosen] = 0
        support = self.probabilities[chosen]
        facts = {"probabilities": self.probabilities, "support": support, "margin": support - rest.max(axis=1)}
        facts["entropy"] = vote_entropy(self.probabilities)
        return {name: values.round(_DIGITS).tolist() for name, values in facts.items()}

    @property
    def text(self) -> str:
        """The answer as a response."""
        return format_answer(self.answer())


def evidence_sampling(sampling: Sampling) -> Sampling:
    """Say how the evidence of a cell is sampled: up to the decision."""
    return replace(sampling, max_tokens=min(sampling.max_tokens, EVIDENCE_TOKENS), stop=DECISION)


def cell_first(puzzle: Puzzle, cell: int) -> Puzzle:
    """Move one cell to the front; the others keep their order."""
    order = [cell, *(i for i in range(puzzle.n_cells) if i != cell)]
    return replace(puzzle, cells=tuple(puzzle.cells[i] for i in order), answer=None, meta={})


def decisions(puzzle: Puzzle) -> tuple[str, ...]:
    """Write the decisions to compare; where a name begins like another, with what follows, so that it ends there."""
    names = [f" {name}" for name in puzzle.candidates]
    if any(a != b and b.startswith(a) for a in names for b in names):
        following = "\nCell 2:" if puzzle.n_cells > 1 else "\n</think>"
        names = [name + following for name in names]
    return tuple(names)


def read_matrix(
    engine: Engine,
    puzzles: Sequence[tuple[int, Puzzle]],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int = 0,
    layout: Layout = "system",
    variant: Variant = "batch",
) -> Iterator[tuple[int, Reading | Failure]]:
    """Read out puzzles, each given with its index in the data set, in order."""
    for start in range(0, len(puzzles), _TOGETHER):
        part = puzzles[start : start + _TOGETHER]
        asked: list[tuple[int, int]] = []  # index of the puzzle, cell
        requests: list[Request] = []
        for index, puzzle in part:
            for cell in range(puzzle.n_cells):
                turned = messages(cell_first(puzzle, cell), layout, variant)
                for sample in range(samples):
                    own = sample_seed(seed, index, cell * samples + sample) if sampling.temperature > 0 else None
                    requests.append(Request(turned, own, prefix=first_line(puzzle.candidates)))
                    asked.append((index, cell))
        yield from _read_part(engine, dict(part), asked, requests, sampling)


def _read_part(
    engine: Engine,
    puzzles: dict[int, Puzzle],
    asked: list[tuple[int, int]],
    requests: list[Request],
    sampling: Sampling,
) -> Iterator[tuple[int, Reading | Failure]]:
    """Read some puzzles: first all evidence, then all decisions."""
    failures: dict[int, Failure] = {}
    tokens = {index: [0, 0] for index in puzzles}
    sums = {index: np.zeros((puzzle.n_cells, len(puzzle.candidates))) for index, puzzle in puzzles.items()}
    # The same evidence twice is scored once.
    times: dict[tuple[int, int, str], int] = {}
    choices: list[Choice] = []
    unanswered = set(range(len(requests)))
    for number, done in sorted(engine.generate(iter(requests), sampling), key=lambda found: found[0]):
        unanswered.discard(number)
        index, cell = asked[number]
        if isinstance(done, Failure):
            failures.setdefault(index, done)
            continue
        tokens[index][0] += done.tokens
        tokens[index][1] += done.prompt_tokens
        request = requests[number]
        # Evidence that found no end, or broke off at a tag, is still asked what it leads to: it weighs as the others.
        key = index, cell, request.prefix + done.text.rstrip() + DECISION
        if key not in times:
            choices.append(Choice(request.messages, key[2], decisions(puzzles[index])))
        times[key] = times.get(key, 0) + 1
    scored = dict(engine.score(choices))
    for number, ((index, cell, _), count) in enumerate(times.items()):
        logprobs = scored.get(number, NO_RESULT)
        if isinstance(logprobs, Failure):
            failures.setdefault(index, logprobs)
        else:
            sums[index][cell] += count * np.exp(log_softmax(logprobs))
    for number in unanswered:
        failures.setdefault(asked[number][0], NO_RESULT)
    for index, puzzle in puzzles.items():
        if index in failures:
            yield index, failures[index]
        else:
            rows = sums[index] / sums[index].sum(axis=1, keepdims=True)
            yield index, Reading(puzzle.candidates, rows, *tokens[index])
