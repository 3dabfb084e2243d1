"""Symbols as a species has them: CD3E of a human is Cd3e in a mouse."""

from __future__ import annotations

from collections.abc import Mapping

from scanpy import logging as logg

from recipe.cello1.task.gene_names import symbol_fault

MIXED = 0.2  # share of either way to write symbols from which on they are of two species
_UPPER = ("human", "homo sapiens")
_CAPITAL = ("mouse", "mus musculus", "rat", "rattus norvegicus")
# Terms of the Cell Ontology that are of one species by their name.
_MARKS = {"human": (", human", "(Hsap)"), "mouse": (", mouse", "(Mmus)")}


def kind_of(organism: str | None) -> str:
    """Return ``"human"``, ``"mouse"`` (rats write symbols alike), or nothing for a species that is not known here."""
    name = " ".join((organism or "").lower().split())
    return "human" if name in _UPPER else "mouse" if name in _CAPITAL else ""


def of_species(label: str, organism: str | None) -> bool:
    """Say whether a term may be of a species: its name is not that of another."""
    kind = kind_of(organism)
    return not kind or not any(
        label.endswith(mark) for other, marks in _MARKS.items() if other != kind for mark in marks
    )


def upper_share(genes: Mapping[int, tuple[str, ...]]) -> float:
    """Return the share of the listed symbols in upper case, among those with two letters or more."""
    names = {name for listed in genes.values() for name in listed if sum(map(str.isalpha, name)) > 1}
    return sum(name == name.upper() for name in names) / len(names) if names else 1.0


def _odd(genes: Mapping[int, tuple[str, ...]], share: float) -> str:
    """Say what is odd in how symbols are written, whatever the species."""
    names = {name for listed in genes.values() for name in listed}
    if sum(name == name.lower() and any(map(str.isalpha, name)) for name in names) > len(names) / 2:
        return "in lower case (cd3e), as neither a human's nor a mouse's are"
    if MIXED < share < 1 - MIXED:
        return f"written in two ways, {share:.0%} of them in upper case (CD3E) and the others not (Cd3e)"
    return ""


def check_symbols(
    genes: dict[int, tuple[str, ...]], organism: str | None, *, quiet: bool = False
) -> dict[int, tuple[str, ...]]:
    """Check that symbols are listed, of one species; bring them to its form, if it is named."""
    if fault := symbol_fault({name for listed in genes.values() for name in listed}):
        raise ValueError(
            f"gene_symbols: of the genes that lead the lists, {fault}; name the column of var with the symbols, or "
            "leave such genes out with exclude_genes or mask_var"
        )
    kind = kind_of(organism)
    share = upper_share(genes)
    if not organism:
        if not quiet and (odd := _odd(genes, share)):
            logg.warning(f"the listed gene symbols are {odd}: a model may not know them; check gene_symbols")
        return genes
    if not kind:
        logg.hint(f"organism={organism!r}: how its symbols are written is not known here; listed as they are")
    elif kind == "human" and share < 0.5:
        raise ValueError(
            f"organism={organism!r}, but {1 - share:.0%} of the listed gene symbols are not in upper case, as a "
            "mouse's are (Cd3e, not CD3E); pass organism='mouse'"
        )
    elif kind == "mouse" and share > 0.5:
        if not quiet:
            logg.warning(
                f"organism={organism!r}, but {share:.0%} of the listed gene symbols are in upper case: taken for the "
                "same genes and listed as a mouse's (CD3E as Cd3e)"
            )
        return {row: tuple(dict.fromkeys(map(_capital, listed))) for row, listed in genes.items()}
    return genes


def _capital(symbol: str) -> str:
    if symbol != symbol.upper():
        return symbol
    if symbol.startswith("MT-"):
        return "mt-" + symbol[3:].capitalize()
    if symbol.endswith("RIK") and symbol[0].isdigit():  # 1110008F13Rik
        return symbol[:-3] + "Rik"
    return "-".join([part.capitalize() for part in symbol.split("-")])
