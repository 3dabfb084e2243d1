"""What the plots share: axes, pages of rows, the end of every plot, the heatmap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scanpy import settings

PAGE = 50  # rows of one plot
_SUFFIXES = (".png", ".pdf", ".svg")
_INCH = 0.075  # of a character of a label


def one_page(table: Any, page: int) -> tuple[Any, str]:
    """Return the rows of a page, and what a title says of it; nothing where all fit."""
    n_pages = max(1, -(-len(table) // PAGE))
    if isinstance(page, bool) or not isinstance(page, int | np.integer) or not 1 <= page <= n_pages:
        raise ValueError(f"page must be a number from 1 to {n_pages} ({PAGE} rows each), got {page!r}")
    start = PAGE * (page - 1)
    rows = table.iloc[start : start + PAGE]
    return rows, f", rows {start + 1} to {start + len(rows)} of {len(table)}" if n_pages > 1 else ""


def make_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes to draw on."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def room(names: Sequence[str]) -> float:
    """Return the inches that the longest of some labels takes."""
    return _INCH * max(map(len, names), default=0)


def empty(ax: Axes, text: str) -> None:
    """Say in a plot that there is nothing to show."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)


def finish(
    name: str,
    axes: Axes | list[Axes],
    *,
    given: Any,
    show: bool | None,
    save: bool | str | None,
    return_fig: bool,
) -> Any:
    """Save, show and return as scanpy's plots do."""
    figure: Any = (axes[0] if isinstance(axes, list) else axes).figure
    if save is None:
        save = settings.autosave
    if save:
        addition = save if isinstance(save, str) else ""
        suffix = Path(addition).suffix if Path(addition).suffix in _SUFFIXES else ""
        addition = addition.removesuffix(suffix)
        folder = Path(settings.figdir)
        folder.mkdir(parents=True, exist_ok=True)
        ending = suffix or f".{settings.file_format_figs}"
        figure.savefig(folder / f"{name}{addition}{settings.plot_suffix}{ending}", bbox_inches="tight")
    if return_fig:
        return figure
    if show is None:
        show = settings.autoshow and given is None
    if show:
        plt.show()
        return None
    return axes


def heatmap(ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], label: str) -> None:
    """Draw a matrix of shares with its numbers."""
    image = ax.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    plain = {"parse_math": False}  # names are no formulas
    ax.set_xticks(range(len(columns)), literal(columns), rotation=45, ha="right", rotation_mode="anchor", **plain)
    ax.set_yticks(range(len(rows)), literal(rows), **plain)
    if values.size <= 400:
        for (i, j), value in np.ndenumerate(values):
            if value >= 0.005:
                colour = "white" if value > 0.6 else "black"
                ax.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=colour)
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)


def literal(names: Sequence[str]) -> list[str]:
    """Return names as fonts can show them."""
    return ["".join([c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name]) for name in names]


def row_names(table: Any) -> list[str]:
    """Name the rows of a table of :func:`scverse_plugin.get.cello1_df`."""
    return [" · ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.index]
