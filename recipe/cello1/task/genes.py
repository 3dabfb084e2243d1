"""Expression to cells: for each row of a matrix the names of its top-expressed genes.

Arrays and an AnnData in, plain tuples of gene names out; anndata itself is not imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp


def expression(adata: Any, *, layer: str | None = None, use_raw: bool = False) -> tuple[Any, np.ndarray]:
    """Pick the expression matrix of an AnnData and the gene names that go with it.

    Parameters
    ----------
    adata
        Annotated data; read only.
    layer
        Name of the layer to take instead of ``X``.
    use_raw
        Take ``adata.raw`` instead, which may have more genes.

    Returns
    -------
    The matrix (cells x genes), as it is stored, and the gene names.

    Raises
    ------
    ValueError
        If both are asked for, or what is asked for is not there.
    """
    if layer is not None and use_raw:
        raise ValueError(f"layer={layer!r} and use_raw=True exclude each other; choose one")
    if use_raw:
        if adata.raw is None:
            raise ValueError("use_raw=True, but adata.raw is None; set use_raw=False")
        return adata.raw.X, np.asarray(adata.raw.var_names, dtype=object)
    names = np.asarray(adata.var_names, dtype=object)
    if layer is None:
        if adata.X is None:
            raise ValueError(f"adata.X is None; name a layer instead, it has {sorted(map(str, adata.layers))}")
        return adata.X, names
    if layer not in adata.layers:
        raise ValueError(f"adata has no layer {layer!r}; it has {sorted(map(str, adata.layers))}")
    return adata.layers[layer], names


def top_genes(
    matrix: np.ndarray | sp.spmatrix | sp.sparray, names: Sequence[str] | np.ndarray, n_top: int | None = 50
) -> list[tuple[str, ...]]:
    """List the top-expressed genes of each cell in descending order of expression.

    Genes that a cell does not express (value 0) are never listed. Equal values keep the order of ``names``, so that
    the result does not depend on how the matrix is stored.

    Parameters
    ----------
    matrix
        Expression, cells x genes: counts or any increasing function of them with 0 for absence (log-normalised...).
        Dense, CSR or CSC (other sparse formats are converted).
    names
        Gene names, one for each column.
    n_top
        How many genes to list at most; ``None`` for all expressed ones.

    Returns
    -------
    For each row the names of its genes; fewer than ``n_top`` if fewer are expressed, none at all for an empty row.

    Raises
    ------
    ValueError
        If the shapes do not fit, a name occurs twice, ``n_top`` is not positive, or values are NaN, infinite or
        negative (scaled data have no top-expressed genes).
    """
    if n_top is not None and (isinstance(n_top, bool) or not isinstance(n_top, int | np.integer) or n_top < 1):
        raise ValueError(f"n_top must be a positive integer or None, got {n_top!r}")
    values: Any = sp.csr_array(matrix) if sp.issparse(matrix) else np.asarray(matrix)
    genes = np.array([str(name) for name in names], dtype=object)
    if values.ndim != 2 or values.shape[1] != len(genes):
        raise ValueError(f"matrix has the shape {values.shape} for {len(genes)} gene names; it must be cells x genes")
    if twice := [name for name, count in Counter(genes.tolist()).items() if count > 1]:
        raise ValueError(f"the gene names {twice[:3]} occur more than once; call adata.var_names_make_unique() first")
    if sp.issparse(values):
        # Stored indices may be unordered or repeated; the tie-break needs them in column order. Copies only then.
        if not values.has_canonical_format:
            values = values.copy()
            values.sum_duplicates()
        _check_values(values.data)
        bounds = values.indptr.tolist()
        rows = ((values.data[a:b], values.indices[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
    else:
        _check_values(values)
        columns = np.arange(len(genes))
        rows = ((row, columns) for row in values)
    return [tuple(genes[_top(data, columns, n_top)].tolist()) for data, columns in rows]


def _top(data: np.ndarray, columns: np.ndarray, n_top: int | None) -> np.ndarray:
    """Return the columns of the positive values, largest first, ties in column order."""
    expressed = np.flatnonzero(data > 0)
    data, columns = data[expressed], columns[expressed]
    if n_top is not None and len(data) > n_top:
        # Only what reaches the n-th largest value needs sorting.
        reach = data >= np.partition(data, len(data) - n_top)[len(data) - n_top]
        data, columns = data[reach], columns[reach]
    # Sorting the reversed row ascending and reading it backwards is descending and stable; no negation, which would
    # overflow on unsigned counts.
    order = np.argsort(data[::-1], kind="stable")[::-1]
    return columns[::-1][order][:n_top]


def _check_values(values: np.ndarray) -> None:
    if values.dtype.kind not in "buif":
        raise ValueError(f"matrix must hold numbers, got dtype {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("matrix holds NaN or infinite values; filter these cells or take another layer")
    if values.dtype.kind in "if" and values.size and values.min() < 0:
        msg = "matrix holds negative values, as scaled data do; take counts or log-normalised values (layer=, use_raw=)"
        raise ValueError(msg)
