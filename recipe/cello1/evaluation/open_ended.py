"""Open-ended answers, which name types freely: scored by what the names mean, not by how they are spelled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from recipe.cello1.engines.asking import ask
from recipe.cello1.engines.protocol import Completion, Engine, Failure, Request, Sampling
from recipe.cello1.evaluation.intervals import Estimate, estimate
from recipe.cello1.evaluation.results import Meanings
from recipe.cello1.evaluation.scores import Scored
from recipe.cello1.task.answer import THINK_CLOSE
from recipe.cello1.task.ontology import CellOntology, Relation, normalise

_NO_ANSWER = "no_answer"
_MOST_NAMES = 20  # unknown names listed


def by_ontology(answers: Sequence[Scored], ontology: CellOntology, *, seed: int = 0) -> Meanings:
    """Relate each answered type to the gold of its cell by the Cell Ontology."""
    unknown: Counter[str] = Counter()
    distances: list[float] = []
    verdicts: list[list[str | None]] = []
    for pairs in _pairs(answers):
        row: list[str | None] = []
        apart: list[int] = []
        for pair in pairs:
            if pair is None:
                row.append(_NO_ANSWER)
                continue
            match = ontology.compare(*pair)
            row.append(str(match.relation))
            unknown.update(name for name, term in zip(pair, (match.answer, match.gold), strict=True) if not term)
            if match.distance is not None:
                apart.append(match.distance)
        verdicts.append(row)
        if apart:
            distances.append(float(np.mean(apart)))
    return Meanings(
        ontology.version,
        _shares(verdicts, (*map(str, Relation), _NO_ANSWER), seed),
        estimate(np.array(distances), seed=seed) if distances else None,
        dict(unknown.most_common(_MOST_NAMES)),
    )


def by_judge(answers: Sequence[Scored], engine: Engine, *, seed: int = 0) -> Meanings:
    """Have a language model relate each answered type to the gold of its cell."""
    rows = _pairs(answers)
    said = ask_judge(engine, [pair for row in rows for pair in row if pair is not None])
    verdicts = [[_NO_ANSWER if pair is None else said.found.get(pair) for pair in row] for row in rows]
    cells = [verdict for row in verdicts for verdict in row]
    return Meanings(
        engine.model,
        _shares(verdicts, (*VERDICTS, _NO_ANSWER), seed),
        n_judged=sum(verdict is not None for verdict in cells),
        n_failed=sum(verdict is None for verdict in cells),
        failures=dict(Counter(said.failures.values()).most_common()),
    )


def _pairs(answers: Sequence[Scored]) -> list[list[TypePair | None]]:
    """Return for each puzzle the answered and gold name of each cell; ``None`` where none was answered."""
    rows: dict[int, list[TypePair | None]] = {}
    for answer in answers:
        row, gold, named = rows.setdefault(answer.index, []), answer.puzzle.answer, answer.score.items
        # A type named twice is no fault of an open-ended answer.
        row += zip(named, gold, strict=True) if len(named) == len(gold) else [None] * len(gold)
    return list(rows.values())


def _shares(rows: Sequence[Sequence[str | None]], names: Sequence[str], seed: int) -> dict[str, Estimate]:
    """Estimate the share of each verdict; cells without one are left out."""
    judged = [[verdict for verdict in row if verdict is not None] for row in rows]
    judged = [row for row in judged if row]
    if not judged:
        return {}
    return {name: estimate(np.array([row.count(name) / len(row) for row in judged]), seed=seed) for name in names}


VERDICTS = tuple(str(relation) for relation in Relation if relation is not Relation.UNKNOWN)

SYSTEM = """You compare names of cell types. You are given the right name of a cell and the name that was answered.
Reply with one word:
equivalent - both names mean the same cell type
broader - the answered type includes the right one, and more
narrower - the answered type is a subtype of the right one
lineage - neither includes the other, but both are close relatives of the same lineage
different - anything else"""

# Reasoning models think before the word.
SAMPLING = Sampling(max_tokens=4096)

TypePair = tuple[str, str]  # answered, gold


class Verdicts(NamedTuple):
    """What the judge said."""

    # TypePair -> one of ``VERDICTS``
    found: dict[TypePair, str]
    # TypePair -> why there is no verdict
    failures: dict[TypePair, str]


def ask_judge(engine: Engine, pairs: Iterable[TypePair]) -> Verdicts:
    """Have pairs of names judged."""
    verdicts = Verdicts({}, {})
    asked: list[TypePair] = []
    for pair in dict.fromkeys(pairs):
        if normalise(pair[0]) == normalise(pair[1]):
            verdicts.found[pair] = str(Relation.EQUIVALENT)
        else:
            asked.append(pair)

    def keep(pair: TypePair, result: Completion | Failure) -> None:
        if isinstance(result, Failure):
            verdicts.failures[pair] = result.error
        elif verdict := read_verdict(result.text):
            verdicts.found[pair] = verdict
        else:
            verdicts.failures[pair] = "the judge's reply is none of the words asked for"

    ask(engine, asked, _request, keep, SAMPLING)
    return verdicts


def _request(pair: TypePair) -> Request:
    # One line each: what a model answered must not look like a part of the question.
    answered, gold = (" ".join(name.split())[:200] for name in pair)
    question = f"Right name: {gold}\nAnswered name: {answered}"
    return Request([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])


def read_verdict(reply: str) -> str:
    """Read the judge's reply."""
    lines = reply.rpartition(THINK_CLOSE)[2].strip().splitlines()
    words = set(re.findall(r"[a-z]+", lines[-1].lower())) if lines else set()
    named = [verdict for verdict in VERDICTS if verdict in words]
    return named[0] if len(named) == 1 else ""
