"""Expression to listed genes: in memory, backed or dask, reading only the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.task.gene_names import RANKS, GeneNameError, GeneTable, are_row_numbers, gene_table, specificity
from recipe.cello1.task.genes import expression, top_genes
from recipe.cello1.task.text import is_usable

FEATURE_TYPES = "feature_types"  # as 10x and scanpy call the column
BLOCK = 2048  # rows read at once
_DENSE_BLOCK = 1 << 24  # values looked at at once


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """A matrix and what its columns stand for."""

    # Cells x genes, as it is stored
    matrix: Any
    # How it is called in messages
    name: str
    # Symbols of the columns
    genes: GeneTable


def open_expression(
    adata: AnnData,
    *,
    layer: str | None = None,
    use_raw: bool | None = None,
    gene_symbols: str | None = None,
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    exclude_genes: Sequence[str] = (),
) -> Expression:
    """Find the matrix and the gene symbols."""
    if layer is not None and use_raw:
        raise ValueError("Cannot specify `layer` and have `use_raw=True`.")
    if use_raw and adata.raw is None:
        raise ValueError("Received `use_raw=True`, but `adata.raw` is empty. Set use_raw=False, or name a layer.")
    if use_raw is None:
        use_raw = layer is None and adata.raw is not None
    matrix, given = expression(adata, layer=layer, use_raw=use_raw)
    where = "adata.raw" if use_raw else "adata"
    var = adata.raw.var if use_raw else adata.var
    name = "adata.raw.X" if use_raw else "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if gene_symbols is not None:
        if gene_symbols not in var.columns:
            msg = f"gene_symbols: {where}.var has no column {gene_symbols!r}; it has {list(map(str, var.columns))}"
            raise ValueError(msg)
        given = var[gene_symbols].to_numpy(dtype=object)
    elif use_raw and adata.raw.n_vars == adata.n_vars and are_row_numbers(given):
        given = adata.var_names  # as converters from Seurat write raw
    names = [None if value is None or value != value else str(value) for value in given]
    n_named = len(names) - names.count(None)
    if mask_var is not None:
        names = _masked(names, mask_var, var, where)
    if FEATURE_TYPES in var.columns:
        names = _genes_only(names, var[FEATURE_TYPES], where)
    if isinstance(exclude_genes, str):
        msg = f"exclude_genes must be a list of patterns, got the str {exclude_genes!r}; write [{exclude_genes!r}]"
        raise ValueError(msg)
    others = ((str(column), var[column].astype(object).tolist()) for column in var.columns)
    try:
        table = gene_table(names, exclude_genes, others)
    except GeneNameError as error:
        remedy = "check gene_symbols, mask_var and exclude_genes"
        if error.column is not None:
            remedy = (
                f"pass gene_symbols={error.column!r}" if error.column else f"add a column of symbols to {where}.var"
            )
        raise ValueError(f"gene_symbols: {where}.var: {error.reason}; {remedy}") from None
    hidden = n_named - (len(names) - names.count(None))  # on request
    for note in replace(table, n_unnamed=table.n_unnamed - hidden).notes:
        logg.warning(f"{where}.var: {note}")
    return Expression(matrix, name, table)


def _masked(names: list[str | None], mask: Any, var: Any, where: str) -> list[str | None]:
    if isinstance(mask, str):
        if mask not in var.columns:
            raise ValueError(f"mask_var: {where}.var has no column {mask!r}; it has {list(map(str, var.columns))}")
        mask = var[mask].to_numpy()
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != (len(names),):
        raise ValueError(
            f"mask_var must be a boolean for each of the {len(names)} genes of {where}, "
            f"got {mask.dtype} of shape {mask.shape}"
        )
    return [name if kept else None for name, kept in zip(names, mask.tolist(), strict=True)]


def _genes_only(names: list[str | None], kinds: Any, where: str) -> list[str | None]:
    """Leave out what is no gene expression: antibodies, guides, peaks."""
    others = [str(kind) for kind in kinds if is_usable(kind) and str(kind).strip().lower() != "gene expression"]
    if len(others) == len(names):
        raise ValueError(
            f"{where}.var[{FEATURE_TYPES!r}] has no 'Gene Expression', only {sorted(set(others))}; "
            "pass the object with gene expression"
        )
    if others:
        logg.hint(f"{len(others)} features are not gene expression ({', '.join(sorted(set(others)))}): left out")
    drop = set(others)
    return [None if str(kind) in drop else name for name, kind in zip(names, kinds, strict=True)]


def is_dask(matrix: Any) -> bool:
    """Say whether a matrix is a dask array, without importing dask."""
    return type(matrix).__module__.partition(".")[0] == "dask"


def read_rows(matrix: Any, rows: np.ndarray) -> Any:
    """Read rows of a matrix wherever it lies."""
    part = matrix[rows]
    if is_dask(part):
        part = part.compute()
    return sp.csr_array(part) if sp.issparse(part) else np.asarray(part)


def check_values(source: Expression, rows: np.ndarray, obs_names: Sequence[str]) -> None:
    """Check the cells that may be drawn: no negative values, no NaN, none without a gene."""
    matrix = source.matrix
    if sp.issparse(matrix) and matrix.format in ("csr", "csc"):
        _check_sparse(source.name, matrix, rows, obs_names)
    elif isinstance(matrix, np.ndarray):
        step = max(1, _DENSE_BLOCK // max(1, matrix.shape[1]))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            block = matrix[some]
            _check_range(source.name, block)
            _check_empty(source.name, some[~block.any(axis=1)], obs_names)


def _check_sparse(name: str, matrix: Any, rows: np.ndarray, obs_names: Sequence[str]) -> None:
    data = matrix.data
    if data.dtype.kind in "buif" and (not data.size or (data.min() > 0 and np.isfinite(data.max()))):
        # The common case, without a copy: every value is fine, and every entry is one of an expressed gene.
        filled = np.zeros(matrix.shape[0], dtype=bool)
        if matrix.format == "csr":
            filled = np.diff(matrix.indptr) > 0
        else:
            for start in range(0, data.size, _DENSE_BLOCK):
                filled[matrix.indices[start : start + _DENSE_BLOCK]] = True
        _check_empty(name, rows[~filled[rows]], obs_names)
        return
    matrix = matrix.tocsr()
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        block = matrix[some]
        _check_range(name, block.data)
        block.eliminate_zeros()
        _check_empty(name, some[np.diff(block.indptr) == 0], obs_names)


def _check_range(name: str, values: np.ndarray) -> None:
    if values.dtype.kind not in "buif":
        msg = f"{name} must hold numbers, got dtype {values.dtype}; choose another matrix with layer= or use_raw="
        raise ValueError(msg)
    if not values.size or values.dtype.kind in "bu":
        return
    low, high = values.min(), values.max()  # either is NaN if anything is
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(
            f"{name} holds NaN or infinite values; filter these cells, or choose another matrix with layer= or use_raw="
        )
    if low < 0:
        raise ValueError(
            f"{name} holds negative values ({low:.3g}), as scaled data do; "
            "choose counts or log-normalised values with layer= or use_raw="
        )


def _check_empty(name: str, rows: np.ndarray, obs_names: Sequence[str]) -> None:
    if len(rows):
        shown = ", ".join(str(obs_names[row]) for row in rows[:3].tolist()) + (", ..." if len(rows) > 3 else "")
        raise ValueError(
            f"{name}: {len(rows)} of the cells to annotate express no gene ({shown}); "
            "remove them first: sc.pp.filter_cells(adata, min_genes=1)"
        )


def _blocks(source: Expression, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    """Read rows in blocks, one column for each symbol."""
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        block = read_rows(source.matrix, some)
        _check_range(source.name, block.data if sp.issparse(block) else block)
        yield some, _by_symbol(block, source.genes)


def _by_symbol(block: Any, genes: GeneTable) -> Any:
    """Bring the columns into the order of the symbols; of several columns for one symbol the largest value counts."""
    n = len(genes.names)
    if not genes.repeated.any():
        if n == block.shape[1]:  # then every column has a symbol of its own, in this order
            return block
        columns = np.empty(n, dtype=np.int64)
        used = np.flatnonzero(genes.symbol >= 0)
        columns[genes.symbol[used]] = used
        return block[:, columns]
    if sp.issparse(block):
        entries = block.tocoo()
        symbol = genes.symbol[entries.col]
        kept = symbol >= 0
        cell, symbol, data = entries.row[kept], symbol[kept], entries.data[kept]
        order = np.lexsort((data, symbol, cell))
        cell, symbol, data = cell[order], symbol[order], data[order]
        last = np.flatnonzero(np.append((np.diff(cell) != 0) | (np.diff(symbol) != 0), True))[: len(cell)]
        return sp.csr_array((data[last], (cell[last], symbol[last])), shape=(block.shape[0], n))
    out = np.zeros((block.shape[0], n), dtype=block.dtype)
    for column, symbol in enumerate(genes.symbol.tolist()):
        if symbol >= 0:
            np.maximum(out[:, symbol], block[:, column], out=out[:, symbol])
    return out


def list_genes(
    source: Expression, rows: np.ndarray, obs_names: Sequence[str], *, n_top: int, rank_by: str = "expression"
) -> dict[int, tuple[str, ...]]:
    """List the top genes of some cells."""
    if rank_by not in RANKS:
        raise ValueError(f"rank_by must be one of {', '.join(RANKS)}, got {rank_by!r}")
    if isinstance(n_top, bool) or not isinstance(n_top, int | np.integer) or n_top < 1:
        raise ValueError(f"n_top_genes must be a positive integer, got {n_top!r}")
    rows = np.unique(rows)
    weights = _weights(source, rows) if rank_by == "specificity" else None
    found: dict[int, tuple[str, ...]] = {}
    for some, block in _blocks(source, rows):
        if weights is not None:
            block = sp.csr_array(block.multiply(weights)) if sp.issparse(block) else block * weights
        found |= zip(some.tolist(), top_genes(block, source.genes.names, n_top), strict=True)
    _check_empty(source.name, np.array([row for row, genes in found.items() if not genes], dtype=np.int64), obs_names)
    return found


def _weights(source: Expression, rows: np.ndarray) -> np.ndarray:
    total = np.zeros(len(source.genes.names))
    for _, block in _blocks(source, rows):
        total += np.asarray(block.sum(axis=0)).ravel()
    return specificity(total, len(rows))


def mean_profiles(source: Expression, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean expression of some groups of cells (groups x symbols), every cell brought to the same sum."""
    means = np.zeros((len(groups), len(source.genes.names)))
    for i, rows in enumerate(groups):
        for _, block in _blocks(source, np.unique(rows)):
            dense = np.asarray(block.toarray() if sp.issparse(block) else block, dtype=np.float64)
            sums = dense.sum(axis=1, keepdims=True)
            means[i] += np.divide(dense, sums, out=np.zeros_like(dense), where=sums > 0).sum(axis=0) / len(rows)
    return means


def most_typical(source: Expression, rows: np.ndarray, n: int) -> np.ndarray:
    """Choose the cells that are most like the mean of all of them (cosine of the log values)."""
    ordered = np.unique(rows)
    if len(ordered) <= 1:
        return ordered
    values = np.vstack(
        [np.log1p(block.toarray() if sp.issparse(block) else block) for _, block in _blocks(source, ordered)]
    )
    norms = np.linalg.norm(values, axis=1)
    values = values / np.maximum(norms, 1e-12)[:, None]
    likeness = values @ values.mean(axis=0)
    return ordered[np.argsort(-likeness, kind="stable")[:n]]
