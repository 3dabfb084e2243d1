"""When two cells, donors or puzzles are the same, so that one can be kept out of the test set.

A *cell* is known by its id within its data set and, where the id names its library besides a barcode and the donor is
named, by its id of that donor in any data set; a barcode alone, or a number, comes again in every library. It is known
by its list of genes, too, for published puzzles have no ids. Short lists coincide by chance, so beside ids a list
proves a cell only from ``TELLING_GENES`` genes on, or as many as are listed at most where that is less
(``n_top=25``: every full list does), but never with fewer than ``LEAST_TELLING``: cells of one type give their
first places to the same few dozen genes, and large files have billions of pairs of cells. So with an ``n_top`` below
that a cell under two ids is not noticed, which is better than to find leaks everywhere. Without ids every list counts,
whatever its length. A *donor* is known by the id, the same in every data set; a puzzle that names none is of any donor
who has its context. A *puzzle* is known by what it shows. Ids are compared in one form, see
:func:`recipe.cello1.task.text.canonical_id`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import canonical_id, clean_value, is_usable

TELLING_GENES = 30
LEAST_TELLING = 15
_SEPARATOR = re.compile(r"[\W_]+")
_BARCODE = re.compile(r"[ACGTN]{8,}")
_LETTER = re.compile(r"[^\W\d_]")
_NO_DONOR = re.compile(
    r"(pool(ed|s)?|mix(ed|ture)?|multiplex(ed)?|multiple|various|several|unassigned|doublets?|ambiguous|negative)"
    r"([ _-]*(donor|sample|patient|subject|individual|human|mouse|mice|animal)s?)?([ _-]*\d+|[ _-]+[a-z]\d*)?|"
    r"(pool(ed)?|mix(ture)?)[\W_]+(of|from)[\W_].*|pool(ed)?[ _-]*\(.*\)|multi([ _-]?(donor|sample|patient)s?)?|"
    r"nat|unknown[ _-](donor|patient|sample)|pooled[\W_].*|.*[\W_]pool(ed|s)?([ _-]*\d+)?|"
    r"(\d+|two|three|four|many)[ _-]*(donors|samples|patients|subjects|individuals|mice|animals)|"
    r"pool(ed)?\W.*[,;].*|.*\|\|.*|"  # a list of people
    r"(?P<who>[^\W\d_]+[ _-]*)\d+(\s*([,;&+/|]|and)\s*(?P=who)\d+)+|"  # D1+D2
    r"(donor|sample|patient|subject|individual)s[ _-]*\d+\W+(and\W+|to\W+)?\d+.*",
    re.IGNORECASE,
)
VALUE_SEPARATOR = " | "  # between the values of a puzzle whose cells differ, for example in tissue


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells a puzzle and its parts from others; small, so that those of a large data set fit into memory."""

    # Number of cells
    n_cells: int
    # The donor's id and the context, hashed; ``None`` where there is none
    donor: int | None
    context: int | None
    # The data set, hashed; ``None`` if unknown
    dataset: int | None
    # Its tissues, hashed, uint64
    tissues: np.ndarray
    # Its cells by id in the data set, uint64; empty where they have none
    cell_ids: np.ndarray
    # Its cells by id of the donor, uint64; empty where there is no donor, or an id tells nothing
    donor_cell_ids: np.ndarray
    # Its cells by genes, uint64
    cell_genes: np.ndarray
    # For each cell, whether its genes prove it to be the same
    telling: np.ndarray
    # The puzzle as it is shown
    shown: int
    # The same without regard to context and order of cells
    cells_shown: int


def donor_id(value: object) -> str:
    """Return the one form of a donor's id; empty if it names none, or several people at once (``pooled``, a list)."""
    text = canonical_id(value)
    return "" if isinstance(value, list | tuple | dict) or _NO_DONOR.fullmatch(text) else text


def values_of(text: object) -> list[str]:
    """Split the values of a puzzle, and the lists (``||``) that each may be."""
    return [part for part in re.split(r" \|\|? ", clean_value(text)) if is_usable(part)]


def hash64(*parts: str) -> int:
    """Hash some texts."""
    digest = hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def fingerprints_of(puzzles: Sequence[Puzzle], dataset: str = "") -> list[Fingerprint]:
    """Take the fingerprints of the puzzles of one source; its longest list tells how many genes are listed at most."""
    n_top = max((len(cell) for puzzle in puzzles for cell in puzzle.cells), default=TELLING_GENES)
    return [fingerprint_of(puzzle, dataset, n_top) for puzzle in puzzles]


def fingerprint_of(puzzle: Puzzle, dataset: str = "", n_top: int = TELLING_GENES) -> Fingerprint:
    """Take the fingerprint of a puzzle."""
    meta = puzzle.meta
    donor = donor_id(meta.get("donor_id"))
    name = clean_value(meta.get("dataset")) or clean_value(dataset)
    ids = [canonical_id(cell) for cell in puzzle.cell_ids]
    genes = ["\1".join(cell) for cell in puzzle.cells]
    enough = max(LEAST_TELLING, min(TELLING_GENES, n_top))
    telling_ids = ids if donor and all(map(_names_library, ids)) else []
    return Fingerprint(
        puzzle.n_cells,
        hash64("donor", donor) if donor else None,
        hash64("context", puzzle.context) if puzzle.context else None,
        hash64("dataset", name) if name else None,
        _array([hash64("tissue", part) for part in values_of(meta.get("tissue"))]),
        _array([hash64("id", name, cell) for cell in ids]),
        _array([hash64("donor's id", donor, cell) for cell in telling_ids]),
        _array([hash64("genes", text) for text in genes]),
        np.array([len(cell) >= enough for cell in puzzle.cells]),
        hash64("puzzle", puzzle.context, *genes, "", *puzzle.candidates),
        hash64("cells", *sorted(genes), "", *sorted(puzzle.candidates)),
    )


def _names_library(cell: str) -> bool:
    """Say whether an id has a barcode and, beside it, a word."""
    words = _SEPARATOR.split(cell)
    barcodes = [word for word in words if _BARCODE.fullmatch(word)]
    return bool(barcodes) and any(_LETTER.search(word) for word in words if word not in barcodes)


def _array(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def all_have_ids(puzzles: Iterable[Fingerprint]) -> bool:
    """Say whether every cell has an id, so that short lists of genes need not serve."""
    return all(len(puzzle.cell_ids) == puzzle.n_cells for puzzle in puzzles)


def cell_keys(puzzle: Fingerprint, have_ids: bool) -> np.ndarray:
    """List what the cells of a puzzle are known by."""
    genes = puzzle.cell_genes[puzzle.telling] if have_ids else puzzle.cell_genes
    return np.concatenate([puzzle.cell_ids, puzzle.donor_cell_ids, genes])


def nameless_contexts(puzzles: Iterable[Fingerprint]) -> frozenset[int]:
    """List the contexts of the puzzles that name no donor."""
    return frozenset(puzzle.context for puzzle in puzzles if puzzle.donor is None and puzzle.context is not None)


def donor_keys(puzzle: Fingerprint, nameless: Collection[int]) -> np.ndarray:
    """List what the donor of a puzzle is known by."""
    known = [puzzle.donor, puzzle.context if puzzle.context in nameless else None]
    return _array([key for key in known if key is not None])
