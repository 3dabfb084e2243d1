"""Puzzle items as plain dicts.

Layouts (all of them the field's own, so that published files load here and ours load there):

- *Puzzle item*: ``{system_msg, user_msg, assistant_msg}``; files that say ``question`` and ``answer``, and those with
  ``conversations`` (``system``, ``human`` and ``gpt``), are read too. The gold stands in ``assistant_msg`` as ``A | B``
  or as a full trace with think and answer tags.

Their files are in :mod:`recipe.cello1.formats.puzzle_files`, predictions in :mod:`recipe.cello1.formats.predictions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.cello1.task.answer import TAGS, format_answer, join_types, parse_answer, split_types
from recipe.cello1.task.prompt import Variant, instruction, instructions, parse_user, render_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import shown

USER_KEYS = ("user_msg", "question")
GOLD_KEYS = ("assistant_msg", "answer")
SYSTEM_KEY = "system_msg"
REASONING_KEY = "reasoning"

CONVERSATIONS_KEY = "conversations"
ITEM_KEYS = (SYSTEM_KEY, *USER_KEYS, *GOLD_KEYS, CONVERSATIONS_KEY)
_SPEAKERS = {"system": SYSTEM_KEY, "human": USER_KEYS[0], "gpt": GOLD_KEYS[0]}


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
        raise ValueError(f"meta must not hold the keys {clash}, which are the item's own; rename them")
    return {**item, **meta}


def item_to_puzzle(
    item: Mapping[str, Any], index: int = 0, variant: Variant = "batch", *, require_gold: bool = True
) -> Puzzle:
    """Read a JSON item.

    Parameters
    ----------
    item
        The item. Keys that are not the item's own go to ``meta``, the reasoning of a full trace to
        ``meta["reasoning"]``. A key whose value is NaN, as tables write what is missing, is left out.
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
        raise ValueError(f"{where} must be an object with the key 'user_msg', got {type(item).__name__}")
    item = _from_conversations(item, where)
    user_key = _one_key(item, USER_KEYS, where)
    if SYSTEM_KEY in item and str(item[SYSTEM_KEY]) not in instructions(variant):
        raise ValueError(
            f"{where}, key '{SYSTEM_KEY}': not the instruction of the variant {variant!r}; "
            "choose another variant, or remove the key to use the standard instruction"
        )
    meta = {key: value for key, value in item.items() if key not in ITEM_KEYS and not _is_nan(value)}
    if spoiled := [key for key, value in meta.items() if _not_finite(value, where)]:
        msg = f"{where}, key {shown(spoiled[0])}: holds NaN or an infinite number, which JSON does not allow; remove it"
        raise ValueError(msg)
    answer = None
    if require_gold or any(key in item for key in GOLD_KEYS):
        gold_key = _one_key(item, GOLD_KEYS, where)
        answer, reasoning = read_gold(item[gold_key], f"{where}, key '{gold_key}'")
        if reasoning is not None:
            meta[REASONING_KEY] = reasoning
    try:
        return parse_user(item[user_key], variant, answer, meta)
    except ValueError as error:
        key = gold_key if str(error).startswith("answer") else user_key
        raise ValueError(f"{where}, key '{key}': {error}") from None


def question_of(item: Mapping[str, Any]) -> str:
    """Return the user message of an item, unchecked; empty if it has none.

    Parameters
    ----------
    item
        The item.

    Returns
    -------
    The message.
    """
    turns = item.get(CONVERSATIONS_KEY)
    texts = [item.get(key) for key in USER_KEYS]
    texts += [turn.get("value") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return "\n".join(text for text in texts if isinstance(text, str))


def _from_conversations(item: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return an item of ``conversations`` as one of ``system_msg``, ``user_msg`` and ``assistant_msg``."""
    if CONVERSATIONS_KEY not in item:
        return item
    found = {key: value for key, value in item.items() if key != CONVERSATIONS_KEY}
    turns = item[CONVERSATIONS_KEY]
    for turn in turns if isinstance(turns, Sequence) else [turns]:
        key = _SPEAKERS.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        if key is None or key in found:
            wanted = f"must hold one turn each of {', '.join(_SPEAKERS)}"
            raise ValueError(f"{where}, key '{CONVERSATIONS_KEY}': {wanted}, got {shown(turn)}")
        found[key] = turn.get("value")
    return found


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _not_finite(value: object, where: str) -> bool:
    """Whether there is a number that JSON cannot hold anywhere in a value."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if not isinstance(value, Mapping | list | tuple):
        return False
    try:
        return any(_not_finite(entry, where) for entry in (value.values() if isinstance(value, Mapping) else value))
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply") from None


def _one_key(item: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """Return which of ``keys`` the item has; two of them must agree."""
    present = [key for key in keys if key in item]
    if not present:
        msg = f"{where} has neither '{keys[0]}' nor '{keys[1]}'; its keys are {shown(sorted(map(str, item)))}"
        raise ValueError(msg)
    for key in present:
        if not isinstance(item[key], str):
            raise ValueError(f"{where}, key '{key}': must be a str, got {type(item[key]).__name__}")
    if len(present) > 1 and not _agree(item[keys[0]], item[keys[1]]):
        raise ValueError(f"{where}: the keys '{keys[0]}' and '{keys[1]}' differ; remove the wrong one")
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
            raise ValueError(f"{where}: is empty; give the types in cell order")
        return types, None
    parsed = parse_answer(text)
    if not parsed.ok:
        msg = f"{where}: the trace is malformed ({parsed.reason}); write it as task.answer.format_answer does"
        raise ValueError(msg)
    return parsed.items, parsed.reasoning
