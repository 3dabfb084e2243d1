"""Columns of ``obs`` to groups, samples and the units that get a label."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from anndata import AnnData
from natsort import natsorted
from scanpy import logging as logg

from recipe.cello1.task.labels import Labels, make_labels
from recipe.cello1.task.text import is_usable
from scverse_plugin.adata._matrix import Expression, most_typical
from scverse_plugin.method._units import Unit, draw_cells

CELL_CHOICES = ("random", "representative")
TYPICAL_AMONG = 50  # cells of a group that the representative ones are chosen from


def obs_names(adata: AnnData) -> list[str]:
    """Return the columns of ``obs``, for messages."""
    return list(map(str, adata.obs.columns))


def _labels(series: pd.Series) -> Labels:
    """Turn a column into codes; names in natural order, numbers as text, what says nothing ("unknown") as missing."""
    values = series.cat.remove_unused_categories() if isinstance(series.dtype, pd.CategoricalDtype) else series
    return make_labels(values, lambda name: str(name) if is_usable(name) else "", natsorted)


def read_groups(adata: AnnData, groupby: str | None, groups: Iterable[str] | None) -> Labels:
    """Read the groups; a column of texts is taken as scanpy takes it."""
    if groupby is None:
        if groups is not None:
            raise ValueError(f"groups={groups} needs groupby, the column of obs that has these groups")
        names = tuple(map(str, adata.obs_names))
        if len(set(names)) < len(names):
            raise ValueError(
                "groupby: without it every cell is labelled by its name, but obs_names repeat; "
                "call adata.obs_names_make_unique()"
            )
        return Labels(np.arange(adata.n_obs), names)
    if groupby not in adata.obs.columns:
        raise ValueError(f"groupby: adata.obs has no column {groupby!r}; it has {obs_names(adata)}")
    column = adata.obs[groupby]
    if not isinstance(column.dtype, pd.CategoricalDtype) and pd.api.types.infer_dtype(column, skipna=True) != "string":
        raise ValueError(
            f"groupby: adata.obs[{groupby!r}] must be categorical, got {column.dtype}; convert it first: "
            f"adata.obs[{groupby!r}] = adata.obs[{groupby!r}].astype('category')"
        )
    found = _labels(column)
    if groups is not None:
        if isinstance(groups, str):
            raise ValueError(f"groups must be a list of groups, got the str {groups!r}; write [{groups!r}]")
        wanted = [str(name) for name in groups]
        if unknown := [name for name in wanted if name not in found.categories]:
            if silent := [name for name in unknown if name in set(column.astype(str))]:
                raise ValueError(
                    f"groups: {silent} in adata.obs[{groupby!r}] counts as no group; rename it to have it labelled"
                )
            raise ValueError(f"groups: adata.obs[{groupby!r}] has no {unknown}; it has {list(found.categories)}")
        kept = [name for name in found.categories if name in set(wanted)]
        lookup = np.array([kept.index(name) if name in set(wanted) else -1 for name in found.categories] + [-1])
        found = Labels(lookup[found.codes], tuple(kept))
    elif (missing := int((found.codes < 0).sum())) > 0:
        logg.warning(f"{missing} cells have no group in adata.obs[{groupby!r}] (NaN, 'unknown'): they get no label")
    if not found.categories:
        msg = f"groupby: adata.obs[{groupby!r}] has no groups: every entry is empty, or groups=[] leaves none"
        raise ValueError(msg)
    return found


def only(groups: Labels, inside: np.ndarray) -> Labels:
    """Keep some cells, and the groups that have any of them."""
    codes = np.where(inside, groups.codes, -1)
    present = np.unique(codes[codes >= 0])
    lookup = np.full(len(groups.categories) + 1, -1, dtype=np.int64)
    lookup[present] = np.arange(len(present))
    return Labels(lookup[codes], tuple([groups.categories[code] for code in present.tolist()]))


def read_samples(adata: AnnData, sample_key: str | None, rows: np.ndarray) -> Labels | None:
    """Read the samples (donors)."""
    if sample_key is None:
        return None
    if sample_key not in adata.obs.columns:
        raise ValueError(f"sample_key: adata.obs has no column {sample_key!r}; it has {obs_names(adata)}")
    found = _labels(adata.obs[sample_key])
    if (missing := int((found.codes[rows] < 0).sum())) > 0:
        raise ValueError(
            f"sample_key: {missing} cells have no sample (NaN), or 'unknown', in adata.obs[{sample_key!r}]; "
            "fill them in, or leave these cells out"
        )
    return found


def make_units(
    groups: Labels,
    samples: Labels | None,
    *,
    by_sample: bool,
    n_cells: int,
    cell_choice: str,
    source: Expression,
    rng: np.random.Generator,
) -> tuple[list[Unit], np.ndarray]:
    """Make the units and draw the cells that stand for them."""
    n_samples = len(samples.categories) if samples is not None else 1
    sample_codes = samples.codes if samples is not None else np.zeros(len(groups.codes), dtype=np.int64)
    keys = np.where(groups.codes >= 0, groups.codes * n_samples + sample_codes if by_sample else groups.codes, -1)
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] >= 0]
    present, starts = np.unique(keys[order], return_index=True)
    unit_of = np.full(len(keys), -1, dtype=np.int64)
    unit_of[order] = np.repeat(np.arange(len(present)), np.diff(np.append(starts, len(order))))
    units = []
    for key, rows in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
        group, sample = divmod(key, n_samples) if by_sample else (key, 0)
        donors = sample_codes[rows] if samples is not None else None
        if len(rows) == 1:
            cells = rows
        elif cell_choice == "representative":
            cells = most_typical(source, draw_cells(rows, donors, max(n_cells, TYPICAL_AMONG), rng), n_cells)
        else:
            cells = draw_cells(rows, donors, n_cells, rng)
        units.append(
            Unit(
                groups.categories[group],
                samples.categories[sample] if by_sample and samples is not None else "",
                tuple(cells.tolist()),
                tuple([samples.categories[i] for i in sample_codes[cells]])
                if samples is not None
                else ("",) * len(cells),
            )
        )
    return units, unit_of
