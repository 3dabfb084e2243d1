"""Puzzle items and RL rows as plain dicts.

Layouts (all of them the field's own, so that published files load here and ours load there):

- *Puzzle item*: ``{system_msg, user_msg, assistant_msg}``; files that say ``question`` and ``answer`` are read too.
  The gold stands in ``assistant_msg`` as ``A | B`` or as a full trace with think and answer tags.
- *RL row*: the dict of one row of verl's parquet schema.

Their files are in :mod:`recipe.cello1.puzzle_files`, predictions in :mod:`recipe.cello1.prediction_records`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipe.cello1.answer import TAGS, format_answer, join_types, parse_answer, split_types
from recipe.cello1.prompt import Layout, Variant, chat, instruction, parse_user, render_user
from recipe.cello1.puzzle import Puzzle

DATA_SOURCE = "cell_data"  # the published reward refuses any other
ABILITY = "cell_type_annotation"
USER_KEYS = ("user_msg", "question")
GOLD_KEYS = ("assistant_msg", "answer")
SYSTEM_KEY = "system_msg"
META_KEYS = ("donor_id", "dataset", "tissue", "disease")
REASONING_KEY = "reasoning"

ITEM_KEYS = (SYSTEM_KEY, *USER_KEYS, *GOLD_KEYS)


# ---------------------------------------------------------------------------------------------------- puzzle items


def puzzle_to_item(puzzle: Puzzle, variant: Variant = "batch") -> dict[str, Any]:
    """Make the JSON item of a puzzle.

    Parameters
    ----------
    puzzle
        The puzzle. With ``meta["reasoning"]`` the item holds the whole trace, else only the types.
    variant
        Task variant.

    Returns
    -------
    ``system_msg``, ``user_msg``, ``assistant_msg`` (absent without an answer), then the rest of ``meta``.

    Raises
    ------
    ValueError
        If ``meta`` uses one of the item's own keys, or the variant does not fit the puzzle.
    """
    item: dict[str, Any] = {SYSTEM_KEY: instruction(variant), "user_msg": render_user(puzzle, variant)}
    meta = dict(puzzle.meta)
    if puzzle.answer is not None:
        reasoning = meta.pop(REASONING_KEY, None)
        text = join_types(puzzle.answer) if reasoning is None else format_answer(puzzle.answer, reasoning)
        item["assistant_msg"] = text
    if clash := [key for key in meta if key in ITEM_KEYS]:
        msg = f"meta must not hold the keys {clash}, which are the item's own; rename them"
        raise ValueError(msg)
    return {**item, **meta}


def item_to_puzzle(
    item: Mapping[str, Any], index: int = 0, variant: Variant = "batch", *, require_gold: bool = True
) -> Puzzle:
    """Read a JSON item.

    Parameters
    ----------
    item
        The item. Keys that are not the item's own go to ``meta``, the reasoning of a full trace to
        ``meta["reasoning"]``.
    index
        Position of the item in its file, for messages.
    variant
        Task variant.
    require_gold
        Whether an item without gold is an error.

    Returns
    -------
    The puzzle.

    Raises
    ------
    ValueError
        If a key is missing or holds something unusable, naming the key and the item.
    """
    where = f"item {index}"
    if not isinstance(item, Mapping):
        msg = f"{where} must be an object with the key 'user_msg', got {type(item).__name__}"
        raise ValueError(msg)
    user_key = _one_key(item, USER_KEYS, where)
    if SYSTEM_KEY in item and item[SYSTEM_KEY] != instruction(variant):
        msg = (
            f"{where}, key '{SYSTEM_KEY}': not the instruction of the variant {variant!r}; "
            "choose another variant, or remove the key to use the standard instruction"
        )
        raise ValueError(msg)
    meta = {key: value for key, value in item.items() if key not in ITEM_KEYS}
    answer = None
    if require_gold or any(key in item for key in GOLD_KEYS):
        gold_key = _one_key(item, GOLD_KEYS, where)
        answer, reasoning = read_gold(item[gold_key], f"{where}, key '{gold_key}'")
        if reasoning is not None:
            meta[REASONING_KEY] = reasoning
    key = user_key
    try:
        puzzle = parse_user(item[user_key], variant)
        key = gold_key if answer is not None else user_key
        return Puzzle(puzzle.cells, puzzle.candidates, answer, puzzle.context, meta)
    except ValueError as error:
        msg = f"{where}, key '{key}': {error}"
        raise ValueError(msg) from None


def _one_key(item: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """Return which of ``keys`` the item has; two of them must agree."""
    present = [key for key in keys if key in item]
    if not present:
        msg = f"{where} has neither '{keys[0]}' nor '{keys[1]}'; its keys are {sorted(map(str, item))}"
        raise ValueError(msg)
    for key in present:
        if not isinstance(item[key], str):
            msg = f"{where}, key '{key}': must be a str, got {type(item[key]).__name__}"
            raise ValueError(msg)
    if len(present) > 1 and not _agree(item[keys[0]], item[keys[1]]):
        msg = f"{where}: the keys '{keys[0]}' and '{keys[1]}' differ; keep the one that is right"
        raise ValueError(msg)
    return present[0]


def _agree(text: str, other: str) -> bool:
    """Whether two texts are equal, or a trace and the answer it ends with."""
    return text == other or (parse_answer(text).ok and parse_answer(text).items == split_types(other))


def read_gold(text: str, where: str) -> tuple[tuple[str, ...], str | None]:
    """Read the gold of an item.

    Parameters
    ----------
    text
        ``A | B``, or a full trace.
    where
        How to name it in messages.

    Returns
    -------
    Types in cell order, and the reasoning (``None`` for types only).

    Raises
    ------
    ValueError
        If it is empty or a malformed trace.
    """
    if not any(tag in text for tag in TAGS):
        types = split_types(text)
        if not types:
            msg = f"{where}: is empty; give the types in cell order"
            raise ValueError(msg)
        return types, None
    parsed = parse_answer(text)
    if not parsed.ok:
        msg = f"{where}: the trace is malformed ({parsed.reason}); write it as recipe.cello1.answer.format_answer does"
        raise ValueError(msg)
    return parsed.items, parsed.reasoning


# --------------------------------------------------------------------------------------------------------- RL rows


def rl_row(
    puzzle: Puzzle, split: str, index: int, layout: Layout = "system", variant: Variant = "batch"
) -> dict[str, Any]:
    """Make one row of the RL data.

    Parameters
    ----------
    puzzle
        A puzzle with an answer.
    split
        Name of the split, ``"train"`` for example.
    index
        Position of the row in its split.
    layout
        Prompt layout; written into the row as ``extra_info["prompt_layout"]``.
    variant
        Task variant; written as ``extra_info["variant"]``.

    Returns
    -------
    ``data_source``, ``prompt``, ``ability``, ``reward_model``, ``extra_info``. The keys and the kinds of
    their values are the same for every puzzle, so that the rows make one table.

    Raises
    ------
    ValueError
        If the puzzle has no answer, or the variant or layout is unusable.
    """
    if puzzle.answer is None:
        msg = f"puzzle {index} of split {split!r} has no answer; RL data needs one for every puzzle"
        raise ValueError(msg)
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
    """Check that a row can be trained on.

    Rows made by the published script pass: they have a prompt and a gold answer, but fewer ``extra_info`` keys.

    Parameters
    ----------
    row
        The row.
    index
        Its position, for messages.

    Raises
    ------
    ValueError
        If something is missing or of the wrong kind, naming the column and the row.
    """
    where = f"row {index}"
    for column in ("data_source", "prompt", "reward_model"):
        if column not in row:
            msg = f"{where} has no column '{column}'; its columns are {sorted(map(str, row))}"
            raise ValueError(msg)
    if row["data_source"] != DATA_SOURCE:
        msg = f"{where}, column 'data_source': must be {DATA_SOURCE!r}, got {row['data_source']!r}"
        raise ValueError(msg)
    prompt = row["prompt"]
    if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray) or len(prompt) == 0:
        msg = f"{where}, column 'prompt': must be a list of messages, got {type(prompt).__name__}"
        raise ValueError(msg)
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            msg = f"{where}, column 'prompt': every message needs 'role' and 'content', got {message!r}"
            raise ValueError(msg)
    reward = row["reward_model"]
    truth = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if not isinstance(truth, str) or not split_types(truth):
        msg = f"{where}, column 'reward_model': 'ground_truth' must name the types, got {truth!r}"
        raise ValueError(msg)


def puzzle_from_rl_row(row: Mapping[str, Any], index: int = 0, variant: Variant | None = None) -> Puzzle:
    """Read a puzzle back from an RL row.

    Parameters
    ----------
    row
        A row with ``extra_info["question"]``, as this module and the published script write.
    index
        Its position, for messages.
    variant
        Task variant; by default the one written in the row, else ``"batch"``.

    Returns
    -------
    The puzzle with its gold answer.

    Raises
    ------
    ValueError
        If the row is unusable, naming the column and the row.
    """
    check_rl_row(row, index)
    extra = row.get("extra_info")
    if not isinstance(extra, Mapping) or "question" not in extra:
        msg = f"row {index}, column 'extra_info': has no 'question' to read the puzzle from"
        raise ValueError(msg)
    item = {key: extra[key] for key in META_KEYS if extra.get(key)}
    item |= {"question": extra["question"], "answer": row["reward_model"]["ground_truth"]}
    try:
        return item_to_puzzle(item, index, variant or extra.get("variant") or "batch")
    except ValueError as error:
        msg = f"row {index}, column 'extra_info': {error}"
        raise ValueError(msg) from None
