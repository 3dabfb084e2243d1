"""``adata.cello1``: the same functions as methods, through anndata's own hook."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import anndata
from anndata import AnnData

from scverse_plugin import get, pl, tl
from scverse_plugin._report import report

_NAME = "cello1"


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a function whose first parameter is ``adata``."""

    def method(self: Cello1, *args: Any, **kwargs: Any) -> Any:
        return function(self._adata, *args, **kwargs)

    method.__name__ = method.__qualname__ = function.__name__
    method.__doc__ = function.__doc__
    _, *rest = inspect.signature(function).parameters.values()
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = inspect.Signature([own, *rest])  # type: ignore[attr-defined]
    return method


class Cello1:
    """Annotation with cello1.

    Parameters
    ----------
    adata
        The object.
    """

    # anndata keeps one instance on each object: it must hold nothing but the object.
    def __init__(self, adata: AnnData) -> None:
        self._adata = adata

    annotate = _method(tl.annotate)
    calibrate = _method(tl.calibrate)
    ontology_ids = _method(tl.ontology_ids)
    df = _method(get.cello1_df)
    votes = _method(pl.votes)
    support = _method(pl.support)
    confusion = _method(pl.confusion)
    umap = _method(pl.umap)
    report = _method(report)


def register_namespace() -> None:
    """Register ``adata.cello1`` where anndata has the hook (0.12 and later); a second call changes nothing."""
    hook = getattr(anndata, "register_anndata_namespace", None)
    if hook is None or hasattr(AnnData, _NAME):
        return
    hook(_NAME)(Cello1)
