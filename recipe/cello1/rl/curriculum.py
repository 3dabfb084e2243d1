"""The order in which puzzles are trained on, and the same puzzle in another order of cells and candidates.

A puzzle with many cells is harder than one with few, so the number of cells is the difficulty that a curriculum goes
by. A puzzle shown in many passes always in the same order can be learnt by position; a permuted one asks the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recipe.cello1.formats.items import REASONING_KEY
from recipe.cello1.formats.rl_rows import puzzle_from_rl_row, row_question
from recipe.cello1.task.answer import join_types
from recipe.cello1.task.order import order_by_size
from recipe.cello1.task.prompt import LAYOUTS, chat, render_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import shown

_CELL_IDS = "cell_ids"  # the one list in meta that has an entry for each cell
# Streams of random numbers, so that no order depends on another.
_ORDER_STREAM, _PERMUTATION_STREAM = 1, 2


def pass_order(sizes: Sequence[int], order: str | None, *, seed: int, epoch: int = 0) -> list[int]:
    """Order the puzzles of one pass; depends on nothing but the arguments. Without an order they are shuffled."""
    rng = np.random.default_rng([_ORDER_STREAM, seed, epoch])
    return rng.permutation(len(sizes)).tolist() if order is None else order_by_size(sizes, order, rng)


def permuted(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
    """Put the cells and the candidates of a puzzle into another order; the gold answer goes with the cells."""
    if puzzle.meta.get(REASONING_KEY):
        msg = "the puzzle has reasoning, which names the cells by number; permute it before the trace is written"
        raise ValueError(msg)
    cells = rng.permutation(puzzle.n_cells).tolist()
    candidates = rng.permutation(len(puzzle.candidates)).tolist()
    meta = dict(puzzle.meta)
    if (ids := meta.get(_CELL_IDS)) is not None:
        if not isinstance(ids, list | tuple) or len(ids) != puzzle.n_cells:
            raise ValueError(f"meta['{_CELL_IDS}'] must be a list of {puzzle.n_cells} ids, got {shown(ids)}")
        meta[_CELL_IDS] = [ids[i] for i in cells]
    return replace(
        puzzle,
        cells=tuple(puzzle.cells[i] for i in cells),
        candidates=tuple(puzzle.candidates[i] for i in candidates),
        answer=None if puzzle.answer is None else tuple(puzzle.answer[i] for i in cells),
        meta=meta,
    )


def augmented(puzzle: Puzzle, *, seed: int, index: int, copy: int) -> Puzzle:
    """Return a copy of a puzzle, by number: 0 as it is, others permuted; depends on nothing but the arguments."""
    if copy == 0:
        return puzzle
    return permuted(puzzle, np.random.default_rng([_PERMUTATION_STREAM, seed, index, copy]))


def augmented_row(row: Mapping[str, Any], *, seed: int, index: int, copy: int) -> dict[str, Any]:
    """Return one copy of an RL row: prompt, question and gold answer belong together in each."""
    question, variant = row_question(row, index)
    extra = row["extra_info"]
    asked = [dict(message) for message in row["prompt"]]
    layout = next((layout for layout in LAYOUTS if chat(question, layout, variant) == asked), None)
    if layout is None:
        raise ValueError(
            f"row {index}, column 'prompt': does not match extra_info['question'] in any layout, so its cells "
            "cannot be reordered; set data.prompt_layout to rewrite the prompts, or data.augmented_epochs to null"
        )
    if copy == 0:
        return {**row, "extra_info": {**extra, "copy": 0}}
    puzzle = augmented(puzzle_from_rl_row(row, index), seed=seed, index=index, copy=copy)
    question, answer = render_user(puzzle, variant), join_types(puzzle.answer or ())
    return {
        **row,
        "prompt": chat(question, layout, variant),
        "reward_model": {**row["reward_model"], "ground_truth": answer},
        "extra_info": {**extra, "question": question, "answer": answer, "copy": copy},
    }
