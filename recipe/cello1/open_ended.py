"""Open-ended answers, which name types freely: scored by what the names mean, not by how they are spelled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from recipe.cello1.engine import Engine
from recipe.cello1.intervals import estimate
from recipe.cello1.judge import VERDICTS, Pair, ask_judge
from recipe.cello1.ontology import CellOntology, Relation
from recipe.cello1.scored import Scored, per_puzzle

NO_ANSWER = "no answer"
_MOST_NAMES = 20  # unknown names listed


def by_ontology(answers: Sequence[Scored], ontology: CellOntology, *, seed: int = 0) -> dict[str, Any]:
    """Relate each answered type to the gold of its cell by the Cell Ontology.

    Parameters
    ----------
    answers
        Scored answers, at least one.
    ontology
        The ontology.
    seed
        Seed of the bootstrap.

    Returns
    -------
    ``version``; ``relations`` (relation, or ``"no answer"`` for cells of malformed answers -> estimate of the share of
    cells, over puzzles); ``distance`` (estimate over the puzzles with a cell of which both terms are known, or
    ``None``); ``unknown`` (the most frequent names the ontology has not -> count).
    """
    unknown: Counter[str] = Counter()
    distances: list[float] = []
    verdicts: list[list[str | None]] = []
    for group in per_puzzle(answers).values():
        row: list[str | None] = []
        apart: list[int] = []
        for pair in _pairs(group):
            if pair is None:
                row.append(NO_ANSWER)
                continue
            match = ontology.compare(*pair)
            row.append(str(match.relation))
            unknown.update(name for name, term in zip(pair, (match.answer, match.gold), strict=True) if not term)
            if match.distance is not None:
                apart.append(match.distance)
        verdicts.append(row)
        if apart:
            distances.append(float(np.mean(apart)))
    return {
        "version": ontology.version,
        "relations": _shares(verdicts, (*map(str, Relation), NO_ANSWER), seed),
        "distance": estimate(np.array(distances), seed=seed).as_dict() if distances else None,
        "unknown": dict(unknown.most_common(_MOST_NAMES)),
    }


def by_judge(answers: Sequence[Scored], engine: Engine, *, seed: int = 0) -> dict[str, Any]:
    """Have a language model relate each answered type to the gold of its cell.

    Parameters
    ----------
    answers
        Scored answers, at least one.
    engine
        The judge.
    seed
        Seed of the bootstrap.

    Returns
    -------
    ``model``; ``relations`` as :func:`by_ontology`, over the cells that were judged; ``n_judged`` and ``n_failed``
    (cells); ``failures`` (reason -> pairs of names).
    """
    rows = [_pairs(group) for group in per_puzzle(answers).values()]
    said = ask_judge(engine, [pair for row in rows for pair in row if pair is not None])
    verdicts = [[NO_ANSWER if pair is None else said.found.get(pair) for pair in row] for row in rows]
    cells = [verdict for row in verdicts for verdict in row]
    return {
        "model": engine.model,
        "relations": _shares(verdicts, (*VERDICTS, NO_ANSWER), seed),
        "n_judged": sum(verdict is not None for verdict in cells),
        "n_failed": sum(verdict is None for verdict in cells),
        "failures": dict(Counter(said.failures.values()).most_common()),
    }


def _pairs(group: Sequence[Scored]) -> list[Pair | None]:
    """Return answered and gold name of each cell in each answer to a puzzle; ``None`` where none was answered."""
    pairs: list[Pair | None] = []
    for answer in group:
        named = answer.score.items
        if len(named) == len(answer.gold):  # a type named twice is no fault of an open-ended answer
            pairs += zip(named, answer.gold, strict=True)
        else:
            pairs += [None] * len(answer.gold)
    return pairs


def _shares(rows: Sequence[Sequence[str | None]], names: Sequence[str], seed: int) -> dict[str, Any]:
    """Estimate the share of each verdict; cells without one are left out."""
    judged = [[verdict for verdict in row if verdict is not None] for row in rows]
    judged = [row for row in judged if row]
    if not judged:
        return {}
    return {
        name: estimate(np.array([row.count(name) / len(row) for row in judged]), seed=seed).as_dict() for name in names
    }
