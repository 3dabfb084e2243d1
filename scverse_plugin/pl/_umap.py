"""``pl.umap``: labels and support on an embedding, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scanpy as sc
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from scverse_plugin.adata import _store
from scverse_plugin.pl._shared import finish, room


def umap(
    adata: AnnData,
    key: str = "cello1",
    *,
    basis: str = "umap",
    show: bool | None = None,
    save: bool | str | None = None,
    ax: Sequence[Axes] | None = None,
    return_fig: bool = False,
    **kwargs: Any,
) -> Any:
    """Draw labels and support on an embedding.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`scverse_plugin.tl.annotate` and ``obsm["X_umap"]``.
    key
        The run's ``key_added``.
    basis
        Embedding, as for :func:`scanpy.pl.embedding`.
    show, save, return_fig
        As for :func:`votes`.
    ax
        Two axes to draw on.
    **kwargs
        Further arguments of :func:`scanpy.pl.embedding`.

    Returns
    -------
    The figure, the two axes with ``show=False``, else ``None``.

    Raises
    ------
    ValueError
        If there is no such run, column or embedding, no cell, or ``ax`` is not two axes.
    """
    _store.stored(adata, key)
    if why := undrawable(adata, key, basis):
        raise ValueError(why)
    given = ax
    labels = adata.obs[key].astype("category")
    shown = AnnData(obs=adata.obs[[key + _store.SUPPORT]].copy())  # scanpy writes colours into what it draws
    shown.obs[key] = labels.cat.rename_categories([name.replace("$", r"\$") for name in labels.cat.categories])
    name = basis if basis in adata.obsm else f"X_{basis}"
    shown.obsm[name] = np.asarray(adata.obsm[name])
    names = list(map(str, labels.cat.categories))
    if "palette" not in kwargs:
        shown.uns[f"{key}_colors"] = _colours(names, adata.uns, key)
    if ax is None:
        columns = 1 if len(names) <= 14 else 2 if len(names) <= 30 else 3  # of scanpy's legend
        width = 11.5 + columns * (0.4 + room(names))
        axes = list(plt.subplots(1, 2, figsize=(width, 4.5), layout="constrained")[1])
    else:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != 2:
        raise ValueError(f"ax must be two axes, for labels and support, got {len(axes)}")
    sc.pl.embedding(shown, basis, color=key, ax=axes[0], show=False, **kwargs)
    limits = {"vmin": 0, "vmax": 1} | kwargs
    sc.pl.embedding(shown, basis, color=key + _store.SUPPORT, ax=axes[1], show=False, **limits)
    for each in axes:
        each.title.set_parse_math(False)
    return finish("cello1_umap", axes, given=given, show=show, save=save, return_fig=return_fig)


def undrawable(adata: AnnData, key: str, basis: str = "umap") -> str:
    """Say why labels and support cannot be drawn on an embedding; nothing if they can."""
    if not adata.n_obs:
        return "adata has no cells, so that there is nothing to draw; take a part that has some"
    if lacking := [name for name in (key, key + _store.SUPPORT) if name not in adata.obs.columns]:
        return f"key: adata.obs has no column {lacking[0]!r} any more; run annotate again"
    name = basis if basis in adata.obsm else f"X_{basis}"
    if name not in adata.obsm:
        return f"basis: adata.obsm has no {basis!r} or 'X_{basis}'; compute it first (sc.tl.umap), or name another"
    shape = np.shape(adata.obsm[name])
    if len(shape) != 2 or shape[1] < 2:
        return f"basis: adata.obsm[{name!r}] has the shape {shape}, and a plot needs two columns; name another"
    return ""


def _colours(names: Sequence[str], uns: Mapping[str, Any], key: str) -> list[str]:
    """Return the caller's colours, or scanpy's with cells without a label in grey."""
    if len(kept := list(uns.get(f"{key}_colors", ()))) == len(names):
        return kept
    palettes = sc.pl.palettes
    colours = next(
        (some for some in (palettes.default_20, palettes.default_28, palettes.default_102) if len(some) >= len(names)),
        ["grey"] * len(names),
    )
    unassigned = uns[key]["params"]["unassigned"]
    return ["lightgrey" if name == unassigned else colour for name, colour in zip(names, colours, strict=False)]
