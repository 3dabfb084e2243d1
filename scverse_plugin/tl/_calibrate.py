"""``tl.calibrate``: what support is worth, learnt from cells whose types are known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.task.text import is_usable, normal_form
from scverse_plugin.adata import _store
from scverse_plugin.get._frame import cell_groups
from scverse_plugin.method._calibrate import LEAST, METHODS, Method, fit


def calibrate(
    adata: AnnData, key: str = "cello1", *, truth: str, method: Method = "isotonic", copy: bool = False
) -> AnnData | None:
    """Learn from cells of known type how likely a group with so much support is right.

    A group's true type is the most common one of its cells, and its best type is right if it has that name, case aside.
    The map is for runs of the same model with like settings: :func:`annotate` takes it as ``calibration``. The error
    after calibration is measured on groups that the map has not seen, by cross-validation in up to five parts.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`annotate`.
    key
        The run's ``key_added``.
    truth
        Column of ``obs`` with the true types. Cells without one ("unknown", NaN) are left out.
    method
        ``"isotonic"``: any map that never falls, for some hundred groups. ``"temperature"``: one number by which the
        logit of the support is divided, for few groups; support is kept 0.01 from 0 and 1 for it.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, or a changed copy with ``copy=True``. Sets the following field:

    ``adata.uns[key]["calibration"]`` : :class:`dict`
        ``method`` and the map (``x`` and ``y``, or ``temperature``), ``n`` (groups), ``n_right``, ``ece_before`` and
        ``ece_after`` (expected calibration errors, ten bins), ``auroc`` (of support, right against wrong), ``truth``,
        and of the run ``support`` (``votes`` or ``readout``), ``model`` and ``fingerprint``.

    Raises
    ------
    ValueError
        If there is no such run, column or method, there are fewer than 10 groups with votes and a truth, fewer than
        two of them are right or wrong, or a run of several models has mixed votes and read-out.

    Examples
    --------
    >>> scverse_plugin.tl.calibrate(labelled, truth="cell_type")  # doctest: +SKIP
    >>> known = labelled.uns["cello1"]["calibration"]  # doctest: +SKIP
    >>> sc.tl.cello1_annotate(adata, types, groupby="leiden", model="MODEL", calibration=known)  # doctest: +SKIP
    """
    run = _store.stored(adata, key)
    if truth not in adata.obs.columns:
        raise ValueError(f"truth: adata.obs has no column {truth!r}; it has {list(map(str, adata.obs.columns))}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    groups = run["groups"]
    true = _true_types(adata, key, groups, truth)
    usable = ((groups["best"] != "") & (true != "")).to_numpy()
    support = groups["raw_support"].to_numpy(dtype=float)[usable]
    right = np.array([_same(*pair) for pair in zip(groups["best"][usable], true[usable], strict=True)], dtype=bool)
    _check(right, truth, len(groups))
    kinds = _listed(run["params"]["support"])
    if len(set(kinds)) > 1:
        msg = f"key: the models of the run {key!r} have support of {' and '.join(sorted(set(kinds)))}; use one kind"
        raise ValueError(msg)
    unknown = sorted({name for name in true[usable] if not any(_same(name, listed) for listed in run["types"])})
    if unknown:
        logg.hint(f"true types that were no candidates, so that their groups are wrong: {', '.join(unknown[:5])}")
    found = fit(np.clip(support, 0, 1), right, method)
    _store.check_writable(adata, copy=copy)
    if copy:
        adata = adata.copy()
    elif adata.is_view:
        adata._init_as_actual(adata.copy())
    about = {name: run["params"][name] for name in ("model", "fingerprint")}
    adata.uns[key] = {**adata.uns[key], "calibration": {**found, "truth": truth, "support": kinds[0], **about}}
    logg.info(
        f"calibrated on {found['n']} groups, {found['n_right']} right: expected calibration error "
        f"{found['ece_before']:.3f} before, {found['ece_after']:.3f} after (groups not seen); "
        f"AUROC {found['auroc']:.3f}"
    )
    if found["ece_after"] >= found["ece_before"]:
        logg.warning(
            f"calibration does not lower the error of support on groups not seen ({found['ece_before']:.3f} before, "
            f"{found['ece_after']:.3f} after): leave support as it is, or calibrate on more groups"
        )
    return adata if copy else None


def _true_types(adata: AnnData, key: str, groups: pd.DataFrame, truth: str) -> pd.Series:
    """Return the most common true type of each group; empty where no cell has one."""
    cells = cell_groups(adata, key, groups)
    cells["true"] = adata.obs[truth].astype(object).to_numpy()
    cells = cells[[is_usable(value) for value in cells["true"]]]
    if not len(cells):
        msg = f"truth: no cell has a type in adata.obs[{truth!r}], only NaN or 'unknown'; name another column"
        raise ValueError(msg)
    cells["true"] = cells["true"].astype(str)
    most = cells.groupby(["group", "sample"])["true"].agg(lambda names: names.value_counts().sort_index().idxmax())
    wanted = pd.MultiIndex.from_arrays([groups["group"], groups["sample"]])
    return pd.Series(most.reindex(wanted).fillna("").to_numpy(), index=groups.index)


def _same(first: str, second: str) -> bool:
    return normal_form(first).lower() == normal_form(second).lower()


def _listed(value: Any) -> list[str]:
    """Read a parameter of a run: one value, or of several models a JSON list."""
    return json.loads(value) if value.startswith("[") else [value]


def _check(right: np.ndarray, truth: str, n_groups: int) -> None:
    n, n_right = len(right), int(right.sum())
    more = "calibrate on more groups (a finer groupby, or none at all)"
    if n < LEAST:
        msg = f"truth: {n} of {n_groups} groups have votes and a type in obs[{truth!r}], {LEAST} are needed; {more}"
        raise ValueError(msg)
    if n_right in (0, n):
        names = "" if n_right else f", or check that {truth!r} names types as cell_types does"
        what = "right" if n_right else "wrong"
        raise ValueError(f"truth: all {n} groups are {what}, so that nothing can be learnt from them; {more}{names}")
    if min(n_right, n - n_right) < 2:
        msg = f"truth: only one of {n} groups is {'right' if n_right == 1 else 'wrong'}, two are needed; {more}"
        raise ValueError(msg)
