"""Which genes a reasoning names, and whether the prompt has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

# What may be a gene symbol: letters and digits, with the marks that symbols have inside (HLA-DRA, AC004556.1, C1orf56).
_WORD = re.compile(r"[A-Za-z0-9]+(?:[-.][A-Za-z0-9]+)*")
# What looks like one: capitals with a digit. Words of the trade that look so, too, are no symbols.
_LOOKS_LIKE = re.compile(r"(?=.*\d)[A-Z][A-Z0-9]{2,}(?:[-.][A-Z0-9]+)*")
_NOT_GENES = re.compile(r"(CD\d+[A-Z]?(RA|RO)?|TH\d+|IG[GMAED]\d?|M[12]|DC\d|CDC\d|CELL\d+|COVID-?\d*)")


@dataclass(frozen=True, slots=True)
class Mention:
    """A word of the reasoning that stands for a gene.

    Attributes
    ----------
    start, stop
        Where it stands.
    gene
        The word.
    in_prompt
        Whether the prompt lists it; otherwise the model has made it up, as far as these cells go.
    """

    start: int
    stop: int
    gene: str
    in_prompt: bool


def mentions(
    reasoning: str, prompt: Collection[str], known: Collection[str], names: Collection[str]
) -> Iterator[Mention]:
    """Find the genes in a reasoning.

    Parameters
    ----------
    reasoning
        The text.
    prompt
        Genes that the prompt lists.
    known
        Gene symbols of the whole data set: a word among them is a gene, whether the prompt has it or not.
    names
        Names of cell types: words in them are no genes.

    Yields
    ------
    The mentions, in order. Case counts: ``CAT`` is a gene, ``cat`` is none.
    """
    listed, symbols = frozenset(prompt), frozenset(known)
    no_genes = {word for name in names for word in _WORD.findall(name)}
    for match in _WORD.finditer(reasoning):
        word = match.group()
        if word in listed:
            yield Mention(match.start(), match.end(), word, True)
        elif word in no_genes or len(word) < 2:
            continue
        elif (word in symbols and word != word.lower()) or (
            _LOOKS_LIKE.fullmatch(word) and not _NOT_GENES.fullmatch(word)
        ):
            yield Mention(match.start(), match.end(), word, False)
