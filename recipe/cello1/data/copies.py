"""Inputs that have the same cells or puzzles, so that each counts once: copies, links, and files that were rewritten.

A cell is the same where its name and its donor are, and its genes, too, as far as a sample of such cells tells, or
where the sample has both, cell by cell: of two libraries of a donor some barcodes coincide, and row numbers do in all
files. While files are compared, some 24 bytes are kept of each cell.
"""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from tqdm import tqdm

from recipe.cello1.data.expression.reader import CellReader
from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.extract import FileResult, Job, what_failed, what_has
from recipe.cello1.data.fingerprints import fingerprints_of
from recipe.cello1.data.pool import KEEP_THEM
from recipe.cello1.data.published import Imported
from recipe.cello1.data.resume import part_cells
from recipe.cello1.task.answer import join_types
from recipe.cello1.task.puzzle import Puzzle

_FEW, _SMALL = 3, 0.01  # cells that coincide by name are not compared up to this number, or share of the smaller file
_SAMPLES = 64, 2048  # cells whose genes are compared: to say whether any are the same, and whether all are
_LISTED = 50  # genes of each that are compared
_ALIKE = 0.8  # share of the genes that two lists of one cell have in common, as a file may have fewer genes
_TIE = 1e-9  # less than any difference of values
_NEARLY_ALL = 0.9  # share of cells that are alike from which on two files are taken to have the same cells
_BLOCK = 100_000  # cells whose genes are kept at a time
_DELAY = 5  # seconds until progress is shown

_Genes = tuple[str, ...] | None


def same_content(one: Path, other: Path) -> bool:
    """Compare two files, or two stores, byte by byte."""
    try:
        if not one.is_dir() or not other.is_dir():
            return one.is_file() and other.is_file() and (one.samefile(other) or filecmp.cmp(one, other, shallow=False))
        parts = [sorted(path.relative_to(top) for path in top.rglob("*") if path.is_file()) for top in (one, other)]
        return parts[0] == parts[1] and all(same_content(one / part, other / part) for part in parts[0])
    except OSError:  # reading it will say why
        return False


@dataclass(frozen=True)
class _Cells:
    """Cells of a file by their keys, small numbers for name and donor, in the order of their rows."""

    job: Job
    n_usable: int
    keys: np.ndarray
    rows: np.ndarray

    def take(self, which: np.ndarray) -> _Cells:
        """Return some of them."""
        return _Cells(self.job, self.n_usable, self.keys[which], self.rows[which])

    @cached_property
    def _first(self) -> tuple[np.ndarray, np.ndarray]:
        distinct, first = np.unique(self.keys, return_index=True)
        return distinct, self.rows[first]

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the first row of each key, -1 for one that is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        distinct, rows = self._first
        at = _places(distinct, keys)
        return np.where(at < 0, -1, rows[at])


def _places(known: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return where keys lie among sorted ones, of which there are some, -1 for those that are none of them."""
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, at, -1)


def repeated_cells(
    out: Path, jobs: Sequence[Job], *, progress: bool = False
) -> tuple[list[Job], list[FileResult], dict[str, list[str]]]:
    """Find jobs to do again without the cells that are there already, copies, and notes on what was not compared."""
    again, copies, notes = list[Job](), list[FileResult](), dict[str, list[str]]()
    parts = [part_cells(out, job) for job in jobs]
    every = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in parts)])
    every.sort()
    several = np.unique(every[1:][every[1:] == every[:-1]])
    if not len(several):
        return again, copies, notes
    cells = [
        _Cells(job, len(rows), _places(several, keys), rows) for job, (keys, rows) in zip(jobs, parts, strict=True)
    ]
    cells = [own.take(own.keys >= 0) for own in cells]
    del parts, every
    meet = _meetings([np.unique(own.keys) for own in cells], len(several))  # a name may be that of all cells
    for number, job in enumerate(tqdm(jobs, desc="repeats", unit="file", disable=not progress, delay=_DELAY)):
        own, repeated = cells[number], dict[str, np.ndarray]()
        for index in [i for i in meet[number] if i <= number]:
            other = cells[index] if index < number else own  # itself last, without what others have
            theirs = other.rows_of(own.keys)
            at = np.flatnonzero((theirs >= 0) & ((theirs != own.rows) | (index < number)))
            if len(at) <= max(_FEW, _SMALL * min(own.n_usable, other.n_usable)):
                continue
            try:
                same = at[_same_genes(job, own.rows[at], other.job, theirs[at])]
            except Exception as error:  # as of any bad file; nothing is left out for what cannot be compared
                what = "itself" if index == number else other.job.name
                note = f"cells that it may share with {what} are kept: {'; '.join(what_failed(error))}"
                notes.setdefault(job.name, []).append(note)
                continue
            if len(same):
                repeated[other.job.name] = own.rows[same]
                own = own.take(~np.isin(np.arange(len(own.rows)), same))
        cells[number] = own
        if twin := next((name for name, found in repeated.items() if len(found) == own.n_usable), ""):
            note = f"it has the cells of {twin} and no others, so they are used once ({KEEP_THEM})"
            copies.append(FileResult(job.name, notes=(note,), copy_of=twin))
        elif repeated:
            again.append(replace(job, repeated=repeated))
    return again, copies, notes


def _meetings(keys: Sequence[np.ndarray], n_keys: int) -> list[list[int]]:
    """List for each file, in order, those with which it has a key in common, itself too if it has any."""
    bounds = np.cumsum([0, *map(len, keys)])
    has = sp.csr_array((np.ones(bounds[-1], dtype=bool), np.concatenate(keys), bounds), shape=(len(keys), n_keys))
    both = has @ has.T
    return [np.sort(both.indices[a:b]).tolist() for a, b in zip(both.indptr, both.indptr[1:], strict=False)]


def _same_genes(job: Job, rows: np.ndarray, other: Job, others: np.ndarray) -> np.ndarray:
    """Say which cells of one name are the same: most are alike, and far more than cells of different names."""
    order = job.settings.rng("copies", job.name, other.name).permutation(len(rows))
    for size in _SAMPLES:
        pairs = _pairs(job, rows[order[:size]], other, others[order[:size]])
        alike = sum(_alike(one, two, _ALIKE) for one, two in pairs)
        by_chance = sum(_alike(one, two, _ALIKE) for (one, _), (_, two) in zip(pairs, pairs[1:], strict=False))
        if not alike or 2 * by_chance > alike:
            return np.zeros(len(rows), dtype=bool)
        if size >= len(rows):  # the next sample is the same
            break
    if alike == len(pairs):
        return np.ones(len(rows), dtype=bool)
    # Some are others, with the same name by chance: these may be alike by chance, too, unless they are very few.
    share = _ALIKE if alike >= _NEARLY_ALL * len(pairs) else 1.0
    blocks = np.array_split(np.arange(len(rows)), -(-len(rows) // _BLOCK))
    found = (pair for block in blocks for pair in _pairs(job, rows[block], other, others[block]))
    return np.array([_alike(one, two, share) for one, two in found])


def _pairs(job: Job, rows: np.ndarray, other: Job, others: np.ndarray) -> list[tuple[_Genes, _Genes]]:
    return list(zip(_genes(job, rows), _genes(other, others), strict=True))


def _genes(job: Job, rows: np.ndarray) -> list[_Genes]:
    lists = replace(job.settings, rank_by="expression", n_top=_LISTED)
    with Store(job.path) as store:
        reader = CellReader(store, lists, job.threads)
        # Genes of one value come in the order of their names, whatever that of the columns is.
        of_column = np.array(reader.genes.names)[reader.genes.symbol]
        reader.weights = 1 + _TIE * np.unique(of_column, return_inverse=True)[1] / len(of_column)
        found = dict(reader.read(np.unique(rows)))
    return [found[row] for row in rows.tolist()]


def _alike(one: _Genes, two: _Genes, share: float) -> bool:
    if one == two or not one or not two:
        return one == two
    return len({*one} & {*two}) >= share * max(len(one), len(two))


def without_repeated_puzzles(found: Sequence[Imported]) -> tuple[list[Imported], list[str]]:
    """Leave out the puzzles that a source before has on the same side, or the source itself twice."""
    kept, notes, first = list[Imported](), list[str](), dict[tuple[str, int, str], int]()
    for number, part in enumerate(found):
        new, repeated = list[Puzzle](), Counter[int]()
        for puzzle, known in zip(part.puzzles, fingerprints_of(part.puzzles), strict=True):
            key = (part.split, known.shown, join_types(puzzle.answer or ()))
            if key in first:
                repeated[first[key]] += 1
            else:
                first[key] = number
                new.append(puzzle)
        for other, count in repeated.items():
            who = what_has(found[other].name, other == number)
            notes.append(f"{part.name}: {count:,} of {len(part.puzzles):,} puzzles left out: {who} ({KEEP_THEM})")
        if new or part.failures:
            kept.append(replace(part, puzzles=tuple(new)))
    return kept, notes
