"""Ways of answering the same puzzles side by side: rules that combine several answers, decodings, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from recipe.cello1.evaluation.intervals import estimate, paired_difference
from recipe.cello1.evaluation.results import Way
from recipe.cello1.evaluation.scores import MEASURED, Scored, Scores, weights_of
from recipe.cello1.task.scoring import score_types
from recipe.cello1.task.voting import consensus, likeliest, logprob_weights, majority, medoid

RULED = ("partial_accuracy", "strict_accuracy", "exact_match", "legal", "length")
CONSENSUS = "consensus"
ONE_SAMPLE = "one_sample"
BEST = "best_of_all"  # no rule, but what choosing well could reach at most


def combine(scores: Scores, *, weighted: bool | None = None) -> dict[str, Scores]:
    """Combine the answers to each puzzle by every rule; nothing where no puzzle has several."""
    groups = {index: group for index, group in scores.groups().items() if group[0].puzzle.candidates}
    if not any(len(group) > 1 for group in groups.values()):
        return {}
    have = all(answer.logprob is not None and answer.tokens for group in groups.values() for answer in group)
    if weighted and not have:
        raise ValueError("weighted, but some predictions have no 'logprob'; predict with --logprobs")
    weighted = have if weighted is None else weighted
    found: dict[str, list[Scored]] = {ONE_SAMPLE: [answer for group in groups.values() for answer in group]}
    for group in groups.values():
        for rule, answer in _rule_all(group, have, weighted).items():
            found.setdefault(rule, []).append(answer)
    return {rule: Scores(tuple(answers)) for rule, answers in found.items()}


def _rule_all(group: Sequence[Scored], have: bool, weighted: bool) -> dict[str, Scored]:
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
    scored = {rule: score_types(types, gold, candidates=candidates) for rule, types in ruled.items()}
    scored[BEST] = max((answer.score for answer in group), key=lambda s: (s.partial_accuracy, s.exact_match, s.legal))
    tokens = [answer.tokens for answer in group if answer.tokens is not None]
    whole = replace(
        group[0],
        sample=0,
        words=sum(answer.words for answer in group),
        tokens=sum(tokens) if len(tokens) == len(group) else None,
        confidence=None,
    )
    sure = {CONSENSUS: tuple(found.probability.tolist())}
    return {rule: replace(whole, score=score, confidence=sure.get(rule)) for rule, score in scored.items()}


def side_by_side(runs: Mapping[str, Scores], best: str, *, seed: int = 0) -> dict[str, Way]:
    """Measure ways of answering on the puzzles that all have answered, and how far one of them is ahead of each."""
    groups = [run.groups() for run in runs.values()]
    common = set(groups[0]).intersection(*groups[1:])
    if not common:
        raise ValueError(f"{' and '.join(runs)}: the answers are to other puzzles; nothing can be compared")
    for index in sorted(common):
        if len({own[index][0].puzzle.answer for own in groups}) > 1:
            msg = f"item {index} has another gold in one of {', '.join(runs)}; they are not of the same data set"
            raise ValueError(msg)
    kept = {name: run.of(common) for name, run in runs.items()}
    unit = "words" if any(run.length_unit == "words" for run in kept.values()) else "tokens"
    columns = [MEASURED.index(name) for name in RULED]
    arrays = {name: run.arrays(unit) for name, run in kept.items()}
    found = {}
    for way, (values, n_cells) in arrays.items():
        weights = [weights_of(name, n_cells) for name in RULED]
        metrics = {
            name: estimate(values[:, j], seed=seed, weights=own)
            for name, j, own in zip(RULED, columns, weights, strict=True)
        }
        first, j = arrays[best][0], columns[0]
        behind = None
        if way != best:
            behind = paired_difference(values[:, j], first[:, j], seed=seed, weights=weights[0])
        found[way] = Way(metrics, kept[way].calibration(way), behind)
    return found
