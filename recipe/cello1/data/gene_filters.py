"""Gene names: from what a file says to symbols, and which of them are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipe.cello1.answer import text_fault
from recipe.cello1.data.store import BadFileError
from recipe.cello1.puzzle import GENE_SEPARATOR

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
    BadFileError
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
        raise BadFileError(what, "check --exclude-genes and --gene-column")
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
            raise BadFileError(f"its gene name {text!r} {fault}", "rename it, or choose another --gene-column")


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
