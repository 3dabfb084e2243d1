"""Several answers to each puzzle: what each rule that combines them is worth, and whether the votes are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recipe.cello1.evaluation.intervals import calibration, estimate, paired_difference
from recipe.cello1.evaluation.scores import Scored, per_puzzle
from recipe.cello1.formats.predictions import has_logprobs, record_weights
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.scoring import Score, score_answer
from recipe.cello1.task.voting import consensus, likeliest, majority, medoid, read_answers

RULED = ("cell_accuracy", "exact_match", "legal")
CONSENSUS = "consensus"
GREEDY = "greedy"
BEST = "best of all (needs the gold)"  # no rule, but what choosing well could reach at most

_Triple = tuple[float, ...]  # the values of RULED


def compare_rules(
    answers: Sequence[Scored],
    greedy: Sequence[Scored] | None = None,
    *,
    weighted: bool | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the rules that combine several answers."""
    groups = {index: group for index, group in per_puzzle(answers).items() if group[0].candidates}
    if not any(len(group) > 1 for group in groups.values()):
        return {}
    alone = per_puzzle(greedy) if greedy is not None else {}
    if greedy is not None:
        groups = {index: group for index, group in groups.items() if index in alone}
        if not groups:
            msg = "the greedy answers are to other puzzles; nothing can be compared"
            raise ValueError(msg)
    have = all(has_logprobs([answer.record for answer in group]) for group in groups.values())
    if weighted and not have:
        msg = "weighted, but some predictions have no 'logprob'; predict with --logprobs"
        raise ValueError(msg)
    weighted = have if weighted is None else weighted
    rows: list[dict[str, _Triple]] = []
    confidence: list[float] = []
    right: list[bool] = []
    for index, group in groups.items():
        row, found = _rule_all(group, have, weighted)
        if greedy is not None:
            if alone[index][0].gold != group[0].gold:
                msg = f"item {index} has another gold in the greedy run; they are not of the same data set"
                raise ValueError(msg)
            row = {GREEDY: _mean(alone[index]), **row}
        rows.append(row)
        confidence += found.probability.tolist()
        right += [name.lower() == gold.lower() for name, gold in zip(found.types, group[0].gold, strict=True)]
    names = list(rows[0])
    values = {rule: np.array([row[rule] for row in rows]) for rule in names}
    rules = {rule: _describe(values[rule], values[CONSENSUS], rule == CONSENSUS, seed) for rule in names}
    return {"rules": rules, "calibration": calibration(np.array(confidence), np.array(right))}


def _rule_all(group: Sequence[Scored], have: bool, weighted: bool) -> tuple[dict[str, _Triple], Any]:
    """Apply every rule to the answers to one puzzle; those that need log-probabilities where all answers have them."""
    gold, candidates = group[0].gold, group[0].candidates or ()
    given = read_answers([answer.record["prediction"] for answer in group], len(gold))
    records = [answer.record for answer in group]
    weights = record_weights(records) if have else None
    found = consensus(given, candidates, len(gold), weights=weights if weighted else None)
    ruled = {"majority": majority(given, candidates, len(gold)), "medoid": medoid(given), CONSENSUS: found.types}
    if weights is not None:
        ruled["likeliest"] = likeliest(given, weights)
        other = consensus(given, candidates, len(gold), weights=None if weighted else weights)
        ruled["unweighted consensus" if weighted else "weighted consensus"] = other.types
    row = {"one sample": _mean(group)}
    row |= {rule: _triple(score_answer(_text(types), gold)) for rule, types in ruled.items()}
    row[BEST] = max(_triple(answer.score) for answer in group)
    return row, found


def _describe(values: np.ndarray, best: np.ndarray, itself: bool, seed: int) -> dict[str, Any]:
    estimates = {name: estimate(values[:, j], seed=seed).as_dict() for j, name in enumerate(RULED)}
    if not itself:
        estimates["behind"] = paired_difference(values[:, 0], best[:, 0], seed=seed).as_dict()
    return estimates


def _triple(score: Score) -> _Triple:
    return score.cell_accuracy, float(score.exact_match), float(not score.reason)


def _mean(group: Sequence[Scored]) -> _Triple:
    return tuple(np.mean([_triple(answer.score) for answer in group], axis=0).tolist())


def _text(types: Sequence[str] | None) -> str:
    """Write voted types as an answer; none, and names of a sample that cannot stand in one, make it malformed."""
    try:
        return "" if types is None else format_answer(types)
    except ValueError:
        return ""
