"""``pl.umap``: labels and support on an embedding, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scanpy as sc
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from scverse_plugin.adata import _store
from scverse_plugin.pl._shared import finish


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
        If there is no such run or embedding, or ``ax`` is not two axes.
    """
    _store.stored(adata, key)
    if basis not in adata.obsm and f"X_{basis}" not in adata.obsm:
        msg = f"basis: adata.obsm has no {basis!r} or 'X_{basis}'; compute it first (sc.tl.umap), or name another"
        raise ValueError(msg)
    if ax is None:
        axes = list(plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")[1])
    else:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
    if len(axes) != 2:
        msg = f"ax must be two axes, for labels and support, got {len(axes)}"
        raise ValueError(msg)
    # scanpy keeps the colours it chooses in uns; drawing must not change the caller's object.
    shown = AnnData(obs=adata.obs[[key, key + _store.SUPPORT]].copy())
    name = basis if basis in adata.obsm else f"X_{basis}"
    shown.obsm[name] = np.asarray(adata.obsm[name])
    if (colours := f"{key}_colors") in adata.uns:
        shown.uns[colours] = adata.uns[colours]
    sc.pl.embedding(shown, basis, color=key, ax=axes[0], show=False, **kwargs)
    limits = {"vmin": 0, "vmax": 1} | kwargs
    sc.pl.embedding(shown, basis, color=key + _store.SUPPORT, ax=axes[1], show=False, **limits)
    return finish("cello1_umap", axes, given=ax, show=show, save=save, return_fig=return_fig)
