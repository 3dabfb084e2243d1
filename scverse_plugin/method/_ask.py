"""Puzzles to responses: one engine, one cache, every failure kept apart from an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from recipe.cello1.engines.asking import ask as ask_all
from recipe.cello1.engines.asking import request_key
from recipe.cello1.engines.protocol import Completion, Engine, EngineError, Failure, Request, Sampling
from recipe.cello1.formats.journal import Journal
from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN, TAGS, THINK_CLOSE, THINK_OPEN, parse_answer
from recipe.cello1.task.prompt import Layout, annotation_messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import shown

ON_ERROR = ("raise", "skip")
# Answers that are all cut, or cannot be read for other reasons, before it is said so instead of asking on.
PATIENCE = 4
MORE_PATIENCE = 20
_COUNTS = ("tokens", "prompt_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What came back for a puzzle."""

    # The response, verbatim; ``None`` if the machinery failed
    text: str | None
    # As the engine reports them
    finish_reason: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    # Seed of the completion; -1 for greedy decoding
    seed: int = -1
    # Why there is no response; empty if there is one
    error: str = ""
    # Whether it came from the cache
    cached: bool = False
    # Of each cell and candidate, where they were read out
    probabilities: np.ndarray | None = None


class Cache(Journal):
    """Responses kept in a ``.jsonl`` file, one a line, written as they come in; for all calls that ask the same."""

    def __init__(self, path: str | Path) -> None:
        if Path(path).suffix != ".jsonl":
            raise ValueError(f"cache: {path} must end in .jsonl; it is a file with one response a line")
        super().__init__(path, _read_key)


def _read_key(record: Any, where: str) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("key"), str) or "text" not in record:
        path, _, number = where.rpartition(", line ")
        raise ValueError(f"cache: line {number} of {path} is not a response; choose another file")
    sound = isinstance(record["text"], str) and isinstance(record.get("finish_reason"), str)
    # What an older version took from a server unchecked is asked again.
    return record["key"] if sound and all(type(record.get(name)) is int for name in _COUNTS) else None


def readable(text: str) -> str:
    """Bring what can be read without guessing, one ``<answer>`` in whatever company, into the form of the training."""
    head, opened, rest = text.partition(ANSWER_OPEN)
    answer, closed, after = rest.partition(ANSWER_CLOSE)
    if not (opened and closed) or any(tag in answer + after for tag in TAGS) or parse_answer(text).ok:
        return text
    reasoning = head.replace(THINK_OPEN, "").replace(THINK_CLOSE, "").strip()
    answer = re.sub(r"\s*\|\s*", " | ", answer.strip())  # a line for each type
    found = f"{THINK_OPEN}{reasoning}{THINK_CLOSE}\n{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"
    return found if parse_answer(found).ok else text


def ask_puzzles(
    engine: Engine,
    puzzles: Sequence[Puzzle],
    *,
    layout: Layout,
    sampling: Sampling,
    seeds: Sequence[int],
    constrain: bool,
    cache: Cache | None,
    on_error: str = "raise",
    progress: bool = True,
    write: Callable[[Puzzle, Layout], list[dict[str, str]]] = annotation_messages,
) -> list[Reply]:
    """Put puzzles to an engine, as ``write`` writes them."""
    requests: dict[str, Request] = {}  # the same request is asked once
    keys: list[str] = []
    for puzzle, seed in zip(puzzles, seeds, strict=True):
        legal = (puzzle.candidates, puzzle.n_cells) if constrain else ()
        own = int(seed) if sampling.temperature > 0 else None
        request = Request(write(puzzle, layout), own, *legal)
        keys.append(request_key(engine, request, sampling))
        requests[keys[-1]] = request
    replies: dict[str, Reply] = {}
    cut = good = failed = 0
    unread: list[str] = []

    def take(key: str, text: str, facts: Mapping[str, Any], cached: bool) -> None:
        nonlocal cut, good
        seed = requests[key].seed
        facts = {name: facts[name] for name in ("finish_reason", *_COUNTS)}
        replies[key] = Reply(readable(text), seed=-1 if seed is None else seed, cached=cached, **facts)
        if parse_answer(replies[key].text).ok:
            good += 1
        elif facts["finish_reason"] == "length":
            cut += 1
        else:
            unread.append(text)

    def keep(key: str, result: Completion | Failure) -> None:
        nonlocal failed
        if isinstance(result, Failure):
            failed += 1
            seed = requests[key].seed
            replies[key] = Reply(None, seed=-1 if seed is None else seed, error=result.error)
            return
        record = {"key": key} | {name: getattr(result, name) for name in ("text", "finish_reason", *_COUNTS)}
        if cache is not None:
            cache.add(key, record)
        take(key, result.text, record, False)

    def useless() -> str:
        if good or cut + len(unread) < (MORE_PATIENCE if unread else PATIENCE):
            return ""
        if not unread:
            return f"all {cut} answers were cut at max_tokens={sampling.max_tokens}; raise it"
        if on_error == "skip":
            return ""
        return (
            f"none of the {cut + len(unread)} answers so far can be read; the first is {shown(unread[0])}. See whether "
            "prompt_layout and puzzle_size suit the model, or set on_error='skip' to go on all the same"
        )

    def stop() -> bool:
        return bool(useless()) or (failed > 0 and on_error == "raise")

    for key in requests:
        if cache is not None and key in cache:
            record = cache[key]
            take(key, record["text"], record, True)
    todo = [key for key in requests if key not in replies]
    with tqdm(
        total=len(todo), desc="cello1", unit="puzzle", disable=not progress or not todo, dynamic_ncols=True
    ) as bar:
        asked = ask_all(engine, todo, requests.__getitem__, keep, sampling, stop=stop, bar=bar)
    if asked.failed and on_error == "raise":
        raise EngineError(advice(next(iter(asked.errors)), cut + good + len(unread), len(requests), cache))
    if why := useless():
        raise EngineError(why)
    return [replies[key] for key in keys]


def advice(error: str, done: int, total: int, cache: Cache | None) -> str:
    """Say what to do when puzzles have no answer."""
    if not done:
        kept = "Mend the cause and run the same call again"
    elif cache is not None:
        kept = (
            f"The {done} finished ones are kept in {cache.path}: mend the cause and run the same call again, it asks "
            "only what is missing"
        )
    else:
        kept = 'Fix the cause and run again; with cache="answers.jsonl" a rerun would ask only what is missing'
    return f"{total - done} of {total} puzzles have no answer ({error}). {kept}, or set on_error='skip'."


def completion_seeds(n: int, rng: np.random.Generator) -> list[int]:
    """Draw a seed for each completion."""
    return rng.integers(2**31, size=n).tolist()
