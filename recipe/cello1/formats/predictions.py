"""Predictions as plain dicts, and the files they stand in.

A *prediction* is the item with ``prediction`` and how it was made. A failure of the machinery is an *error record*,
which has ``error`` and no ``prediction``, so that it can never be scored. The published folders of ``<index>.json`` are
read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.formats.atomic import iter_items, read_json
from recipe.cello1.formats.items import read_gold
from recipe.cello1.formats.journal import item_files
from recipe.cello1.task.answer import join_types
from recipe.cello1.task.prompt import Layout, check_layout
from recipe.cello1.task.voting import logprob_weights

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
        own["answer"] = join_types(read_gold(item["assistant_msg"], f"item {index}, key 'assistant_msg'")[0])
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
        raise ValueError(f"{where} must be an object, got {type(record).__name__}")
    kinds = [key for key in ("prediction", "error") if key in record]
    if len(kinds) != 1:
        raise ValueError(f"{where} must have either 'prediction' or 'error', its keys are {sorted(map(str, record))}")
    if not isinstance(record[kinds[0]], str):
        raise ValueError(f"{where}, key '{kinds[0]}': must be a str, got {type(record[kinds[0]]).__name__}")
    return kinds[0] == "prediction"


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read prediction and error records.

    Parameters
    ----------
    path
        As for :func:`iter_predictions`.

    Returns
    -------
    What that gives.
    """
    return list(iter_predictions(path))


def iter_predictions(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read prediction and error records one by one, so that in memory is only what is kept of them.

    Parameters
    ----------
    path
        A ``.jsonl`` file, a ``.json`` list, or a folder of one ``<index>.json`` per item (the published layout).

    Yields
    ------
    The records in order of the file, or of the number in the file names, each with its ``index``.

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    ValueError
        If there is no record, a record is neither prediction nor error, or a file name is not a number.
    """
    path = Path(path)
    named: Iterable[tuple[str, int, Any]]
    if path.is_dir():
        named = ((str(file), index, read_json(file)) for index, file in item_files(path))
    else:
        named = ((f"{path}: record {i}", i, record) for i, record in enumerate(iter_items(path)))
    empty = True
    for where, index, record in named:
        check_prediction(record, where)
        empty = False
        yield {"index": index, **record}
    if empty:
        raise ValueError(f"{path} holds no predictions")


def has_logprobs(records: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether every prediction has its log-probability, so that answers can be weighed by it.

    Parameters
    ----------
    records
        Prediction and error records.

    Returns
    -------
    Whether they have.
    """
    own = [record for record in records if "prediction" in record]
    return bool(own) and all(
        isinstance(record.get("logprob"), float | int) and isinstance(record.get("tokens"), int) for record in own
    )


def record_weights(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Weigh predictions by their log-probability.

    Parameters
    ----------
    records
        Predictions for which :func:`has_logprobs` holds.

    Returns
    -------
    What ``task.voting.logprob_weights`` returns for them.
    """
    return logprob_weights([record["logprob"] for record in records], [record["tokens"] for record in records])
