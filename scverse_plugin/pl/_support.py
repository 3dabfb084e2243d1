"""``pl.support``: a bar for each group, its runner-up in front of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes

from scverse_plugin.adata import _store
from scverse_plugin.get import cello1_df
from scverse_plugin.get._frame import still_there
from scverse_plugin.pl._shared import finish, literal, make_axes, one_page, room, row_names


def support(
    adata: AnnData,
    key: str = "cello1",
    *,
    page: int = 1,
    show: bool | None = None,
    save: bool | str | None = None,
    ax: Axes | None = None,
    return_fig: bool = False,
) -> Any:
    """Draw the support of each group's best type and of its runner-up.

    Parameters
    ----------
    adata, key, page, show, save, ax, return_fig
        As for :func:`votes`.

    Returns
    -------
    The figure, the axes with ``show=False``, else ``None``.
    """
    whole = cello1_df(adata, key)
    table, part = one_page(whole[still_there(adata, key)], page)
    labelled = table["status"].isin(_store.LABELLED).to_numpy()
    texts = [
        name if status == "ok" else f"{name} ({status})" if name else f"({status})"
        for name, status in zip(table["label"].where(labelled, table["best"]), table["status"], strict=True)
    ]
    names = row_names(table)
    given, ax = ax, make_axes(ax, 4.5 + room(names) + room(texts), 1.4 + 0.32 * len(table))
    rows = np.arange(len(table))
    ax.barh(rows, table["support"], color=np.where(labelled, "tab:blue", "lightgrey"), height=0.7)
    ax.barh(rows, table["runner_up_support"], color="tab:orange", height=0.25, label="runner-up")
    beside = ax.get_yaxis_transform()  # to the right of the axes
    for row, text in enumerate(literal(texts)):
        ax.text(1.02, row, text, va="center", transform=beside, parse_math=False)
    ax.axvline(float(adata.uns[key]["params"]["min_support"]), color="0.4", linestyle=":", linewidth=1)
    ax.set_yticks(rows, literal(names), parse_math=False)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel("support (dotted: min_support)")
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    ax.set_title(literal([key])[0] + part, loc="left", parse_math=False)
    return finish("cello1_support", ax, given=given, show=show, save=save, return_fig=return_fig)
