"""Symbols as a species has them: CD3E of a human is Cd3e in a mouse."""

from __future__ import annotations

from collections.abc import Mapping

from scanpy import logging as logg

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


def check_symbols(
    genes: dict[int, tuple[str, ...]], organism: str | None, *, quiet: bool = False
) -> dict[int, tuple[str, ...]]:
    """Bring listed symbols to the form of the species, if one is named."""
    kind = kind_of(organism)
    if not organism:
        return genes
    share = upper_share(genes)
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
