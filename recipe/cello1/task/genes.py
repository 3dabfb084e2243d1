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
_SUFFIX = re.compile(r"[_-]ENS[A-Z]*G\d.*$")
# What gene names are where they are no symbols.
_IDS = {
    "numbers, such as row numbers or Entrez ids": r"\d+(\.0+)?",
    "Ensembl ids": r"ENS[A-Z]*[GTPE]\d{6,}\S*",
    "FlyBase or WormBase ids": r"(FB(gn|tr)|WBGene)\d+",
    "ids of a data base": r"[NX][MRP]_\d+(\.\d+)?|(MGI|HGNC|RGD|GeneID|ZDB-GENE)[:-][\w-]+",
    "probe ids": r"\w+_at|ILMN_\d+|A_\d+_P\d+|cg\d{8}",
    "positions in the genome": r"[\w.]+[:_-]\d+[-_]\d+",
    "numbered columns": r"(V|X|Unnamed: ?)\d+",
}
_ID = re.compile("|".join(f"(?:{pattern})" for pattern in _IDS.values()), re.IGNORECASE)
_COLUMNS_OF_A_SYMBOL = 20  # columns that one symbol stands for on the average, from which on they are no symbols
_SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")  # looked at first
_MADE_UNIQUE = re.compile(r"(.+)-\d+")
# R writes HLA-A as HLA.A. Nothing else begins so, and what has a dot of its own is a clone.
_R_NAME = re.compile(r"(HLA|MT|H2|NKX\d)\.\w.*", re.IGNORECASE)
_CLONE = re.compile(r"(.*?)(\.\d+)")
_ACCESSION = re.compile(r"[A-Z]{1,4}\d{5,}")

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
    n_mended, n_made_unique
        Names that R had changed (``HLA.A``); those that look like repeats of another one (``TBCE-1`` beside ``TBCE``).
    """

    names: tuple[str, ...]
    symbol: np.ndarray
    repeated: np.ndarray
    n_excluded: int = 0
    n_unnamed: int = 0
    n_mended: int = 0
    n_made_unique: int = 0

    @property
    def notes(self) -> list[str]:
        """What users should know of the names."""
        found = {
            "genes without a name left out": self.n_unnamed,
            "gene names stand for several columns: each counts once, with its largest value": int(self.repeated.sum()),
            "gene names that R had changed are mended (HLA.A is HLA-A)": self.n_mended,
            "gene names look like repeats made unique (TBCE-1 beside TBCE): they count as genes of their own": (
                self.n_made_unique
            ),
        }
        return [f"{count:,} {text}" for text, count in found.items() if count]


class GeneNameError(ValueError):
    """Gene names that cannot be used.

    ``reason`` says what is wrong, ``remedy`` what to do; where they are no symbols, ``column`` names one that has them,
    and is empty if none is known.
    """

    def __init__(self, reason: str, remedy: str, column: str | None = None) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy
        self.column = column

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
    return (_SUFFIX.sub("", text) if "ENS" in text else text).strip()


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
                msg = f"exclude_genes: {part!r} is not a regular expression ({error}); for example '^MT-'"
                raise ValueError(msg) from None
    return compiled


def gene_table(
    names: Sequence[Any], exclude: Iterable[str] = (), others: Iterable[tuple[str, Sequence[Any]]] = ()
) -> GeneTable:
    """Turn the gene names of a file into symbols.

    Parameters
    ----------
    names
        One for each column.
    exclude
        As for :func:`compile_patterns`.
    others
        Other names of the same genes, each with the name of its column: looked at for symbols if ``names`` has none.

    Returns
    -------
    The table.

    Raises
    ------
    GeneNameError
        If the names are no symbols, one cannot be written into a prompt, or no gene is left.
    ValueError
        If a pattern is wrong.
    """
    patterns = compile_patterns(exclude)
    if fault := symbol_fault(names):
        column = _symbol_column(others)
        raise GeneNameError(fault, f"use the column {column!r}" if column else "name the column of symbols", column)
    given = [clean_symbol(name) for name in names]
    symbols = _mended(given)
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
        raise GeneNameError(what, "check exclude_genes and the column of gene symbols")
    repeated = np.bincount(symbol[symbol >= 0], minlength=len(position)) > 1
    n_mended = sum(new != old for new, old in zip(symbols, given, strict=True))
    unique = [found for text in position if (found := _MADE_UNIQUE.fullmatch(text)) and found[1] in position]
    return GeneTable(tuple(position), symbol, repeated, n_excluded, symbols.count(""), n_mended, len(unique))


def symbol_fault(names: Iterable[object]) -> str:
    """Say why gene names are no symbols.

    Parameters
    ----------
    names
        As a file has them; those that are missing do not count.

    Returns
    -------
    What most of them are instead: numbers, ids of a data base, probes, peaks, or all the same; empty for symbols.
    """
    pairs = [(str(name).strip(), symbol) for name in names if (symbol := clean_symbol(name))]
    given, symbols = {name for name, _ in pairs}, {symbol for _, symbol in pairs}
    if not pairs:
        return ""
    wrong = [symbol for _, symbol in pairs if _ID.fullmatch(symbol)]
    if 2 * len(wrong) > len(pairs):
        share = {
            kind: sum(re.fullmatch(pattern, text, re.IGNORECASE) is not None for text in wrong)
            for kind, pattern in _IDS.items()
        }
        kind = max(share, key=lambda name: share[name])
        return f"{len(wrong):,} of {len(pairs):,} gene names are {kind} ({wrong[0]}), no symbols (TP53)"
    if len(pairs) > _COLUMNS_OF_A_SYMBOL * len(symbols) or len(given) > 2 * len(symbols):
        return f"{len(pairs):,} gene names come to {len(symbols):,} symbols ({pairs[0][0]} to {pairs[0][1]})"
    return ""


def _symbol_column(columns: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """Find the column that has symbols, rather than numbers or the same few words again and again."""
    known = {name: values for name, values in columns if any(isinstance(value, str) for value in values)}
    for name in dict.fromkeys((*(name for name in _SYMBOL_COLUMNS if name in known), *known)):
        if len(set(known[name])) > len(known[name]) / 2 and not symbol_fault(known[name]):
            return name
    return ""


def are_row_numbers(names: Sequence[object]) -> bool:
    """Say whether gene names only count the rows, as converters from Seurat write them into ``raw``.

    Parameters
    ----------
    names
        As a file has them.

    Returns
    -------
    Whether they run from 0 or from 1.
    """
    found = [str(name) for name in names]
    return any(found == [str(row) for row in range(first, first + len(found))] for first in (0, 1))


def _mended(symbols: list[str]) -> list[str]:
    """Write names that R has changed as they were: ``HLA.A``; other dots only where the file has no hyphen at all."""
    changed = [text for text in symbols if "." in text and _R_NAME.fullmatch(text)]
    if not changed:
        return symbols
    everywhere = not any("-" in text for text in symbols)

    def mend(text: str) -> str:
        if "." not in text or not (everywhere or _R_NAME.fullmatch(text)):
            return text
        clone = _CLONE.fullmatch(text)
        if clone and (_ACCESSION.fullmatch(clone[1]) or "." in clone[1]):  # AC007325.4, RP11.34P13.7
            return clone[1].replace(".", "-") + clone[2]
        return text.replace(".", "-")

    return [mend(text) for text in symbols]


def specificity(total: np.ndarray, n_cells: int) -> np.ndarray:
    """Weigh each gene by how little it is expressed: a value against the gene's mean and the mean of all genes.

    Parameters
    ----------
    total
        Sum of each gene over some cells.
    n_cells
        How many cells.

    Returns
    -------
    The factor of each gene; all 1 where nothing is expressed.
    """
    mean = total / max(1, n_cells)
    overall = mean.mean() if len(mean) else 0
    return 1 / (mean + overall) if overall > 0 else np.ones(len(mean))


def _check_names(symbols: Sequence[str]) -> None:
    # All at once, since hardly ever anything is wrong.
    everything = "".join(symbols)
    if not everything or (GENE_SEPARATOR not in everything and not text_fault(everything)):
        return
    for text in symbols:
        fault = f"contains {GENE_SEPARATOR!r}, which separates the genes" if GENE_SEPARATOR in text else ""
        if text and (fault := fault or text_fault(text)):
            raise GeneNameError(f"its gene name {text!r} {fault}", "rename it, or choose another column of symbols")
