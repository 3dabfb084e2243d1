"""What is written into an AnnData object, and read back: the one owner of the format.

Names that come from the data (groups, types, cells) stand in values only, never in keys or column names, because they
may hold a ``/``. Lists inside a table are JSON. Nothing is ``None``: what is not set is left out, or an empty string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from recipe.cello1.formats.stores import BadFileError, check_store
from recipe.cello1.task.answer import Reason, parse_answer
from recipe.cello1.task.prompt import render_user
from recipe.cello1.task.puzzle import Puzzle
from scverse_plugin.method._ask import Reply
from scverse_plugin.method._plan import Draft
from scverse_plugin.method._tally import Calls, CellChecks, PositionBias, Tally, names_twice
from scverse_plugin.method._units import Unit

TOOL = "cello1"  # in uns[key]["params"]["tool"]: the mark of what is ours
LABELLED = ("ok", "backed_off")  # status of groups with a label
SUPPORT, VOTES, ONTOLOGY = "_support", "_votes", "_ontology_term_id"


def check_key(key: object) -> str:
    """Check ``key_added``."""
    if not isinstance(key, str) or not key.strip() or "/" in key or key == "_index" or not key.isprintable():
        msg = f"key_added must be a name without '/', and not anndata's own '_index', got {key!r}; 'cello1' for example"
        raise ValueError(msg)
    return key


def check_object(adata: object) -> None:
    """Check that an object is an AnnData, not what holds several."""
    if isinstance(adata, AnnData):
        if adata.isbacked:
            try:
                check_store(adata.filename)
            except BadFileError as error:
                raise ValueError(f"adata: {adata.filename}: {error}") from None
        return
    kind = type(adata).__name__
    held = getattr(adata, "mod", None)
    names = list(held) if isinstance(held, Mapping) else []
    chosen = "rna" if "rna" in names or not names else names[0]
    remedy = f"; pass mdata[{chosen!r}]" + (f" (it has {names})" if names else "") if kind == "MuData" else ""
    raise ValueError(f"adata must be an AnnData object, got {kind}{remedy}")


def is_ours(adata: AnnData, key: str) -> bool:
    """Say whether ``uns[key]`` was written by this tool."""
    entry = adata.uns.get(key)
    return (
        isinstance(entry, Mapping) and isinstance(entry.get("params"), Mapping) and entry["params"].get("tool") == TOOL
    )


def columns_of(adata: AnnData, key: str) -> frozenset[str]:
    """Return the columns of ``obs`` and ``obsm`` that a run has written."""
    return frozenset(map(str, adata.uns[key]["columns"])) if is_ours(adata, key) else frozenset()


def check_free(adata: AnnData, key: str, columns: Sequence[str] | None = None) -> None:
    """Check that writing under a key replaces nothing of the user's."""
    ours = columns_of(adata, key)
    named = (key, key + SUPPORT, key + ONTOLOGY) if columns is None else columns
    taken = [f"obs[{name!r}]" for name in named if name in adata.obs.columns and name not in ours]
    if columns is None:
        taken += [f"obsm[{key + VOTES!r}]"] if key + VOTES in adata.obsm and key + VOTES not in ours else []
        taken += [f"uns[{key!r}]"] if key in adata.uns and not is_ours(adata, key) else []
    if taken:
        raise ValueError(
            f"key_added={key!r} would overwrite adata.{', adata.'.join(taken)}, which cello1 has not written; "
            "choose another key_added, or rename what is there"
        )


def check_writable(adata: AnnData, *, copy: bool) -> None:
    """Check that results can be put into an object; anndata would refuse it only when everything has been asked."""
    if adata.isbacked and adata.is_view:
        # Not view.to_memory(): with anndata 0.11 the result has no X.
        raise ValueError(
            "adata is a view of a backed object, which cannot be changed; load the object first, then take the "
            "subset: whole.to_memory()[cells]"
        )
    if adata.isbacked and copy:
        raise ValueError("copy=True cannot copy a backed object; pass adata.to_memory() instead, which is a copy")


def write_ontology(adata: AnnData, key: str, column: pd.Series) -> None:
    """Write the ids of a run."""
    if adata.is_view:
        adata._init_as_actual(adata.copy())
    adata.obs[key + ONTOLOGY] = column
    adata.uns[key] = {**adata.uns[key], "columns": _names([*columns_of(adata, key), key + ONTOLOGY])}


def stored(adata: AnnData, key: str) -> dict[str, Any]:
    """Return what a run has left in ``uns``."""
    check_object(adata)
    if not is_ours(adata, key):
        runs = [str(name) for name in adata.uns if is_ours(adata, name)]
        found = f"there are {runs}" if runs else "there is none; call sc.tl.cello1_annotate first"
        raise ValueError(f"key: adata.uns has no cello1 run {key!r}; {found}")
    return adata.uns[key]


def storable(text: str) -> str:
    """Make a text fit for HDF5, which takes neither NUL nor lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def groups_table(
    units: Sequence[Unit], tally: Tally, calls: Calls, checks: CellChecks, sizes: np.ndarray, unassigned: str
) -> pd.DataFrame:
    """Make ``uns[key]["groups"]``."""

    def name(code: int) -> str:
        return tally.types[code] if code >= 0 else ""

    best = [name(code) for code in calls.best.tolist()]
    labels = [text if status == "ok" else unassigned for text, status in zip(best, calls.status, strict=True)]
    table = {
        "group": _texts([unit.group for unit in units]),
        "sample": _texts([unit.sample for unit in units]),
        "label": _texts(labels),
        "support": calls.support,
        "raw_support": calls.raw,
        "best": _texts(best),
        "backed_off_from": _texts([""] * len(units)),
        "runner_up": _texts([name(code) for code in calls.runner_up.tolist()]),
        "runner_up_support": calls.runner_up_support,
        "margin": calls.margin,
        "entropy": calls.entropy,
        "votes": np.rint(tally.votes.sum(axis=1)).astype(np.int64),
        "puzzles": tally.puzzles,
        "failures": tally.failures,
        "status": _texts(calls.status),
        "n_cells": sizes,
        "cells_asked": checks.cells,
        "cell_agreement": checks.agreement,
        "cell_gap": checks.gap,
        "mixed": checks.mixed,
    }
    return pd.DataFrame(table, index=_index(len(units)))


def traces_table(
    drafts: Sequence[Draft],
    puzzles: Sequence[Puzzle],
    replies: Sequence[Reply],
    units: Sequence[Unit],
    obs_names: Sequence[str],
    *,
    reasoning: bool,
) -> pd.DataFrame:
    """Make ``uns[key]["traces"]``."""
    parsed = [parse_answer(reply.text) for reply in replies]
    status = [
        "error"
        if reply.text is None
        else str(found.reason)
        if not found.ok
        else str(Reason.DUPLICATE)
        if names_twice(found.items)
        else "ok"
        for reply, found in zip(replies, parsed, strict=True)
    ]
    table: dict[str, Any] = {
        "round": np.array([draft.round for draft in drafts], dtype=np.int64),
        "screening": np.array([draft.screening for draft in drafts], dtype=bool),
        "sample": _texts([draft.donor for draft in drafts]),
        "groups": _lists([[units[i].group for i in draft.members] for draft in drafts]),
        "cells": _lists([[str(obs_names[row]) for row in draft.cells] for draft in drafts]),
        "candidates": _lists([draft.candidates for draft in drafts]),
        "answer": _lists([found.items for found in parsed]),
        "status": _texts(status),
        "finish_reason": _texts([reply.finish_reason for reply in replies]),
        "tokens": np.array([reply.tokens for reply in replies], dtype=np.int64),
        "prompt_tokens": np.array([reply.prompt_tokens for reply in replies], dtype=np.int64),
        "seed": np.array([reply.seed for reply in replies], dtype=np.int64),
        "cached": np.array([reply.cached for reply in replies], dtype=bool),
        "error": _texts([reply.error for reply in replies]),
    }
    if reasoning:
        table["puzzle"] = _texts([render_user(puzzle) for puzzle in puzzles])
        table["reasoning"] = _texts([found.reasoning for found in parsed])
        # Of an answer that could be read, everything is in the other columns.
        table["response"] = _texts(
            ["" if found.ok else (reply.text or "") for found, reply in zip(parsed, replies, strict=True)]
        )
    return pd.DataFrame(table, index=_index(len(drafts)))


def unreadable(run: Mapping[str, Any]) -> str:
    """Say how many answers of a run could not be read, and how many of these were cut; empty if all could."""
    traces = run["traces"]
    lost = ~traces["status"].isin(["ok", str(Reason.DUPLICATE), "error"])
    if not (n := int(lost.sum())):
        return ""
    cut = int((lost & (traces["finish_reason"] == "length")).sum())
    why = f", {cut} of them because they were cut at max_tokens={run['params']['max_tokens']}" if cut else ""
    return f"{n} of {len(traces)} answers could not be read{why}"


def model_table(model: str, units: Sequence[Unit], tally: Tally, calls: Calls) -> pd.DataFrame:
    """Make one model's part of ``uns[key]["models"]``."""
    table = {
        "model": _texts([model] * len(units)),
        "group": _texts([unit.group for unit in units]),
        "sample": _texts([unit.sample for unit in units]),
        "best": _texts([tally.types[code] if code >= 0 else "" for code in calls.best.tolist()]),
        "support": calls.support,
        "votes": np.rint(tally.votes.sum(axis=1)).astype(np.int64),
        "status": _texts(calls.status),
    }
    return pd.DataFrame(table, index=_index(len(units)))


def stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put the tables of several models below each other."""
    if len(tables) == 1:
        return tables[0]
    table = pd.concat(tables)
    return table.set_axis(_index(len(table)))


def position_table(bias: PositionBias) -> pd.DataFrame:
    """Make ``uns[key]["positions"]``."""
    table = {"position": np.arange(1, len(bias.n) + 1), "votes": bias.n, "agreement": bias.agreement}
    return pd.DataFrame(table, index=_index(len(bias.n)))


def plain_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Make ``uns[key]["params"]``: text, numbers and truth values; anything else as JSON; ``None`` left out."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str):
            found[name] = storable(value)
        elif isinstance(value, bool | int | float):
            found[name] = value
        elif value is not None:
            found[name] = storable(json.dumps(value, ensure_ascii=False))
    return found


def write(
    adata: AnnData,
    key: str,
    *,
    unit_of: np.ndarray,
    groups: pd.DataFrame,
    rates: np.ndarray,
    types: Sequence[str],
    rest: Mapping[str, Any],
    categories: Sequence[str],
) -> None:
    """Write a run."""
    inside = unit_of >= 0
    place = {name: code for code, name in enumerate(categories)}
    codes = np.array([place[name] for name in groups["label"]] + [-1], dtype=np.int64)  # code -1 takes the last entry
    used = [name for name in categories if name in set(groups["label"])]
    column = pd.Categorical.from_codes(codes[unit_of], categories=list(categories)).set_categories(used)
    support = np.append(groups["support"].to_numpy(dtype=np.float32), np.float32(np.nan))
    votes = np.full((adata.n_obs, rates.shape[1]), np.nan, dtype=np.float32)
    votes[inside] = rates.astype(np.float32)[unit_of[inside]]
    if adata.is_view:
        adata._init_as_actual(adata.copy())
    # Ids of an earlier run of ours; a column that is the user's has been refused.
    ids = key + ONTOLOGY
    if ids in columns_of(adata, key):
        adata.uns.pop(f"{ids}_colors", None)
        if ids in adata.obs.columns:
            del adata.obs[ids]
    adata.obs[key] = pd.Series(column, index=adata.obs.index)
    adata.obs[key + SUPPORT] = support[unit_of]
    adata.obsm[key + VOTES] = votes
    written = _names([key, key + SUPPORT, key + VOTES])
    adata.uns[key] = {"groups": groups, "types": np.array(types, dtype=object).astype(str), "columns": written, **rest}
    adata.uns.pop(f"{key}_colors", None)  # stored by position, so that old ones would stand for other labels


def _index(n: int) -> pd.Index:
    return pd.Index([str(i) for i in range(n)], dtype=object)


def _names(values: Sequence[str]) -> np.ndarray:
    return np.array(sorted(set(values)), dtype=object).astype(str)


def _texts(values: Sequence[str]) -> np.ndarray:
    return np.array([storable(value) for value in values], dtype=object)


def _lists(values: Sequence[Sequence[str]]) -> np.ndarray:
    return np.array([storable(json.dumps(list(value), ensure_ascii=False)) for value in values], dtype=object)
