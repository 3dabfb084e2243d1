"""Probabilities instead of votes, from an engine that can score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from recipe.cello1.engines.asking import request_key
from recipe.cello1.engines.protocol import Completion, Engine, EngineError, Failure, Request, Sampling, sample_seed
from recipe.cello1.engines.read_out import Reading, read_out, read_out_sampling
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import Layout, annotation_messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.trace import SECOND_LINE, first_decision, first_line
from scverse_plugin.method._ask import Cache, Reply, advice

ReadOut = Literal["matrix", "soft"]  # as in recipe.cello1.engines.read_out
SUPPORTS = ("auto", "votes", "readout")
_PROBE = Sampling(max_tokens=128, stop=SECOND_LINE)  # room for the first line of a trace


def check_readout(engine: Engine | type[Engine]) -> None:
    """Check that an engine gives probabilities."""
    if not getattr(engine, "can_score", False):
        raise ValueError(
            f"support='readout' needs the probabilities of texts, and the engine {engine.name!r} gives none; use vllm "
            "or transformers, or support='votes'"
        )


def find_way(engine: Engine, puzzle: Puzzle, layout: Layout) -> ReadOut:
    """Look at how the model begins: a trace that goes cell by cell can be read with each cell at the front."""
    for _, done in engine.generate(iter([Request(annotation_messages(puzzle, layout))]), _PROBE):
        if not isinstance(done, Completion) or not done.text.startswith(first_line()):
            continue
        if first_decision(done.text).lower() in map(str.lower, puzzle.candidates):
            return "matrix"
    return "soft"


def ask_out(
    engine: Engine,
    puzzles: Sequence[Puzzle],
    *,
    way: ReadOut,
    layout: Layout,
    sampling: Sampling,
    seeds: Sequence[int],
    cache: Cache | None,
    on_error: str = "raise",
    progress: bool = True,
) -> list[Reply]:
    """Read puzzles out."""
    if not puzzles:
        return []
    write = partial(annotation_messages, layout=layout)
    of_samples = read_out_sampling(way, sampling, True)
    todo: dict[str, tuple[int, Puzzle]] = {}
    replies: dict[str, Reply] = {}
    keys = []
    for i, puzzle in enumerate(puzzles):
        seed = sample_seed(seeds[0], i, 0) if sampling.temperature > 0 else None
        # No completion is asked for with this prefix.
        request = Request(write(puzzle), seed, prefix=f"read out: {way}, others in a circle")
        keys.append(key := request_key(engine, request, of_samples))
        kept = cache[key] if cache is not None and key in cache else {}
        if kept and ((table := _table(kept, puzzle)) is not None or kept.get("probabilities") is None):
            facts = {name: kept[name] for name in ("text", "finish_reason", "tokens", "prompt_tokens")}
            replies[key] = Reply(**facts, seed=-1 if seed is None else seed, cached=True, probabilities=table)
        elif key not in replies:
            todo.setdefault(key, (i, puzzle))
    names = {i: key for key, (i, _) in todo.items()}
    with tqdm(
        total=len(todo), desc="cello1", unit="puzzle", disable=not progress or not todo, dynamic_ncols=True
    ) as bar:
        for i, result in read_out(engine, list(todo.values()), sampling, way, seed=seeds[0], write=write):
            seed = sample_seed(seeds[0], i, 0) if sampling.temperature > 0 else -1
            bar.update()
            if isinstance(result, Failure):
                if on_error == "raise":
                    raise EngineError(advice(result.error, len(replies), len(set(keys)), cache))
                replies[names[i]] = Reply(None, seed=seed, error=result.error)
                continue
            # An answer in which nothing could be read is no vote, and is counted as a failure.
            table = result.probabilities if result.scored else None
            record: dict[str, Any] = {"text": _text(result, way), "finish_reason": "stop"}
            record |= {"tokens": result.tokens, "prompt_tokens": result.prompt_tokens}
            if cache is not None:
                shown = None if table is None else table.tolist()
                cache.add(names[i], {"key": names[i], **record, "probabilities": shown})
            replies[names[i]] = Reply(**record, seed=seed, probabilities=table)
    return [replies[key] for key in keys]


def _table(record: Any, puzzle: Puzzle) -> np.ndarray | None:
    """Return the kept probabilities, if they are what this puzzle has."""
    try:
        table = np.asarray(record.get("probabilities"), dtype=float)
    except (TypeError, ValueError):
        return None
    sound = table.shape == (puzzle.n_cells, len(puzzle.candidates)) and np.isfinite(table).all() and (table >= 0).all()
    return table if sound else None


def _text(reading: Reading, way: ReadOut) -> str:
    """Write a reading as a response: the one that was read, or the evidence of each cell as reasoning."""
    if way == "soft":
        return reading.said[0]
    answer = reading.answer()
    said = zip(reading.said, answer, strict=True)
    lines = [f"Cell {i}: {' '.join(evidence.split())} -> {name}" for i, (evidence, name) in enumerate(said, 1)]
    return format_answer(answer, "\n".join(lines))
