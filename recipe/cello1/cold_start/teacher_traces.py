"""Collect reasoning traces from a teacher model, keeping those with the right answer.

    python -m recipe.cello1 traces teacher --data puzzles.json --out sft.json --base-url URL --model NAME --tries 8

Asks any server with an OpenAI-compatible chat API for each puzzle, up to ``--tries`` times with seeds of their own,
and keeps the first response that scores 1.0 and holds reasoning. The key comes from ``OPENAI_API_KEY`` alone.

Files: ``OUT``, the accepted puzzles with their traces in the order of the data, for
:mod:`~recipe.cello1.cold_start.sft`;
``OUT`` with ``.tries.jsonl``, every response as it comes in; ``OUT`` with ``.report.json``, the acceptance by number of
cells. Started again, the command goes on from the responses it has; with more ``--tries`` it asks again for what was
rejected. A failure of the machinery is no response: it uses up no try, and is asked again next time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.cello1.engines.asking import ask
from recipe.cello1.engines.options import add_sampling, add_server, engine_options, sampling_of
from recipe.cello1.engines.protocol import Completion, Engine, Failure, Request, Sampling, sample_seed
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import atomic_write, check_place, dumps
from recipe.cello1.formats.items import REASONING_KEY, puzzle_to_item
from recipe.cello1.formats.journal import Journal
from recipe.cello1.formats.provenance import check_same, digest
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.task.answer import Reason, parse_answer
from recipe.cello1.task.prompt import Layout, Variant, check_layout, messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import score_answer

TEACHER_KEY = "teacher"  # of the accepted items: the name of the model
NO_REASONING = "no_reasoning"
WRONG = "wrong"
_TEMPERATURE = 0.7
_MAX_TOKENS = 8192  # teachers reason at length
_RUN_KEY = "run"  # the first line of the journal


@dataclass(slots=True)
class _State:
    """What is known of one puzzle."""

    tries: int = 0
    accepted: str | None = None  # the reasoning
    failed: str = ""
    reasons: list[str] = field(default_factory=list)
    tokens: int = 0
    cut: int = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        self.failed = (entry["error"] or "unknown error") if "error" in entry else ""
        if self.failed:
            return
        self.tries += 1
        self.tokens += entry["tokens"]
        self.cut += entry["finish_reason"] == "length"
        if entry["accepted"]:
            self.accepted = parse_answer(entry["text"]).reasoning
        else:
            self.reasons.append(entry["reason"])


def judge(text: str, puzzle: Puzzle) -> tuple[bool, str, float]:
    """Decide on a response."""
    score = score_answer(text, puzzle.answer or ())
    if score.score < 1:
        return False, str(score.reason) if score.reason != Reason.OK else WRONG, score.score
    if not parse_answer(text).reasoning.strip():
        return False, NO_REASONING, score.score
    return True, "", score.score


def ask_teacher(
    engine: Engine,
    puzzles: Sequence[Puzzle],
    journal: str | Path,
    *,
    tries: int = 4,
    sampling: Sampling | None = None,
    seed: int = 0,
    layout: Layout = "system",
    variant: Variant = "batch",
    progress: bool = True,
) -> tuple[list[Puzzle], dict[str, Any]]:
    """Collect traces, going on from what the journal holds."""
    sampling = sampling or Sampling(temperature=_TEMPERATURE)
    if not puzzles:
        raise ValueError("puzzles is empty; there is nothing to ask")
    if lacking := [index for index, puzzle in enumerate(puzzles) if puzzle.answer is None]:
        msg = f"puzzle {lacking[0]} has no answer, so that no response to it can be judged; give data with gold answers"
        raise ValueError(msg)
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")
    if tries > 1 and sampling.temperature == 0:
        msg = f"tries is {tries}, but at temperature 0 all responses are the same; set a temperature, 0.7 for example"
        raise ValueError(msg)
    run = {
        "engine": engine.name,
        "model": engine.model,
        "fingerprint": engine.fingerprint,
        "sampling": sampling.as_dict() | {"seed": seed},
        "prompt_layout": check_layout(layout),
        "variant": variant,
    }
    asked = [_without_trace(puzzle) for puzzle in puzzles]
    digests = [digest(puzzle_to_item(puzzle, variant), 12) for puzzle in asked]
    states = [_State() for _ in asked]

    def request(index: int) -> Request:
        own_seed = sample_seed(seed, index, states[index].tries) if sampling.temperature > 0 else None
        return Request(messages(asked[index], layout, variant), own_seed)

    def keep(index: int, result: Completion | Failure) -> None:
        entry = _entry(result, asked[index], index, states[index].tries, digests[index])
        answers.add((index, states[index].tries), entry)
        states[index].add(entry)
        bar.update(_is_done(states[index], tries))

    path = Path(journal)
    with (
        Journal.held(path),
        tqdm(total=len(asked), desc="teacher", unit="puzzle", disable=not progress, dynamic_ncols=True) as bar,
    ):
        answers = Journal(path, partial(_read, run, digests, states))
        if _RUN_KEY not in answers:
            answers.add(_RUN_KEY, {_RUN_KEY: run})
        bar.update(sum(_is_done(state, tries) for state in states))
        while todo := [i for i, state in enumerate(states) if not _is_done(state, tries) and not state.failed]:
            # One response of each puzzle at a time: most of them need no second one.
            ask(engine, todo, request, keep, sampling)
    kept = [
        replace(puzzle, meta={**puzzle.meta, REASONING_KEY: state.accepted, TEACHER_KEY: engine.model})
        for puzzle, state in zip(asked, states, strict=True)
        if state.accepted is not None
    ]
    return kept, count_traces(asked, states, run, tries)


def _without_trace(puzzle: Puzzle) -> Puzzle:
    return replace(puzzle, meta={k: v for k, v in puzzle.meta.items() if k not in (REASONING_KEY, TEACHER_KEY)})


def _is_done(state: _State, tries: int) -> bool:
    return state.accepted is not None or state.tries >= tries


def _entry(result: Completion | Failure, puzzle: Puzzle, index: int, number: int, digest: str) -> dict[str, Any]:
    common = {"index": index, "try": number, "item": digest}
    if isinstance(result, Failure):
        return {**common, "error": result.error}
    accepted, reason, score = judge(result.text, puzzle)
    return {
        **common,
        "accepted": accepted,
        "reason": reason,
        "score": score,
        "finish_reason": result.finish_reason,
        "tokens": result.tokens,
        "text": result.text,
    }


def _read(
    run: Mapping[str, Any], digests: Sequence[str], states: Sequence[_State], entry: Any, where: str
) -> Hashable | None:
    """Take note of a line of the journal: the first one says of which run it is."""
    if where.endswith(", line 1"):
        found = entry.get(_RUN_KEY) if isinstance(entry, Mapping) else None
        if not isinstance(found, Mapping):
            msg = f"{where.removesuffix(', line 1')} is not a journal of a teacher; choose another out, or remove it"
            raise ValueError(msg)
        check_same(found, run, where)
        return _RUN_KEY
    index = entry.get("index") if isinstance(entry, Mapping) else None
    if type(index) is not int or index < 0 or not {"item", "try"} <= entry.keys():
        raise ValueError(f"{where} is not a response of a teacher; choose another out, or remove it")
    if index >= len(states):  # of a run over more of the data
        return None
    if entry["item"] != digests[index]:
        raise ValueError(f"{where}: item {index} is not the one of these data; choose another out, or remove it")
    if "error" in entry:  # it is asked again
        return None
    states[index].add(entry)
    return index, entry["try"]


# ---------------------------------------------------------------------------------------------------------- report


def count_traces(
    puzzles: Sequence[Puzzle], states: Sequence[_State], run: Mapping[str, Any], tries: int
) -> dict[str, Any]:
    """Count what was accepted, by number of cells."""
    sizes = sorted({puzzle.n_cells for puzzle in puzzles})
    pairs = list(zip(puzzles, states, strict=True))
    by_size = {str(n): _counts([state for puzzle, state in pairs if puzzle.n_cells == n]) for n in sizes}
    total = _counts(states)
    return {
        "run": dict(run),
        "tries": tries,
        "complete": total["failed"] == 0,
        "errors": dict(Counter(state.failed for state in states if state.failed).most_common()),
        "total": total,
        "by_n_cells": by_size,
    }


def _counts(states: Sequence[_State]) -> dict[str, Any]:
    accepted = sum(state.accepted is not None for state in states)
    failed = sum(bool(state.failed) for state in states)
    responses = sum(state.tries for state in states)
    decided = len(states) - failed
    return {
        "puzzles": len(states),
        "accepted": accepted,
        "rejected": decided - accepted,
        "failed": failed,
        "accepted_share": accepted / decided if decided else None,
        "responses": responses,
        "response_share": accepted / responses if responses else None,
        "cut": sum(state.cut for state in states),
        "mean_tokens": sum(state.tokens for state in states) / responses if responses else None,
        "reasons": dict(Counter(reason for state in states for reason in state.reasons).most_common()),
    }


def report_table(found: Mapping[str, Any]) -> str:
    """Write a report as a Markdown table."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    lines = [
        "| cells | puzzles | accepted | rejected | failed | accepted of decided | responses | accepted of responses |",
        "| --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in [*found["by_n_cells"].items(), ("all", found["total"])]:
        lines.append(
            f"| {name} | {row['puzzles']} | {row['accepted']} | {row['rejected']} | {row['failed']} "
            f"| {share(row['accepted_share'])} | {row['responses']} | {share(row['response_share'])} |"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- command


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        description="Collect traces from a teacher, keeping those with the right answer; resumes what was interrupted.",
        epilog="The key of the server comes from the environment variable OPENAI_API_KEY.",
    )
    parser.add_argument("--data", required=True, type=Path, help="puzzles with answers: .json, .jsonl or .parquet")
    parser.add_argument("--out", required=True, type=Path, help="the accepted puzzles with traces: .json or .jsonl")
    parser.add_argument("--tries", type=int, default=4, help="most responses for each puzzle (default %(default)s)")
    add_sampling(parser, temperature=_TEMPERATURE, max_tokens=_MAX_TOKENS)
    add_server(parser)
    return parser


AFTER_INTERRUPT = "; responses so far are kept: run the same command again to resume"


def run(args: argparse.Namespace) -> str | None:
    """Run the command."""
    check_place(args.out)
    if args.out.suffix not in (".json", ".jsonl"):
        raise ValueError(f"out: {args.out} must end in .json or .jsonl")
    if args.out.resolve() == args.data.resolve():
        raise ValueError(f"out is the file of the data, {args.data}; give another one")
    sampling, options = sampling_of(args), engine_options(args)
    data = load_puzzles(args.data, args.variant, args.prompt_layout)
    with start_engine(args.engine, args.model, **options) as engine:
        kept, found = ask_teacher(
            engine,
            data.puzzles[: args.limit],
            args.out.with_suffix(".tries.jsonl"),
            tries=args.tries,
            sampling=sampling,
            seed=args.seed,
            layout=data.layout,
            variant=data.variant,
        )
    atomic_write(args.out.with_suffix(".report.json"), dumps(found, indent=1) + "\n")
    if kept:
        write_puzzles(args.out, kept, data.variant)
    print(report_table(found))
    missing = []
    if not kept:
        common = max(found["total"]["reasons"].items(), key=lambda entry: entry[1], default=("no response", 0))[0]
        missing.append(f"no trace was accepted (most often: {common}), so {args.out} is not written")
    if not found["complete"]:
        worst = next(iter(found["errors"]))
        missing.append(
            f"{found['total']['failed']} puzzles failed, most often with: {worst}; run the same command again to "
            "retry them"
        )
    return "; ".join(missing) or None
