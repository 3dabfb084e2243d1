"""Gene names to symbols: what a column of a matrix stands for, and whether its names are symbols at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipe.cello1.task.answer import text_fault
from recipe.cello1.task.puzzle import GENE_SEPARATOR
from recipe.cello1.task.text import is_usable, normal_form

RANKS = ("expression", "specificity")


# A symbol that is not unique has the Ensembl id appended in CELLxGENE files: TBCE_ENSG00000285053.
_SUFFIX = re.compile(r"[\s_|.:;/([-]+ENS[A-Z]*[GTP]\d.*$")
# What gene names are where they are no symbols.
_IDS = {
    "numbers, such as row numbers or Entrez ids": r"\d+(\.\d+)?(e\+?\d+)?",
    "Ensembl ids": r"ENS[A-Z]*[GTPE]\d{6,}\S*",
    "FlyBase, WormBase or TAIR ids": r"(FB(gn|tr)|WBGene)\d+|AT[1-5MC]G\d{5}",
    "ids of a data base": (
        r"[NX][MRP]_\d+(\.\d+)?|(MGI|HGNC|RGD|GeneID|Entrez|ZDB-GENE)[:_-][\w-]+|CCDS\d+(\.\d+)?|(Hs|Mm)\.\d+|rs\d+"
    ),
    "names of proteins": r"[OPQ]\d[A-Z\d]{3}\d|[A-NR-Z]\d[A-Z][A-Z\d]{2}\d|\w+_(HUMAN|MOUSE|RAT)",
    "symbols behind the name of a genome": r"(GRC[a-z]\d+|hg\d+|mm\d+)[_-]+[A-Za-z\d]\S*",
    "names in quotes": r"b?(['\"]).*['\"]",
    "probe ids": r"\w+_at|ILMN_\d+|A_\d+_P\d+|cg\d{8}",
    "positions in the genome": r"[\w.]+[:_\s-]\d[\d,]*[-_\s]\d[\d,]*",
}
_ID = re.compile("|".join(f"(?:{pattern})" for pattern in _IDS.values()), re.IGNORECASE)
# How R and others name columns, where all are named so.
_NUMBERED = re.compile(r"(?i)(V|X|Unnamed: ?|(feature|peak|region|bin|column|var|PC|topic|factor)[ ._-]?)\d+")
_LOOKED_AT = 2_000  # names, drawn from all, by which it is decided whether to look at all of them
_COLUMNS_OF_A_SYMBOL = 20  # columns that one symbol stands for on the average, from which on they are no symbols
_SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")  # looked at first
_PREFIX = re.compile(r"[^\W\d_]\w*?[:_.|-]+")  # rna_CD3D, gene:CD3D
_SHARED, _FEW = 0.9, 10  # the share of the symbols that begin alike, of more than so few
_MADE_UNIQUE = re.compile(r"(.+)[.-]\d+")
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
    """What each column of a matrix stands for."""

    # The symbols, in the order of their first column
    names: tuple[str, ...]
    # int32, for each column its position in ``names``; -1 for a column that is left out
    symbol: np.ndarray
    # bool, for each symbol whether it stands for several columns
    repeated: np.ndarray
    # Columns left out for their symbol, or without one; names that R had changed; repeats that were made unique
    n_excluded: int = 0
    n_unnamed: int = 0
    n_mended: int = 0
    n_made_unique: int = 0
    ids: float = 0.0  # the share of the names that are ids, where most are symbols

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
        notes = [f"{count:,} {text}" for text, count in found.items() if count]
        ids = f"{self.ids:.0%} of the gene names are ids, not symbols: they are listed as they are"
        return [*notes, ids] if self.ids >= 0.005 else notes


class GeneNameError(ValueError):
    """Gene names that cannot be used. Where they are no symbols, ``column`` names one that has them, or is empty."""

    def __init__(self, reason: str, remedy: str, column: str | None = None) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy
        self.column = column

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def clean_symbol(name: object) -> str:
    """Return the symbol in a gene name: without an appended Ensembl id and white space; empty if there is none."""
    if not is_usable(name):
        return ""
    text = normal_form(str(name))
    return (_SUFFIX.sub("", text) if "ENS" in text else text).strip()


def compile_patterns(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """Compile gene patterns."""
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
    names: Sequence[Any],
    exclude: Iterable[str] = (),
    others: Iterable[tuple[str, Sequence[Any]]] = (),
    *,
    capitals: bool = False,
) -> GeneTable:
    """Turn the gene names of a file into symbols, on request in capitals as those of human genes."""
    patterns = compile_patterns(exclude)
    given = [clean_symbol(name) for name in names]
    if fault := _fault(names, given):
        column = _symbol_column(others)
        raise GeneNameError(
            fault, f"use the column {column!r}" if column else "name the column of symbols (none found in var)", column
        )
    ids = _share_of_ids(given)
    given = [text.upper() for text in given] if capitals else given
    symbols = _mended(given)
    _check_names(symbols)
    position: dict[str, int] = {}
    symbol = np.full(len(names), -1, dtype=np.int32)
    n_excluded = 0
    for index, text in enumerate(symbols):
        if not text:
            continue
        if patterns and any(pattern.search(text) for pattern in patterns):
            n_excluded += 1
        else:
            symbol[index] = position.setdefault(text, len(position))
    if not position:
        what = "all of its genes are left out" if n_excluded else "none of its genes has a name"
        raise GeneNameError(what, "check exclude_genes and the column of gene symbols")
    repeated = np.bincount(symbol[symbol >= 0], minlength=len(position)) > 1
    n_mended = sum(new != old for new, old in zip(symbols, given, strict=True))
    unique = [found for text in position if (found := _MADE_UNIQUE.fullmatch(text)) and found[1] in position]
    return GeneTable(tuple(position), symbol, repeated, n_excluded, symbols.count(""), n_mended, len(unique), ids)


def symbol_fault(names: Iterable[object]) -> str:
    """Say why gene names are no symbols."""
    names = list(names)
    return _fault(names, [clean_symbol(name) for name in names])


def _fault(names: Sequence[object], cleaned: Sequence[str]) -> str:
    pairs = [(str(name), symbol) for name, symbol in zip(names, cleaned, strict=True) if symbol]
    given, symbols = {name for name, _ in pairs}, {symbol for _, symbol in pairs}
    if not pairs:
        return ""
    few = _share_of_ids(cleaned) < 0.4
    wrong = [] if few else [symbol for _, symbol in pairs if _ID.fullmatch(symbol)]
    if 2 * len(wrong) > len(pairs):
        share = {
            kind: sum(re.fullmatch(pattern, text, re.IGNORECASE) is not None for text in wrong)
            for kind, pattern in _IDS.items()
        }
        kind = max(share, key=lambda name: share[name])
        return f"{len(wrong):,} of {len(pairs):,} gene names are {kind} ({wrong[0]}), not symbols (TP53)"
    if len(pairs) > 1 and all(_NUMBERED.fullmatch(symbol) for _, symbol in pairs):
        return f"the {len(pairs):,} gene names only number the columns ({pairs[0][1]}), not symbols (TP53)"
    if len(pairs) > _COLUMNS_OF_A_SYMBOL * len(symbols) or len(given) > 2 * len(symbols):
        return f"{len(pairs):,} gene names come to {len(symbols):,} symbols ({pairs[0][0]} to {pairs[0][1]})"
    starts = Counter(found[0] for symbol in symbols if (found := _PREFIX.match(symbol)))
    for start, count in starts.most_common(1):
        if count >= _SHARED * len(symbols) and len(symbols) > _FEW:
            return (
                f"{count:,} of {len(symbols):,} gene names begin with {start!r} ({pairs[0][1]}), no symbols (TP53) do"
            )
    return ""


def _share_of_ids(symbols: Sequence[str]) -> float:
    """Say how many of the names are ids, of many by a sample."""
    named = [symbol for symbol in symbols if symbol]
    if len(named) > _LOOKED_AT:
        named = [named[row] for row in np.random.default_rng(0).integers(len(named), size=_LOOKED_AT).tolist()]
    return sum(_ID.fullmatch(symbol) is not None for symbol in named) / max(1, len(named))


def _symbol_column(columns: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """Find the column that has symbols, rather than numbers or the same few words again and again."""
    known = {name: values for name, values in columns if any(isinstance(value, str) for value in values)}
    for name in dict.fromkeys((*(name for name in _SYMBOL_COLUMNS if name in known), *known)):
        if len(set(known[name])) > len(known[name]) / 2 and not symbol_fault(known[name]):
            return name
    return ""


def are_row_numbers(names: Iterable[object]) -> bool:
    """Say whether gene names only count the rows, as converters from Seurat write them into ``raw``."""
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
    """Weigh each gene by how little it is expressed: a value against the gene's mean and the mean of all genes."""
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
