"""Cell Ontology ids for the labels of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.task.ontology import CellOntology, load_ontology
from scverse_plugin.adata import _store

UNKNOWN = "unknown"  # what CELLxGENE's schema writes for cells without a type


def ontology_ids(adata: AnnData, key: str = "cello1", *, copy: bool = False) -> AnnData | None:
    """Look up the Cell Ontology id of each label.

    A label gets an id only if it is the label or a synonym of one term, in the common form of
    ``recipe.cello1.task.ontology.normalise``; nothing is guessed. The log says where the term is called otherwise.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`annotate`.
    key
        The run's ``key_added``.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or a changed copy with ``copy=True``. Sets the following field:

    ``adata.obs[key + "_ontology_term_id"]`` : :class:`pandas.Series` (dtype ``category``)
        Ids (``CL:0000236``); ``"unknown"`` for labels without a term, missing for cells without a label.

    Raises
    ------
    ValueError
        If there is no such run, its labels are gone, a column of this name is not ours, or a backed object would have
        to be copied.
    ImportError
        If ``cellxgene-ontology-guide`` is not installed.
    """
    _store.stored(adata, key)
    if key not in adata.obs.columns:
        raise ValueError(f"key: adata.obs has no column {key!r} any more; run annotate again")
    _store.check_free(adata, key, [key + _store.ONTOLOGY])
    _store.check_writable(adata, copy=copy)
    if copy:
        adata = adata.copy()
    labels = adata.obs[key].astype("category")
    names = [str(name) for name in labels.cat.categories]
    found = _look_up(names)
    if missing := [name for name in names if found[name] == UNKNOWN]:
        logg.hint(f"no Cell Ontology term has these names: {', '.join(missing)}")
    ids = [found[name] for name in names]
    used = list(dict.fromkeys(ids))
    codes = np.array([used.index(term) for term in ids] + [-1], dtype=np.int64)  # code -1 takes the last entry
    column = pd.Categorical.from_codes(codes[labels.cat.codes.to_numpy()], categories=used)
    _store.write_ontology(adata, key, pd.Series(column, index=adata.obs.index))
    return adata if copy else None


def ontology_tables() -> CellOntology:
    """Load the Cell Ontology."""
    try:
        return load_ontology()
    except ImportError as error:
        raise ImportError(f"{error}, or with the package's [ontology] extra") from error


def _look_up(names: list[str]) -> dict[str, str]:
    ontology = ontology_tables()
    found = {name: ontology.find(name) for name in names}
    other = [(name, ontology.label(term)) for name, term in found.items() if term]
    if renamed := [f"{name} is {label}" for name, label in other if name.lower() != label.lower()]:
        logg.hint(f"taken for terms of another name: {', '.join(renamed)}")
    return {name: term or UNKNOWN for name, term in found.items()}
