"""Expression to cells: for each row of a matrix the names of its top-expressed genes.

Arrays and an AnnData in, plain tuples of gene names out; anndata itself is not imported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from recipe.cello1.task.answer import text_fault
from recipe.cello1.task.puzzle import GENE_SEPARATOR


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
        msg = f"layer={layer!r} and use_raw=True exclude each other; choose one"
        raise ValueError(msg)
    if use_raw:
        if adata.raw is None:
            msg = "use_raw=True, but adata.raw is None; set use_raw=False"
            raise ValueError(msg)
        return adata.raw.X, np.asarray(adata.raw.var_names, dtype=object)
    names = np.asarray(adata.var_names, dtype=object)
    if layer is None:
        if adata.X is None:
            msg = f"adata.X is None; name a layer instead, it has {sorted(map(str, adata.layers))}"
            raise ValueError(msg)
        return adata.X, names
    if layer not in adata.layers:
        msg = f"adata has no layer {layer!r}; it has {sorted(map(str, adata.layers))}"
        raise ValueError(msg)
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
        msg = f"n_top must be a positive integer or None, got {n_top!r}"
        raise ValueError(msg)
    values: Any = sp.csr_array(matrix) if sp.issparse(matrix) else np.asarray(matrix)
    genes = np.array([str(name) for name in names], dtype=object)
    if values.ndim != 2 or values.shape[1] != len(genes):
        msg = f"matrix has the shape {values.shape} for {len(genes)} gene names; it must be cells x genes"
        raise ValueError(msg)
    if twice := [name for name, count in Counter(genes.tolist()).items() if count > 1]:
        msg = f"the gene names {twice[:3]} occur more than once; call adata.var_names_make_unique() first"
        raise ValueError(msg)
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
        msg = f"matrix must hold numbers, got dtype {values.dtype}"
        raise ValueError(msg)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        msg = "matrix holds NaN or infinite values; filter these cells or take another layer"
        raise ValueError(msg)
    if values.dtype.kind in "if" and values.size and values.min() < 0:
        msg = "matrix holds negative values, as scaled data do; take counts or log-normalised values (layer=, use_raw=)"
        raise ValueError(msg)


RANKS = ("expression", "specificity")


# A symbol that is not unique has the Ensembl id appended in CELLxGENE files: TBCE_ENSG00000285053.
_SUFFIX = re.compile(r"_ENS[A-Z]*G\d.*$")


_ENSEMBL = re.compile(r"ENS[A-Z]*G\d+(\.\d+)?")


HOUSEKEEPING = "housekeeping"


GENE_SETS: dict[str, tuple[str, ...]] = {
    # Highly expressed in nearly every cell, so that they tell little of its type.
    HOUSEKEEPING: (
        r"^MT-",  # mitochondrial
        r"^MTRNR2L\d+$",
        r"^RP[LS]\d+[ALXY]*\d*(P\d+)?$",  # ribosomal proteins and their pseudogenes; not RPS6KA1 and the like
        r"^RPLP[012](P\d+)?$",
        r"^(RPSA|RACK1|FAU|UBA52)(P\d+)?$",
        r"^(MALAT1|NEAT1|KCNQ1OT1)$",  # long non-coding
        r"^EEF(1A1|1B2|1D|1G|2)(P\d+)?$",  # translation
        r"^(EIF1|NACA|PABPC1|TPT1|PTMA)$",
        r"^(ACTB|ACTG1|GAPDH|B2M|UBB|UBC|FTH1|FTL|TMSB4X|TMSB10|HSPA8|HSP90AA1|HSP90AB1)$",
    )
}


@dataclass(frozen=True, slots=True)
class GeneTable:
    """What each column of a matrix stands for.

    Attributes
    ----------
    names
        The symbols, in the order of their first column.
    symbol
        int32, for each column its position in ``names``; -1 for a column that is left out.
    repeated
        bool, for each symbol whether it stands for several columns.
    n_excluded, n_unnamed
        Columns left out because of their symbol, or because they have none.
    """

    names: tuple[str, ...]
    symbol: np.ndarray
    repeated: np.ndarray
    n_excluded: int = 0
    n_unnamed: int = 0


class GeneNameError(ValueError):
    """Gene names that cannot be used: ``reason`` says what is wrong, ``remedy`` what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def clean_symbol(name: object) -> str:
    """Return the symbol in a gene name: without an appended Ensembl id and white space; empty if there is none.

    Parameters
    ----------
    name
        What the file has; ``None`` and NaN are no name.

    Returns
    -------
    The symbol.
    """
    if name is None or name != name:  # NaN is the one value that differs from itself
        return ""
    text = str(name)
    return (_SUFFIX.sub("", text) if "_ENS" in text else text).strip()


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """Compile gene patterns.

    Parameters
    ----------
    patterns
        Regular expressions, searched for in a symbol without regard to case (so that ``^MT-`` fits mice, too), or
        names of ``GENE_SETS``.

    Returns
    -------
    The compiled patterns.

    Raises
    ------
    ValueError
        If one is not a regular expression.
    """
    compiled = []
    for pattern in patterns:
        for part in GENE_SETS.get(pattern, (pattern,)):
            try:
                compiled.append(re.compile(part, re.IGNORECASE))
            except re.error as error:
                msg = f"--exclude-genes {part!r} is not a regular expression ({error}); for example '^MT-'"
                raise ValueError(msg) from None
    return compiled


def gene_table(names: Sequence[Any], exclude: Iterable[str] = ()) -> GeneTable:
    """Turn the gene names of a file into symbols.

    Parameters
    ----------
    names
        One for each column.
    exclude
        As for :func:`compile_patterns`.

    Returns
    -------
    The table.

    Raises
    ------
    GeneNameError
        If a name cannot be written into a prompt, or no gene is left.
    ValueError
        If a pattern is wrong.
    """
    patterns = compile_patterns(exclude)
    symbols = [clean_symbol(name) for name in names]
    _check_names(symbols)
    position: dict[str, int] = {}
    symbol = np.full(len(names), -1, dtype=np.int32)
    n_excluded = 0
    for column, text in enumerate(symbols):
        if not text:
            continue
        if patterns and any(pattern.search(text) for pattern in patterns):
            n_excluded += 1
        else:
            symbol[column] = position.setdefault(text, len(position))
    if not position:
        what = "all of its genes are left out" if n_excluded else "none of its genes has a name"
        raise GeneNameError(what, "check --exclude-genes and --gene-column")
    repeated = np.bincount(symbol[symbol >= 0], minlength=len(position)) > 1
    return GeneTable(tuple(position), symbol, repeated, n_excluded, symbols.count(""))


def _check_names(symbols: Sequence[str]) -> None:
    # All at once, since hardly ever anything is wrong.
    everything = "".join(symbols)
    if not everything or (GENE_SEPARATOR not in everything and not text_fault(everything)):
        return
    for text in symbols:
        fault = f"contains {GENE_SEPARATOR!r}, which separates the genes" if GENE_SEPARATOR in text else ""
        if text and (fault := fault or text_fault(text)):
            raise GeneNameError(f"its gene name {text!r} {fault}", "rename it, or choose another --gene-column")


def share_of_ensembl_ids(names: Sequence[str]) -> float:
    """Return the share of names that are Ensembl ids rather than symbols.

    Parameters
    ----------
    names
        Gene names, at least one.

    Returns
    -------
    A share in [0, 1].
    """
    return sum(_ENSEMBL.fullmatch(name) is not None for name in names) / len(names)
