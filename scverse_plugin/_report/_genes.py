"""Which genes a reasoning names, and whether the prompt has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

# What may be a gene symbol: letters and digits, with the marks that symbols have inside (HLA-DRA, AC004556.1, C1orf56).
_WORD = re.compile(r"[A-Za-z0-9]+(?:[-.][A-Za-z0-9]+)*")
# What looks like one, known or not: three or more capitals, or a capital with a digit somewhere (GNLY, CD3E, Cd3d).
_LOOKS_LIKE = re.compile(r"[A-Z][A-Z0-9]{2,}(?:[-.][A-Z0-9]+)*|(?=[^\d]*\d)[A-Z][A-Za-z0-9]{2,}(?:[-.][A-Za-z0-9]+)*")
# Words of the trade that look so, too: proteins and subsets whose names are no symbols.
_NOT_GENES = re.compile(
    r"CD(3|4|8|10|11[ABC]|16|20|21|25|31|45(RA|RO)?|56|57|62L|64|103|117|123|127|138|161)|T[HC]\d+|IG[GMAED]\d?"
    r"|M[12]|C?DC\d*|CELLS?\d*|TYPES?\d*|COVID(-?\d+)?|PBMCS?|DNA|[MR]?RNA|LNCRNA|[TB]CR|MHC(-I+)?|HLA|NKT|TREGS?"
    r"|MAIT|ILC\d?|HSPC?S?|HSC|RBCS?|WBCS?|APCS?|PDCS?|TNK|UMIS?|FACS|QC|II+|IV|USA",
    re.IGNORECASE,
)
# English words that are written in capitals for stress or begin a sentence, and are names of genes as well.
_WORDS = frozenset(
    "A ALL ALSO AND ANSWER ANY ARE AS AT BAD BE BEST BOTH BUT BY CAN CAP CAR CAT CELL CLASS CLEAR CONTEXT DO "
    "EACH FACT FAST FOR FROM GENE GENES GOOD HAS HAVE HIGH HIGHER HOW IF IMPACT IN INTO IS IT ITS JUST KEY KIT "
    "LARGE LEAST LESS LIKELY LOW LOWER MAP MARKER MARKERS MATCH MAX MAY MET MICE MOST MUST NO NONE NOT NOTE "
    "NOW OF ON ONE ONLY OR OTHER OUT PER POOR RANK REST SAME SEE SET SHE SINCE SO SOME STEP STRONG THAN THAT "
    "THE THEIR THEN THERE THESE THEY THINK THIS TIE TO TOP TRAP TWO VERY WAS WEAK WHEN WHICH WHILE WITH YES".split()
)


class Mention(NamedTuple):
    """A word of the reasoning that stands for a gene."""

    # Where it stands
    start: int
    stop: int
    # The word
    gene: str
    # Whether the prompt lists it; otherwise the model has made it up, as far as these cells go
    in_prompt: bool


class Finder:
    """Finds the genes in reasonings; ``known`` are the symbols of the data, ``names`` those of the types."""

    def __init__(self, known: Collection[str], names: Collection[str]) -> None:
        self._symbols = frozenset(known)
        self._capitals = {name.upper() for name in self._symbols}
        self._no_genes = {word for name in names for word in _WORD.findall(name)}
        self._known: dict[str, bool] = {}  # of the words met so far; they come again in every puzzle

    def __call__(self, reasoning: str, prompt: Collection[str]) -> Iterator[Mention]:
        """Find the genes; ``prompt`` are those that the puzzle lists."""
        listed = frozenset(prompt)
        for match in _WORD.finditer(reasoning):
            word = match.group()
            if word in listed:
                yield Mention(match.start(), match.end(), word, True)
                continue
            if (known := self._known.get(word)) is None:
                known = self._known[word] = self._is_gene(word)
            if known:
                yield Mention(match.start(), match.end(), word, False)

    def _is_gene(self, word: str) -> bool:
        if word in self._no_genes or len(word) < 2 or word == word.lower():
            return False
        return word in self._symbols or (
            word.upper() not in _WORDS
            # As mice write it: Lyz where the data have LYZ.
            and bool(word.upper() in self._capitals or _LOOKS_LIKE.fullmatch(word))
            and not _NOT_GENES.fullmatch(word)
        )
