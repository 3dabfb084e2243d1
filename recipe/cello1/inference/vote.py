"""Combine several predictions for each puzzle into one.

``python -m recipe.cello1 vote predictions.jsonl --out voted.jsonl``
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import check_place, write_items
from recipe.cello1.formats.items import item_to_puzzle
from recipe.cello1.formats.predictions import RUN_KEYS, check_prediction, has_logprobs, read_predictions, record_weights
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import VARIANTS, Variant
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.voting import Answer, consensus, likeliest, majority, medoid, read_answers

RULES = ("consensus", "majority", "medoid", "likeliest")

# Keys of a record that are no part of its item: what one answer is, and how all of a run were made.
_OF_ONE_ANSWER = ("prediction", "error", "sample", "tokens", "prompt_tokens", "finish_reason", "logprob")
_OF_THE_RUN = ("index", *RUN_KEYS)


def vote_records(
    records: Sequence[Mapping[str, Any]],
    *,
    rule: str = "consensus",
    weighted: bool | None = None,
    smoothing: float = 0.5,
    variant: Variant = "batch",
) -> list[dict[str, Any]]:
    """Turn several predictions for each item into one prediction record; items that only failed keep their error."""
    # With the reasoning of the first response that gave just this answer, if one did, and the answers it is made of
    # (`voted`, their `weights`, and the `cells` of a consensus).
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if weighted is None:
        weighted = has_logprobs(records)
    weighted = rule == "likeliest" or (weighted and rule == "consensus")
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["index"], []).append(record)
    voted = []
    for index in sorted(groups):
        group = sorted(groups[index], key=lambda record: record.get("sample", 0))
        answered = [record for record in group if check_prediction(record, f"prediction {index}")]
        base = {key: value for key, value in group[0].items() if key not in _OF_ONE_ANSWER} | {"sample": 0}
        if not answered:
            voted.append({**base, "error": group[0]["error"]})
            continue
        item = {key: value for key, value in base.items() if key not in _OF_THE_RUN}
        puzzle = item_to_puzzle(item, index, variant, require_gold=False)
        voted.append({**base, **_vote(puzzle, answered, rule, weighted, smoothing, index)})
    return voted


def _vote(
    puzzle: Puzzle,
    answered: Sequence[Mapping[str, Any]],
    rule: str,
    weighted: bool,
    smoothing: float,
    index: int,
) -> dict[str, Any]:
    if not puzzle.candidates:
        raise ValueError(f"item {index} has no candidates to vote for")
    answers = read_answers([record["prediction"] for record in answered], puzzle.n_cells)
    found: dict[str, Any] = {"rule": rule, "voted": [None if answer is None else list(answer) for answer in answers]}
    for name in ("tokens", "prompt_tokens"):  # what all of them took
        if all(isinstance(record.get(name), int) for record in answered):
            found[name] = sum(record[name] for record in answered)
    weights = None
    if weighted:
        if missing := [record.get("sample", 0) for record in answered if record.get("logprob") is None]:
            raise ValueError(f"prediction {index}, sample {missing[0]} has no 'logprob'; predict with --logprobs")
        weights = record_weights(answered)
        found["weights"] = weights.tolist()
    types: Answer | None
    if rule == "consensus":
        result = consensus(answers, puzzle.candidates, puzzle.n_cells, weights=weights, smoothing=smoothing)
        types = result.types
        found["cells"] = result.cells()
    elif rule == "majority":
        types = majority(answers, puzzle.candidates, puzzle.n_cells)
    else:
        types = medoid(answers) if weights is None else likeliest(answers, weights)
    # Without one usable answer there is nothing to choose from: an empty response, which is scored as malformed.
    return found | {"prediction": "" if types is None else _text_for(types, answers, answered)}


def _text_for(types: Answer, answers: Sequence[Answer | None], answered: Sequence[Mapping[str, Any]]) -> str:
    """Return the first response that gives just this answer, for its reasoning; else the answer alone."""
    wanted = [name.lower() for name in types]
    for answer, record in zip(answers, answered, strict=True):
        if answer is not None and [name.lower() for name in answer] == wanted:
            return record["prediction"]
    return format_answer(types)


def add_weighted(parser: argparse.ArgumentParser) -> None:
    """Add the switch of weighing by log-probability."""
    parser.add_argument(
        "--weighted",
        action=argparse.BooleanOptionalAction,
        help="weigh the answers by log-probability (default: where every prediction has it)",
    )


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(description="Combine several predictions for each item into one.")
    parser.add_argument("predictions", type=Path, help="predictions with several samples for each item")
    parser.add_argument("--out", type=Path, required=True, help="voted predictions, .jsonl or .json")
    parser.add_argument("--rule", default="consensus", choices=RULES)
    add_weighted(parser)
    parser.add_argument("--smoothing", type=float, default=0.5)
    parser.add_argument("--variant", default="batch", choices=sorted(VARIANTS))
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_place(args.out)
    records = read_predictions(args.predictions)
    voted = vote_records(
        records, rule=args.rule, weighted=args.weighted, smoothing=args.smoothing, variant=args.variant
    )
    write_items(args.out, voted)
    print(f"{len(records)} predictions combined into {len(voted)}: {args.out}")
