"""The data of the cold start: puzzles with traces, as the text of prompts and completions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
                msg = (
                    f"{path}: item {index} has no reasoning; write traces with recipe.cello1.cold_start.marker_traces, "
                    "or train on answers alone with require_reasoning=false"
                )
                raise ValueError(msg)
    return puzzles


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the text that ends a turn of the assistant in a chat template (``<|im_end|>`` for Qwen)."""
    if not getattr(tokenizer, "chat_template", None):
        msg = "the model's tokenizer has no chat template; use an instruction-tuned model"
        raise ValueError(msg)
    probe = "0123456789"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(probe)[2].strip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.all_special_ids:
        msg = f"the chat template ends a turn with {rest!r}, which is no special token; a model could not learn to stop"
        raise ValueError(msg)
    return tokenizer.convert_ids_to_tokens(ids[0])


def prompt_completion(
    puzzle: Puzzle, tokenizer: PreTrainedTokenizerBase, end: str, layout: Layout = "system", variant: Variant = "batch"
) -> dict[str, str]:
    """Render a puzzle for training."""
    prompt = tokenizer.apply_chat_template(
        messages(puzzle, layout, variant), tokenize=False, add_generation_prompt=True
    )
    # The trainer's tokenisation puts the first special token in by itself, where a tokenizer has one.
    if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        prompt = prompt.removeprefix(tokenizer.bos_token)
    response = format_answer(puzzle.answer or (), str(puzzle.meta.get(REASONING_KEY) or ""))
    return {"prompt": prompt, "completion": response + end}


def split_evaluation(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split items into training and evaluation."""
    n_eval = max(1, round(n * fraction)) if fraction > 0 else 0
    if n - n_eval < 1:
        msg = f"train has {n} items, of which eval_fraction={fraction} leaves none to train on"
        raise ValueError(msg)
    chosen = np.zeros(n, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(n)[:n_eval]] = True
    return np.flatnonzero(~chosen).tolist(), np.flatnonzero(chosen).tolist()
