"""``pl.votes``: support of every type for every group."""

from __future__ import annotations

from typing import Any

from anndata import AnnData
from matplotlib.axes import Axes

from scverse_plugin.get import cello1_df
from scverse_plugin.pl._shared import empty, finish, heatmap, literal, make_axes, one_page, room, row_names


def votes(
    adata: AnnData,
    key: str = "cello1",
    *,
    page: int = 1,
    show: bool | None = None,
    save: bool | str | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Any:
    """Draw how often each type was chosen for each group when both were in a puzzle.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`scverse_plugin.tl.annotate`.
    key
        The run's ``key_added``.
    page
        Which 50 groups to draw, where there are more.
    show
        Whether to show the plot; scanpy's setting by default.
    save
        Whether to save it in ``sc.settings.figdir``; a text is added to the file name.
    ax
        Axes to draw on.
    return_fig
        Whether to return the figure.

    Returns
    -------
    The figure, the axes with ``show=False``, else ``None``.
    """
    table, part = one_page(cello1_df(adata, key, table="votes"), page)
    used = table.loc[:, (table > 0).any()] if table.shape[1] > 30 else table
    rows, columns = row_names(used), [str(name) for name in used.columns]
    given, ax = ax, make_axes(ax, 3 + room(rows) + 0.45 * len(columns), 1.5 + 0.7 * room(columns) + 0.3 * len(rows))
    if (used > 0).any(axis=None):
        heatmap(ax, used.to_numpy(), rows, columns, "support")
    else:
        empty(ax, "No answer could be read: there are no votes.")
    ax.set_title(literal([key])[0] + part, parse_math=False)
    return finish("cello1_votes", ax, given=given, show=show, save=save, return_fig=return_fig)
