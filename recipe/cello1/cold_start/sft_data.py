"""The data of the cold start: puzzles with traces, as the tokens of prompts and completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recipe.cello1.formats.chat_template import completion_of, opened_by, prompt_ids, render_chat
from recipe.cello1.formats.items import REASONING_KEY
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import Layout, Variant, messages
from recipe.cello1.task.puzzle import Puzzle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    path: str | Path, layout: Layout = "system", variant: Variant = "batch", *, require_reasoning: bool = True
) -> list[Puzzle]:
    """Read the puzzles to train on."""
    puzzles = load_puzzles(path, variant, layout, require_gold=True).puzzles
    if require_reasoning:
        for index, puzzle in enumerate(puzzles):
            if not str(puzzle.meta.get(REASONING_KEY) or "").strip():
                raise ValueError(
                    f"{path}: item {index} has no reasoning; write traces with recipe.cello1.cold_start.marker_traces, "
                    "or train on answers alone with require_reasoning=false"
                )
    return puzzles


def training_row(
    puzzle: Puzzle, tokenizer: PreTrainedTokenizerBase, end: str, layout: Layout = "system", variant: Variant = "batch"
) -> dict[str, list[int]]:
    """Give the tokens of a puzzle with its answer, and which of them the model has to write."""
    text = render_chat(tokenizer, messages(puzzle, layout, variant))
    prompt = prompt_ids(tokenizer, text)
    response = format_answer(puzzle.answer or (), str(puzzle.meta.get(REASONING_KEY) or ""))
    completion = prompt_ids(tokenizer, completion_of(response, opened_by(text)) + end)
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def split_evaluation(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split items into training and evaluation."""
    n_eval = max(1, round(n * fraction)) if fraction > 0 else 0
    if n - n_eval < 1:
        raise ValueError(f"train has {n} items, of which eval_fraction={fraction} leaves none to train on")
    chosen = np.zeros(n, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(n)[:n_eval]] = True
    return np.flatnonzero(~chosen).tolist(), np.flatnonzero(chosen).tolist()


class ByLength:
    """Sampler whose batches hold rows of like lengths, in random order; each epoch has an order of its own."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls this, also where a run is resumed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, pool = rng.permutation(len(self.lengths)), 50 * self.batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        whole = len(order) // self.batch_size * self.batch_size
        batches = rng.permutation(order[:whole].reshape(-1, self.batch_size))
        return iter([*batches.ravel().tolist(), *order[whole:].tolist()])
