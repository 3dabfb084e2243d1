"""Rows of verl's parquet schema as plain dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipe.cello1.formats.items import item_to_puzzle
from recipe.cello1.task.answer import join_types
from recipe.cello1.task.prompt import Layout, Variant, chat, render_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.scoring import gold_types
from recipe.cello1.task.text import shown

DATA_SOURCE = "cell_data"  # the published reward refuses any other
ABILITY = "cell_type_annotation"
META_KEYS = ("donor_id", "dataset", "tissue", "disease")


def rl_row(
    puzzle: Puzzle, split: str, index: int, layout: Layout = "system", variant: Variant = "batch"
) -> dict[str, Any]:
    """Make one row of the RL data."""
    if puzzle.answer is None:
        raise ValueError(f"puzzle {index} of split {split!r} has no answer; RL data needs one for every puzzle")
    question = render_user(puzzle, variant)
    answer = join_types(puzzle.answer)
    return {
        "data_source": DATA_SOURCE,
        "prompt": chat(question, layout, variant),
        "ability": ABILITY,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "split": split,
            "index": int(index),
            "question": question,
            "answer": answer,
            "n_cells": puzzle.n_cells,
            **{key: _text(puzzle.meta.get(key)) for key in META_KEYS},
            "prompt_layout": layout,
            "variant": variant,
        },
    }


def _text(value: object) -> str:
    return "" if value is None else str(value)


def check_rl_row(row: Mapping[str, Any], index: int = 0) -> None:
    """Check that a row can be trained on."""
    where = f"row {index}"
    for column in ("data_source", "prompt", "reward_model"):
        if column not in row:
            raise ValueError(f"{where} has no column '{column}'; its columns are {sorted(map(str, row))}")
    if row["data_source"] != DATA_SOURCE:
        raise ValueError(f"{where}, column 'data_source': must be {DATA_SOURCE!r}, got {shown(row['data_source'])}")
    prompt = row["prompt"]
    if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray) or len(prompt) == 0:
        raise ValueError(f"{where}, column 'prompt': must be a list of messages, got {type(prompt).__name__}")
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            msg = f"{where}, column 'prompt': every message needs 'role' and 'content', got {shown(message)}"
            raise ValueError(msg)
    reward = row["reward_model"]
    truth = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if not isinstance(truth, str):
        raise ValueError(f"{where}, column 'reward_model': 'ground_truth' must name the types, got {shown(truth)}")
    try:
        gold_types(truth)  # what the reward will do
    except ValueError as error:
        raise ValueError(f"{where}, column 'reward_model': 'ground_truth': {error}") from None


def row_question(row: Mapping[str, Any], index: int = 0) -> tuple[str, Variant]:
    """Return the question of a row and the variant it is asked in."""
    extra = row.get("extra_info")
    if not isinstance(extra, Mapping) or not extra.get("question"):
        msg = f"row {index}, column 'extra_info': has no 'question'; without it the prompt can only be used as it is"
        raise ValueError(msg)
    return extra["question"], extra.get("variant") or "batch"


def puzzle_from_rl_row(row: Mapping[str, Any], index: int = 0, variant: Variant | None = None) -> Puzzle:
    """Read a puzzle back from an RL row."""
    check_rl_row(row, index)
    question, said = row_question(row, index)
    extra = row["extra_info"]
    item = {key: extra[key] for key in META_KEYS if extra.get(key)}
    item |= {"question": question, "answer": row["reward_model"]["ground_truth"]}
    try:
        return item_to_puzzle(item, index, variant or said)
    except ValueError as error:
        raise ValueError(f"row {index}, column 'extra_info': {error}") from None
