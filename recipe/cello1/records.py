"""Puzzle items, RL rows and predictions as plain dicts, and the files they stand in.

Layouts (all of them the field's own, so that published files load here and ours load there):

- *Puzzle item*: ``{system_msg, user_msg, assistant_msg}``; files that say ``question`` and ``answer`` are read too.
  The gold stands in ``assistant_msg`` as ``A | B`` or as a full trace with think and answer tags.
- *RL row*: the dict of one row of verl's parquet schema (written to parquet elsewhere).
- *Prediction*: the item with ``prediction`` and how it was made. A failure of the machinery is an *error record*, which
  has ``error`` and no ``prediction``, so that it can never be scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.answer import TAGS, format_answer, join_types, parse_answer, split_types
from recipe.cello1.files import read_items, read_json, write_items
from recipe.cello1.prompt import Layout, Variant, chat, check_layout, instruction, parse_user, render_user
from recipe.cello1.puzzle import Puzzle

DATA_SOURCE = "cell_data"  # the published reward refuses any other
ABILITY = "cell_type_annotation"
USER_KEYS = ("user_msg", "question")
GOLD_KEYS = ("assistant_msg", "answer")
SYSTEM_KEY = "system_msg"
META_KEYS = ("donor_id", "dataset", "tissue", "disease")
REASONING_KEY = "reasoning"

_ITEM_KEYS = (SYSTEM_KEY, *USER_KEYS, *GOLD_KEYS)


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
    if clash := [key for key in meta if key in _ITEM_KEYS]:
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
    meta = {key: value for key, value in item.items() if key not in _ITEM_KEYS}
    answer = None
    if require_gold or any(key in item for key in GOLD_KEYS):
        gold_key = _one_key(item, GOLD_KEYS, where)
        answer, reasoning = _read_gold(item[gold_key], f"{where}, key '{gold_key}'")
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


def _read_gold(text: str, where: str) -> tuple[tuple[str, ...], str | None]:
    """Read ``A | B`` or a full trace into types and reasoning (``None`` for types only)."""
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


def read_puzzles(path: str | Path, variant: Variant = "batch", *, require_gold: bool = True) -> list[Puzzle]:
    """Read a puzzle file.

    Parameters
    ----------
    path
        A ``.json`` list or a ``.jsonl`` file of items.
    variant
        Task variant.
    require_gold
        Whether an item without gold is an error.

    Returns
    -------
    The puzzles.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is empty or an item is unusable, naming file, item and key.
    """
    items = read_items(path)
    if not items:
        msg = f"{path} holds no items"
        raise ValueError(msg)
    try:
        return [item_to_puzzle(item, i, variant, require_gold=require_gold) for i, item in enumerate(items)]
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from None


def write_puzzles(path: str | Path, puzzles: Iterable[Puzzle], variant: Variant = "batch") -> None:
    """Write puzzles as a ``.json`` list or ``.jsonl``, atomically.

    Parameters
    ----------
    path
        Target file.
    puzzles
        What to write.
    variant
        Task variant.

    Raises
    ------
    ValueError
        If the suffix is neither, or a puzzle cannot be written.
    """
    write_items(path, [puzzle_to_item(puzzle, variant) for puzzle in puzzles])


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


# ----------------------------------------------------------------------------------------------------- predictions

# How the answers of a run were made; a file with other values of these is of another run.
RUN_KEYS = ("engine", "model", "fingerprint", "sampling", "prompt_layout")


def prediction_record(
    item: Mapping[str, Any],
    prediction: str,
    *,
    index: int,
    engine: str,
    sampling: Mapping[str, Any],
    finish_reason: str,
    tokens: int,
    prompt_layout: Layout = "system",
    **more: Any,
) -> dict[str, Any]:
    """Make the record of one answered item.

    Parameters
    ----------
    item
        The puzzle item; the record repeats it, as the published files do.
    prediction
        The response.
    index
        Position of the item in its data set.
    engine
        What answered, ``"vllm"`` for example.
    sampling
        Sampling options, temperature and seed among them.
    finish_reason
        Why the response ended, ``"stop"`` or ``"length"`` for example.
    tokens
        Number of tokens in the response.
    prompt_layout
        Prompt layout used.
    **more
        Further facts (``model``, ``sample``...).

    Returns
    -------
    The record.

    Raises
    ------
    ValueError
        If ``prediction`` is not a str (a failure is an :func:`error_record`), or the item already has one.
    """
    if not isinstance(prediction, str):
        msg = f"prediction of item {index} must be a str, got {type(prediction).__name__}; record failures as errors"
        raise ValueError(msg)
    return _record(item, index, engine, sampling, prompt_layout, more) | {
        "prediction": prediction,
        "finish_reason": finish_reason,
        "tokens": int(tokens),
    }


def error_record(
    item: Mapping[str, Any],
    error: str | BaseException,
    *,
    index: int,
    engine: str,
    sampling: Mapping[str, Any],
    prompt_layout: Layout = "system",
    **more: Any,
) -> dict[str, Any]:
    """Make the record of an item that the machinery failed to answer. It is never scored.

    Parameters
    ----------
    item
        The puzzle item.
    error
        What failed, as an exception or in words.
    index, engine, sampling, prompt_layout, **more
        As for :func:`prediction_record`.

    Returns
    -------
    The record: ``error`` and no ``prediction``.
    """
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return _record(item, index, engine, sampling, prompt_layout, more) | {"error": text}


def _record(
    item: Mapping[str, Any],
    index: int,
    engine: str,
    sampling: Mapping[str, Any],
    layout: Layout,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    own = {
        "index": int(index),
        "engine": engine,
        "sampling": dict(sampling),
        "prompt_layout": check_layout(layout),
        **more,
    }
    # The published evaluator takes the gold from "answer".
    if "answer" not in item and isinstance(item.get("assistant_msg"), str):
        own["answer"] = join_types(_read_gold(item["assistant_msg"], f"item {index}, key 'assistant_msg'")[0])
    if clash := [key for key in item if key in own and item[key] != own[key]] + [
        key for key in ("prediction", "error", "finish_reason", "tokens") if key in item
    ]:
        msg = f"item {index} already has the keys {clash}, which the record would overwrite; remove them from the data"
        raise ValueError(msg)
    return {**item, **own}


def check_prediction(record: Mapping[str, Any], where: str = "record") -> bool:
    """Check a prediction or error record.

    Parameters
    ----------
    record
        The record; of the published layout only ``prediction`` is needed.
    where
        How to name it in messages.

    Returns
    -------
    ``True`` for a prediction, ``False`` for an error record.

    Raises
    ------
    ValueError
        If it is neither, or both.
    """
    if not isinstance(record, Mapping):
        msg = f"{where} must be an object, got {type(record).__name__}"
        raise ValueError(msg)
    kinds = [key for key in ("prediction", "error") if key in record]
    if len(kinds) != 1:
        msg = f"{where} must have either 'prediction' or 'error', its keys are {sorted(map(str, record))}"
        raise ValueError(msg)
    if not isinstance(record[kinds[0]], str):
        msg = f"{where}, key '{kinds[0]}': must be a str, got {type(record[kinds[0]]).__name__}"
        raise ValueError(msg)
    return kinds[0] == "prediction"


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read prediction and error records.

    Parameters
    ----------
    path
        A ``.jsonl`` file, a ``.json`` list, or a folder of one ``<index>.json`` per item (the published layout).

    Returns
    -------
    The records in order of the file, or of the number in the file names, each with its ``index``.

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    ValueError
        If there is no record, a record is neither prediction nor error, or a file name is not a number.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix == ".json"]
        if strange := sorted(file.name for file in files if not file.stem.isdecimal()):
            msg = f"{path}: {strange[0]!r} is not named after an item (<index>.json); move it elsewhere"
            raise ValueError(msg)
        files.sort(key=lambda file: int(file.stem))
        named = [(str(file), int(file.stem), read_json(file)) for file in files]
    else:
        named = [(f"{path}: record {i}", i, record) for i, record in enumerate(read_items(path))]
    if not named:
        msg = f"{path} holds no predictions"
        raise ValueError(msg)
    for where, _, record in named:
        check_prediction(record, where)
    return [{"index": index, **record} for _, index, record in named]
