"""``pl.confusion``: labels against a column that is known."""

from __future__ import annotations

from typing import Any

import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from scverse_plugin.adata import _store
from scverse_plugin.adata._groups import obs_names
from scverse_plugin.pl._shared import empty, finish, heatmap, literal, make_axes, one_page, room


def confusion(
    adata: AnnData,
    reference: str,
    key: str = "cello1",
    *,
    page: int = 1,
    show: bool | None = None,
    save: bool | str | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Any:
    """Draw which labels the cells of each reference type got.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`scverse_plugin.tl.annotate`.
    reference
        Column of ``obs`` to compare with.
    key, page, show, save, ax, return_fig
        As for :func:`votes`.

    Returns
    -------
    The figure, the axes with ``show=False``, else ``None``.

    Raises
    ------
    ValueError
        If there is no such run or column.
    """
    _store.stored(adata, key)
    for name, column in (("reference", reference), ("key", key)):
        if column not in adata.obs.columns:
            raise ValueError(f"{name}: adata.obs has no column {column!r}; it has {obs_names(adata)}")
    known, found = adata.obs[reference], adata.obs[key]
    there = known.notna() & found.notna()
    table = pd.crosstab(known[there].astype(str), found[there].astype(str), normalize="index")
    # The diagonal first, so that agreement shows as one.
    table = table[[name for name in table.index if name in table] + [name for name in table if name not in table.index]]
    table, part = one_page(table, page)
    rows, columns = table.index.tolist(), table.columns.tolist()
    given, ax = ax, make_axes(ax, 3 + room(rows) + 0.45 * len(columns), 1.5 + 0.7 * room(columns) + 0.3 * len(rows))
    if len(table):
        heatmap(ax, table.to_numpy(), rows, columns, "share of cells")
        ax.set_xlabel(literal([key])[0], parse_math=False)
        ax.set_ylabel(literal([reference])[0] + part, parse_math=False)
    else:
        empty(ax, "No cell has both a label and a reference.")
    return finish("cello1_confusion", ax, given=given, show=show, save=save, return_fig=return_fig)
