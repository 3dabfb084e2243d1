"""``pl.votes``: support of every type for every group."""

from __future__ import annotations

from typing import Any

from anndata import AnnData
from matplotlib.axes import Axes

from scverse_plugin.get import cello1_df
from scverse_plugin.pl._shared import finish, heatmap, make_axes, row_names


def votes(
    adata: AnnData,
    key: str = "cello1",
    *,
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
    table = cello1_df(adata, key, table="votes")
    used = table.loc[:, (table > 0).any()] if table.shape[1] > 30 else table
    given, ax = ax, make_axes(ax, 3 + 0.45 * used.shape[1], 2 + 0.3 * len(used))
    heatmap(ax, used.to_numpy(), row_names(used), [str(name) for name in used.columns], "support")
    ax.set_title(key)
    return finish("cello1_votes", ax, given=given, show=show, save=save, return_fig=return_fig)
