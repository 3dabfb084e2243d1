"""Several answers to each puzzle: what each rule that combines them is worth, and whether the votes are calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipe.cello1.evaluation.intervals import Estimate, calibration, estimate, paired_difference
from recipe.cello1.evaluation.scores import Scored, Scores, weights_of
from recipe.cello1.task.scoring import Score, score_types
from recipe.cello1.task.voting import Consensus, consensus, likeliest, logprob_weights, majority, medoid

RULED = ("partial_accuracy", "exact_match", "legal")
CONSENSUS = "consensus"
ONE_SAMPLE = "one_sample"
BEST = "best_of_all"  # no rule, but what choosing well could reach at most

_Triple = tuple[float, ...]  # the values of RULED


def compare_rules(
    scores: Scores, others: Mapping[str, Scores], *, weighted: bool | None = None, seed: int = 0
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Any] | None]:
    """Compare the rules that combine several answers, and other answers to the same puzzles; with the calibration."""
    groups = {index: group for index, group in scores.groups().items() if group[0].puzzle.candidates}
    if not any(len(group) > 1 for group in groups.values()):
        return {}, None
    alone = {name: other.groups() for name, other in others.items()}
    groups = {index: group for index, group in groups.items() if all(index in own for own in alone.values())}
    if not groups:
        msg = f"{' and '.join(others)}: the answers are to other puzzles; nothing can be compared"
        raise ValueError(msg)
    have = all(answer.logprob is not None and answer.tokens for group in groups.values() for answer in group)
    if weighted and not have:
        msg = "weighted, but some predictions have no 'logprob'; predict with --logprobs"
        raise ValueError(msg)
    weighted = have if weighted is None else weighted
    rows: list[dict[str, _Triple]] = []
    confidence: list[float] = []
    right: list[bool] = []
    for index, group in groups.items():
        gold = group[0].puzzle.answer
        row, found = _rule_all(group, have, weighted)
        for name, own in reversed(alone.items()):
            if own[index][0].puzzle.answer != gold:
                msg = f"item {index} has another gold in the {name} run; they are not of the same data set"
                raise ValueError(msg)
            row = {name: _mean(own[index]), **row}
        rows.append(row)
        confidence += found.probability.tolist()
        right += [name.lower() == truth.lower() for name, truth in zip(found.types, gold, strict=True)]
    n_cells = np.array([len(group[0].puzzle.answer) for group in groups.values()], dtype=float)
    values = {rule: np.array([row[rule] for row in rows]) for rule in rows[0]}
    rules = {rule: _describe(values[rule], values[CONSENSUS], n_cells, rule == CONSENSUS, seed) for rule in values}
    return rules, calibration(np.array(confidence), np.array(right))


def _rule_all(group: Sequence[Scored], have: bool, weighted: bool) -> tuple[dict[str, _Triple], Consensus]:
    """Apply every rule to the answers to one puzzle; those that need log-probabilities where all answers have them."""
    gold, candidates = group[0].puzzle.answer, group[0].puzzle.candidates or ()
    n = len(gold)
    given = [answer.score.items if len(answer.score.items) == n else None for answer in group]
    weights = logprob_weights([a.logprob or 0 for a in group], [a.tokens or 0 for a in group]) if have else None
    found = consensus(given, candidates, n, weights=weights if weighted else None)
    ruled = {"majority": majority(given, candidates, n), "medoid": medoid(given), CONSENSUS: found.types}
    if weights is not None:
        ruled["likeliest"] = likeliest(given, weights)
        other = consensus(given, candidates, n, weights=None if weighted else weights)
        ruled["unweighted_consensus" if weighted else "weighted_consensus"] = other.types
    row = {ONE_SAMPLE: _mean(group)}
    row |= {rule: _triple(score_types(types, gold, candidates=candidates)) for rule, types in ruled.items()}
    row[BEST] = max(_triple(answer.score) for answer in group)
    return row, found


def _describe(
    values: np.ndarray, best: np.ndarray, n_cells: np.ndarray, itself: bool, seed: int
) -> dict[str, Estimate]:
    weights = {name: weights_of(name, n_cells) for name in RULED}
    found = {name: estimate(values[:, j], seed=seed, weights=weights[name]) for j, name in enumerate(RULED)}
    if not itself:
        found["behind"] = paired_difference(values[:, 0], best[:, 0], seed=seed, weights=weights[RULED[0]])
    return found


def _triple(score: Score) -> _Triple:
    return tuple(float(getattr(score, name)) for name in RULED)


def _mean(group: Sequence[Scored]) -> _Triple:
    return tuple(np.mean([_triple(answer.score) for answer in group], axis=0).tolist())
