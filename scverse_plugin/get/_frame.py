"""``get.cello1_df``: groups, votes or traces of a run as a data frame."""

from __future__ import annotations

import json
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from scverse_plugin.adata import _store

TABLES = ("groups", "votes", "traces", "models")
_LISTS = ("groups", "cells", "candidates", "answer")


def cello1_df(
    adata: AnnData, key: str = "cello1", *, table: Literal["groups", "votes", "traces", "models"] = "groups"
) -> pd.DataFrame:
    """Return a table of a run.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`scverse_plugin.tl.annotate`.
    key
        The run's ``key_added``.
    table
        ``"groups"``: one row for each group. ``"votes"``: support, groups x types. ``"traces"``: one row for each
        puzzle, its lists as lists. ``"models"``: one row for each model and group, of a run that asked several.

    Returns
    -------
    A data frame of its own; the first two have the group as index (group and sample where samples have labels of their
    own).

    Raises
    ------
    ValueError
        If there is no such run or table.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    run = _store.stored(adata, key)
    if table == "traces":
        traces = run["traces"].reset_index(drop=True).copy()
        for name in _LISTS:
            traces[name] = [json.loads(text) for text in traces[name]]
        return traces
    if table == "models":
        if "models" not in run:
            raise ValueError(f"table: the run {key!r} asked one model; table='groups' has its labels")
        return run["models"].reset_index(drop=True).copy()
    groups = run["groups"].copy()
    by_sample = bool((groups["sample"] != "").any())
    index = ["group", "sample"] if by_sample else ["group"]
    if table == "groups":
        return groups.set_index(index) if by_sample else groups.drop(columns="sample").set_index(index)
    rows = _rows(adata, key, groups)
    there = rows >= 0
    if lost := groups["group"][~there].tolist():
        logg.hint(f"adata no longer has cells of {len(lost)} annotated groups, which are left out: {lost[:3]}")
    found = adata.obsm[key + _store.VOTES][rows[there]]
    votes = pd.DataFrame(found, columns=[str(name) for name in run["types"]])
    for name in reversed(index):
        votes.insert(0, name, groups[name].to_numpy()[there])
    return votes.set_index(index)


def still_there(adata: AnnData, key: str) -> np.ndarray:
    """Say which groups of a run have cells in this object; all of them where that cannot be known."""
    groups, groupby = adata.uns[key]["groups"], adata.uns[key]["params"].get("groupby")
    if groupby is not None and groupby not in adata.obs.columns:
        return np.ones(len(groups), dtype=bool)
    return _rows(adata, key, groups) >= 0


def cell_groups(adata: AnnData, key: str, groups: pd.DataFrame) -> pd.DataFrame:
    """Return group and sample of each cell, as the table of the groups names them."""
    params = adata.uns[key]["params"]
    if (groupby := params.get("groupby")) is None:
        column = pd.Series(adata.obs_names.astype(str), index=adata.obs.index)
    elif groupby in adata.obs.columns:
        column = adata.obs[groupby].astype(str)
    else:
        raise ValueError(f"key: the column {groupby!r} that was annotated is gone from adata.obs; run annotate again")
    pairs = pd.DataFrame({"group": column.to_numpy()})
    pairs["sample"] = ""
    if (groups["sample"] != "").any():
        pairs["sample"] = adata.obs[params["sample_key"]].astype(str).to_numpy()
    return pairs


def _rows(adata: AnnData, key: str, groups: pd.DataFrame) -> np.ndarray:
    """Return one cell of each group, which all have the same votes; -1 for a group that has none any more."""
    pairs = cell_groups(adata, key, groups)
    first = pairs.reset_index().drop_duplicates(["group", "sample"]).set_index(["group", "sample"])["index"]
    wanted = pd.MultiIndex.from_arrays([groups["group"], groups["sample"]])
    rows = first.reindex(wanted).fillna(-1).to_numpy(dtype=np.int64)
    if (rows < 0).all():
        msg = f"key: adata no longer has cells of the groups {groups['group'].tolist()[:3]}; run annotate again"
        raise ValueError(msg)
    return rows
