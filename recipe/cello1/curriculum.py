"""The order in which puzzles are trained on, and the same puzzle in another order of cells and candidates.

A puzzle with many cells is harder than one with few, so the number of cells is the difficulty that a curriculum goes
by. A puzzle shown in many passes always in the same order can be learnt by position; a permuted one asks the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recipe.cello1.answer import join_types
from recipe.cello1.prompt import LAYOUTS, Variant, chat, render_user
from recipe.cello1.puzzle import Puzzle
from recipe.cello1.records import REASONING_KEY, puzzle_from_rl_row

ORDERS = ("ascending", "descending", "mixed")
_CELL_IDS = "cell_ids"  # the one list in meta that has an entry for each cell
# Streams of random numbers, so that no order depends on another.
_ORDER_STREAM, _PERMUTATION_STREAM = 1, 2


def check_order(order: str) -> str:
    """Return ``order`` if it is one of ``ORDERS``.

    Parameters
    ----------
    order
        The setting to check.

    Returns
    -------
    ``order``

    Raises
    ------
    ValueError
        If it is not.
    """
    if order not in ORDERS:
        msg = f"order must be one of {', '.join(ORDERS)}, got {order!r}"
        raise ValueError(msg)
    return order


def order_by_size(sizes: Sequence[int], order: str, rng: np.random.Generator) -> list[int]:
    """Order puzzles by their number of cells; those of one size come in random order.

    Parameters
    ----------
    sizes
        Number of cells of each puzzle.
    order
        ``ascending``: few cells first. ``descending``: many first. ``mixed``: every stretch holds the same mix of sizes
        as the whole; otherwise the reward of a step says more about how many small, easy puzzles it happened to get
        than about the model. The k-th of the n puzzles of a size stands at (2k + 1) / 2n of the way, and sizes that
        meet in one place take turns from the smallest.
    rng
        Random generator.

    Returns
    -------
    The positions of the puzzles, each once.

    Raises
    ------
    ValueError
        If the order is unknown.
    """
    check_order(order)
    by_size: dict[int, list[int]] = {}
    for position in rng.permutation(len(sizes)).tolist():
        by_size.setdefault(int(sizes[position]), []).append(position)
    if order == "mixed":
        places = [
            ((2 * k + 1) / (2 * len(by_size[size])), size, position)
            for size in sorted(by_size)
            for k, position in enumerate(by_size[size])
        ]
        return [position for _, _, position in sorted(places)]
    return [position for size in sorted(by_size, reverse=order == "descending") for position in by_size[size]]


def pass_order(sizes: Sequence[int], order: str | None, *, seed: int, epoch: int = 0) -> list[int]:
    """Order the puzzles of one pass over the data; depends on nothing but the arguments.

    Parameters
    ----------
    sizes, order
        As for :func:`order_by_size`; without an order the puzzles are shuffled.
    seed
        Seed of the run.
    epoch
        Number of the pass, from 0; each has an order of its own within the sizes.

    Returns
    -------
    The positions of the puzzles, each once.
    """
    rng = np.random.default_rng([_ORDER_STREAM, seed, epoch])
    return rng.permutation(len(sizes)).tolist() if order is None else order_by_size(sizes, order, rng)


def permuted(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
    """Put the cells and the candidates of a puzzle into another order; the gold answer goes with the cells.

    Parameters
    ----------
    puzzle
        The puzzle. Entries of ``meta["cell_ids"]`` go with the cells.
    rng
        Random generator.

    Returns
    -------
    The same question, asked in another order.

    Raises
    ------
    ValueError
        If the puzzle has a trace, which speaks of the cells by number, or ``cell_ids`` do not fit the cells.
    """
    if puzzle.meta.get(REASONING_KEY):
        msg = "the puzzle has reasoning, which names the cells by number; permute it before the trace is written"
        raise ValueError(msg)
    cells = rng.permutation(puzzle.n_cells).tolist()
    candidates = rng.permutation(len(puzzle.candidates)).tolist()
    meta = dict(puzzle.meta)
    if _CELL_IDS in meta:
        if len(meta[_CELL_IDS]) != puzzle.n_cells:
            msg = f"meta['{_CELL_IDS}'] has {len(meta[_CELL_IDS])} entries for {puzzle.n_cells} cells"
            raise ValueError(msg)
        meta[_CELL_IDS] = [meta[_CELL_IDS][i] for i in cells]
    return replace(
        puzzle,
        cells=tuple(puzzle.cells[i] for i in cells),
        candidates=tuple(puzzle.candidates[i] for i in candidates),
        answer=None if puzzle.answer is None else tuple(puzzle.answer[i] for i in cells),
        meta=meta,
    )


def augmented(puzzle: Puzzle, *, seed: int, index: int, copy: int) -> Puzzle:
    """Return one copy of a puzzle; depends on nothing but the arguments.

    Parameters
    ----------
    puzzle
        The puzzle.
    seed
        Seed of the run.
    index
        Position of the puzzle in the data.
    copy
        Number of the copy: 0 is the puzzle as it is, each other one is permuted.

    Returns
    -------
    The copy.

    Raises
    ------
    ValueError
        As for :func:`permuted`.
    """
    if copy == 0:
        return puzzle
    return permuted(puzzle, np.random.default_rng([_PERMUTATION_STREAM, seed, index, copy]))


def augmented_row(row: Mapping[str, Any], *, seed: int, index: int, copy: int) -> dict[str, Any]:
    """Return one copy of an RL row: prompt, question and gold answer belong together in each.

    Parameters
    ----------
    row
        The row, its prompt in one of the two layouts.
    seed, index, copy
        As for :func:`augmented`.

    Returns
    -------
    The row; ``extra_info["copy"]`` is the number of the copy.

    Raises
    ------
    ValueError
        If the row has no question, or its prompt is not the one that is made of the question.
    """
    puzzle = puzzle_from_rl_row(row, index)
    extra = row["extra_info"]
    variant: Variant = extra.get("variant") or "batch"
    asked = [dict(message) for message in row["prompt"]]
    layout = next((layout for layout in LAYOUTS if chat(extra["question"], layout, variant) == asked), None)
    if layout is None:
        msg = (
            f"row {index}, column 'prompt': is not what extra_info['question'] gives in any layout, so it cannot be "
            "asked in another order; set data.prompt_layout, which writes it anew, or data.augmented_epochs to null"
        )
        raise ValueError(msg)
    if copy == 0:
        return {**row, "extra_info": {**extra, "copy": 0}}
    puzzle = augmented(puzzle, seed=seed, index=index, copy=copy)
    question, answer = render_user(puzzle, variant), join_types(puzzle.answer or ())
    return {
        **row,
        "prompt": chat(question, layout, variant),
        "reward_model": {**row["reward_model"], "ground_truth": answer},
        "extra_info": {**extra, "question": question, "answer": answer, "copy": copy},
    }
