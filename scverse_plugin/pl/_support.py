"""``pl.support``: a bar for each group, its runner-up behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes

from scverse_plugin.get import cello1_df
from scverse_plugin.pl._shared import finish, literal, make_axes, row_names


def support(
    adata: AnnData,
    key: str = "cello1",
    *,
    show: bool | None = None,
    save: bool | str | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Any:
    """Draw the support of each group's best type and of its runner-up.

    Parameters
    ----------
    adata, key, show, save, ax, return_fig
        As for :func:`votes`.

    Returns
    -------
    The figure, the axes with ``show=False``, else ``None``.
    """
    table = cello1_df(adata, key)
    labelled = (table["status"] == "ok").to_numpy()
    given, ax = ax, make_axes(ax, 6, 1.2 + 0.32 * len(table))
    rows = np.arange(len(table))
    ax.barh(rows, table["support"], color=np.where(labelled, "tab:blue", "lightgrey"), height=0.7)
    ax.barh(rows, table["runner_up_support"], color="tab:orange", height=0.25, label="runner-up")
    texts = [
        f" {best}" if status == "ok" else f" {best} ({status})" if best else f" ({status})"
        for best, status in zip(table["best"], table["status"], strict=True)
    ]
    for row, (text, value) in enumerate(zip(literal(texts), table["support"], strict=True)):
        ax.text(value, row, text, va="center", fontsize=8)
    ax.axvline(float(adata.uns[key]["params"]["min_support"]), color="black", linestyle=":", linewidth=1)
    ax.set_yticks(rows, literal(row_names(table)))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.35)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("support (dotted: min_support)")
    ax.legend(frameon=False, loc="lower right")
    ax.set_title(key)
    return finish("cello1_support", ax, given=given, show=show, save=save, return_fig=return_fig)
