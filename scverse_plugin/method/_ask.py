"""Puzzles to responses: one engine, one cache, every failure kept apart from an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from recipe.cello1.engines.protocol import Engine, EngineError, Failure, Request, Sampling
from recipe.cello1.formats.atomic import append_jsonl, dumps, read_items
from recipe.cello1.task.prompt import Layout, Variant, messages
from recipe.cello1.task.puzzle import Puzzle

ON_ERROR = ("raise", "skip")


@dataclass(frozen=True, slots=True)
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


class Cache:
    """Responses kept in a ``.jsonl`` file, one a line, written as they come in."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._known: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        if self.path.suffix != ".jsonl":
            msg = f"cache: {self.path} must end in .jsonl; it is a file with one response a line"
            raise ValueError(msg)
        if self.path.is_file():
            for number, record in enumerate(read_items(self.path, drop_partial_tail=True), start=1):
                if not isinstance(record, dict) or not isinstance(record.get("key"), str) or "text" not in record:
                    msg = f"cache: line {number} of {self.path} is no response; give another file"
                    raise ValueError(msg)
                self._known[record["key"]] = record

    def get(self, key: str, seed: int) -> Reply | None:
        """Look a response up."""
        found = self._known.get(key)
        if found is None:
            return None
        tokens, prompt_tokens = (int(found.get(name, 0)) for name in ("tokens", "prompt_tokens"))
        reason = str(found.get("finish_reason", ""))
        return Reply(found["text"], reason, tokens=tokens, prompt_tokens=prompt_tokens, seed=seed, cached=True)

    def add(self, key: str, reply: Reply) -> None:
        """Keep a response."""
        if self.path is None:
            return
        record = {
            "key": key,
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "tokens": reply.tokens,
            "prompt_tokens": reply.prompt_tokens,
        }
        append_jsonl(self.path, record)
        self._known[key] = record


def request_key(engine: Engine, request: Request, sampling: Sampling) -> str:
    """Return what two requests share only if they ask the same of the same model in the same way."""
    what = {
        "engine": engine.name,
        "model": engine.model,
        "fingerprint": engine.fingerprint,
        "server": str(getattr(engine, "base_url", "") or ""),
        "constraint": engine.constraint if request.n_answers else "",
        "sampling": sampling.as_dict(),
        "seed": request.seed,
        "candidates": list(request.candidates),
        "n_answers": request.n_answers,
        "messages": [dict(message) for message in request.messages],
    }
    return hashlib.sha256(dumps(what).encode()).hexdigest()[:40]


def ask(
    engine: Engine,
    puzzles: Sequence[Puzzle],
    *,
    layout: Layout,
    variant: Variant,
    sampling: Sampling,
    seeds: Sequence[int],
    constrain: bool,
    cache: Cache,
    on_error: str = "raise",
    progress: bool = True,
) -> list[Reply]:
    """Put puzzles to an engine."""
    requests: list[Request] = []
    keys: list[str] = []
    for puzzle, seed in zip(puzzles, seeds, strict=True):
        legal = (puzzle.candidates, puzzle.n_cells) if constrain else ()
        own = int(seed) if sampling.temperature > 0 else None
        requests.append(Request(messages(puzzle, layout, variant), own, *legal))
        keys.append(request_key(engine, requests[-1], sampling))
    replies: dict[str, Reply] = {}
    todo: list[tuple[str, Request]] = []
    for key, request in dict(zip(keys, requests, strict=True)).items():  # the same request is asked once
        found = cache.get(key, -1 if request.seed is None else request.seed)
        if found is None:
            todo.append((key, request))
        else:
            replies[key] = found
    failed: list[str] = []

    def waiting() -> Iterator[Request]:
        for _, request in todo:
            if failed and on_error == "raise":
                return
            yield request

    if todo:
        with tqdm(total=len(todo), desc="cello1", unit="puzzle", disable=not progress, dynamic_ncols=True) as bar:
            for position, result in engine.generate(waiting(), sampling):
                key, request = todo[position]
                seed = -1 if request.seed is None else request.seed
                if isinstance(result, Failure):
                    failed.append(result.error)
                    replies[key] = Reply(None, seed=seed, error=result.error)
                else:
                    reply = Reply(result.text, result.finish_reason, result.tokens, result.prompt_tokens, seed)
                    replies[key] = reply
                    cache.add(key, reply)
                bar.update()
    if failed and on_error == "raise":
        raise EngineError(_advice(failed, replies, len(set(keys)), cache))
    # An engine that ends early has failed, too: nobody may take that for an answer.
    lost = Reply(None, error="the engine gave no result for this puzzle")
    if on_error == "raise" and any(key not in replies for key in keys):
        raise EngineError(_advice([lost.error], replies, len(set(keys)), cache))
    return [replies.get(key, lost) for key in keys]


def _advice(failed: Sequence[str], replies: dict[str, Reply], total: int, cache: Cache) -> str:
    done = sum(reply.text is not None for reply in replies.values())
    kept = (
        f"The {done} finished ones are kept in {cache.path}: mend the cause and run the same call again, it asks only "
        "what is missing"
        if cache.path is not None
        else 'Mend the cause and run again; with cache="answers.jsonl" a rerun would ask only what is missing'
    )
    return f"{total - done} of {total} puzzles have no answer ({failed[0]}). {kept}, or set on_error='skip'."


def completion_seeds(n: int, rng: np.random.Generator) -> list[int]:
    """Draw a seed for each completion."""
    return rng.integers(2**31, size=n).tolist()
