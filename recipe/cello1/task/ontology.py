"""Cell types as terms of the Cell Ontology: what a free-text name means, and how near two names are.

Names are brought to a common form (:func:`normalise`) and looked up among the labels of the terms, then among their
synonyms, then without regard to the order of words; an id (``CL:0000084``) stands for itself. Two terms are

- ``equivalent``: the same term;
- ``broader`` or ``narrower``: the answer is an ancestor or a descendant of the gold, within a lineage;
- ``lineage``: both are of the same one of ``LINEAGES``;
- ``different``: none of this. An ancestor of no lineage ("cell", "motile cell") says nothing and counts as this.

The terms come with the package ``cellxgene-ontology-guide``, without a download.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

# Terms whose descendants make a lineage. "hematopoietic" is what is left of it without the two before; dendritic cells
# are no myeloid cells in the Cell Ontology, though most of them are by descent.
LINEAGES = {
    "lymphoid": ("CL:0000542", "CL:0000838"),  # lymphocyte, lymphoid lineage restricted progenitor cell
    "myeloid": ("CL:0000763", "CL:0000451"),  # myeloid cell, dendritic cell
    "hematopoietic": ("CL:0000988",),
    "epithelial": ("CL:0000066",),
    "endothelial": ("CL:0000115",),
    "connective tissue": ("CL:0002320",),
    "muscle": ("CL:0000187",),
    "neural": ("CL:0002319",),
    "germ line": ("CL:0000039",),
}

_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "κ": "kappa", "μ": "mu"}
# "CD4+", "CD8-" and "CD4pos": a sign is a word only right after a marker and before the end of a word.
_SIGNS = (
    (re.compile(r"(?<=\w)(?:\+|\b pos\b|\bpos\b)(?=[\s,;/)]|$)"), " positive "),
    (re.compile(r"(?<=[0-9a-z])[-\u2212](?=[\s,;/)]|$)"), " negative "),
)
_ID = re.compile(r"CL[:_](\d{7})", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_SAME = {"cells": "cell", "nk": "natural killer", "dc": "dendritic cell", "treg": "regulatory t cell"}
_NOT_PLURAL = ("ss", "us", "is")
_MARKER = re.compile(r"cd\d+")
_LEVELS = ("positive", "negative", "low", "high", "intermediate", "dim", "bright")
# What names of T cells leave out.
_UNSAID = (("alpha", "beta"), ("alpha", "beta", "derived", "thymus"))
# Everyday names, in normal form, that the ontology has neither as label nor as synonym.
_EVERYDAY = {
    "cd4 positive t cell": "CL:0000624",
    "cd4 t cell": "CL:0000624",
    "cd8 positive t cell": "CL:0000625",
    "cd8 t cell": "CL:0000625",
    "cd14 monocyte": "CL:0001054",
    "microglia": "CL:0000129",
}


class Relation(StrEnum):
    """How an answer relates to the gold."""

    EQUIVALENT = "equivalent"
    BROADER = "broader"
    NARROWER = "narrower"
    LINEAGE = "lineage"
    DIFFERENT = "different"
    UNKNOWN = "unknown"  # one of the two is no name that the ontology has


@dataclass(frozen=True, slots=True)
class Match:
    """How an answer relates to the gold."""

    relation: Relation
    distance: int | None  # edges through their nearest common ancestor; None where one is unknown
    answer: str  # ids, empty where unknown
    gold: str


def normalise(name: str) -> str:
    """Bring a name to the form in which names are compared: "CD4+ αβ T-cells" to "cd4 positive alpha beta t cell"."""
    text = unicodedata.normalize("NFKD", name.lower())
    text = "".join(character for character in text if not unicodedata.combining(character))
    for letter, word in _GREEK.items():
        text = text.replace(letter, f" {word} ")
    for pattern, word in _SIGNS:
        text = pattern.sub(word, text)
    words = [_SAME.get(word) or _SAME.get(word.removesuffix("s"), word) for word in _WORD.findall(text)]
    if words:
        words[-1] = _singular(words[-1])
    return " ".join(words)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(_NOT_PLURAL) else word


def _bag(form: str) -> tuple[str, ...]:
    """Return the words of a normal form without regard to order. A level stays with its marker; "cd4" is positive."""
    words: list[str] = []
    for word in form.split():
        if word in _LEVELS and words:
            words[-1] = f"{words[-1].removesuffix(' positive')} {word}"
        else:
            words.append(f"{word} positive" if _MARKER.fullmatch(word) else _singular(word))
    return tuple(sorted(words))


class CellOntology:
    """The terms (id -> label, synonyms, ancestors with their edges, deprecated, replaced_by), and what can be asked."""

    def __init__(self, terms: Mapping[str, Mapping[str, Any]], version: str = "") -> None:
        self.version = version
        self._terms = terms
        self._labels: dict[str, str] = {}
        synonyms: dict[str, set[str]] = {}
        for term, entry in terms.items():
            if entry.get("deprecated"):
                continue
            self._labels.setdefault(normalise(entry["label"]), term)
            for synonym in entry.get("synonyms") or ():
                synonyms.setdefault(normalise(synonym), set()).add(term)
        # A synonym of several terms names none of them.
        self._synonyms = {name: next(iter(found)) for name, found in synonyms.items() if len(found) == 1}
        self._synonyms |= {name: term for name, term in _EVERYDAY.items() if term in terms}
        bags: dict[tuple[str, ...], set[str]] = {}
        for form, term in [*self._synonyms.items(), *self._labels.items()]:
            bags.setdefault(_bag(form), set()).add(term)
        self._bags = {bag: next(iter(found)) for bag, found in bags.items() if len(found) == 1}
        self.find = lru_cache(maxsize=1 << 16)(self._find)

    def _find(self, name: str) -> str:
        """Find the term that a name stands for."""
        form = normalise(name)
        if found := self._labels.get(form) or self._synonyms.get(form):
            return found
        # Names often leave out "cell", or add it: "natural killer", "monocyte cell".
        other = form.removesuffix(" cell") if form.endswith(" cell") else f"{form} cell"
        if found := self._labels.get(other) or self._synonyms.get(other):
            return found
        # "T cells (CD4+)", "effector memory CD8+ T cell": other order, and what goes without saying.
        bag = _bag(form)
        unsaid = [tuple(sorted([*bag, *words])) for words in _UNSAID if "t" in bag]
        if found := next((self._bags[key] for key in (bag, *unsaid) if key in self._bags), ""):
            return found
        ids = {f"CL:{digits}" for digits in _ID.findall(name)}
        if len(ids) != 1:
            return ""
        return self._living(ids.pop())

    def _living(self, term: str) -> str:
        """Follow a term to the one in use; empty if it is unknown, withdrawn, or now of another ontology."""
        followed: set[str] = set()
        while entry := self._terms.get(term, {}):
            if not entry.get("deprecated"):
                return term
            followed.add(term)
            term = entry.get("replaced_by") or ""
            if term in followed:
                break
        return ""

    def label(self, term: str) -> str:
        """Return the label of a term."""
        return self._terms[term]["label"]

    def descendants(self, term: str) -> list[str]:
        """Return the ids of all terms in use below a term."""
        return [
            other
            for other, entry in self._terms.items()
            if term in (entry.get("ancestors") or {}) and other != term and not entry.get("deprecated")
        ]

    def compare(self, answer: str, gold: str) -> Match:
        """Tell how an answer relates to the gold."""
        first, second = self.find(answer), self.find(gold)
        if not (first and second):
            same = normalise(answer) == normalise(gold) != ""
            return Match(Relation.EQUIVALENT if same else Relation.UNKNOWN, 0 if same else None, first, second)
        above, below = self.upward(first), self.upward(second)
        common = [above[term] + below[term] for term in above if term in below]
        distance = min(common) if common else None
        if first == second:
            relation = Relation.EQUIVALENT
        elif first in below and self._lineages(first):
            relation = Relation.BROADER
        elif second in above and self._lineages(second):
            relation = Relation.NARROWER
        elif self._lineages(first) & self._lineages(second):
            relation = Relation.LINEAGE
        else:
            relation = Relation.DIFFERENT
        return Match(relation, distance, first, second)

    def nearest_ancestor(self, first: str, second: str, *, steps: int, largest: int) -> str:
        """Find the nearest term above both that is of one lineage and has few terms below; empty if there is none."""
        ways = self.upward(first), self.upward(second)
        near: list[tuple[int, int, int, str]] = []
        for term in ways[0].keys() & ways[1].keys():
            edges = [way[term] for way in ways]
            below = sum(term in (entry.get("ancestors") or ()) for entry in self._terms.values())
            if max(edges) <= steps and below <= largest and self._lineages(term):
                near.append((max(edges), sum(edges), below, term))
        return min(near)[-1] if near else ""

    def upward(self, term: str) -> dict[str, int]:
        """Return a term and all above it, each with the edges between."""
        return {term: 0, **(self._terms[term].get("ancestors") or {})}

    def _lineages(self, term: str) -> set[str]:
        above = self.upward(term)
        found = {name for name, roots in LINEAGES.items() if any(root in above for root in roots)}
        return found - {"hematopoietic"} if found & {"lymphoid", "myeloid"} else found


def load_ontology() -> CellOntology:
    """Load the Cell Ontology that comes with ``cellxgene-ontology-guide``."""
    try:
        from cellxgene_ontology_guide.ontology_parser import OntologyParser
    except ImportError as error:
        msg = f"the Cell Ontology cannot be read ({error}); install it with pip install cellxgene-ontology-guide"
        raise ImportError(msg) from error
    schema = OntologyParser().cxg_schema
    version = schema.supported_ontologies["CL"]["version"]
    terms = {term: entry for term, entry in schema.ontology("CL").items() if term.startswith("CL:")}
    return CellOntology(terms, f"Cell Ontology {version}")
