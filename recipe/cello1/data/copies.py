"""Inputs that have the same cells or puzzles, so that each counts once: copies, links, and files that were rewritten.

A cell is the same where its name and its donor are, and its genes, too, as far as a sample of such cells tells: of two
libraries of a donor some barcodes coincide, and row numbers do in all files. Eight bytes a cell are kept.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recipe.cello1.data.expression.reader import CellReader
from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.extract import FileResult, Job
from recipe.cello1.data.fingerprints import fingerprints_of, hash64
from recipe.cello1.data.pool import KEEP_THEM
from recipe.cello1.data.published import Imported
from recipe.cello1.data.resume import part_cells
from recipe.cello1.formats.stores import BadFileError
from recipe.cello1.task.answer import join_types

_SAMPLE = 16  # cells whose genes are compared
_ALIKE = 0.8  # share of the genes that two lists of one cell have in common, as ties may be in another order


def same_content(one: Path, other: Path) -> bool:
    """Compare two files, or two stores, byte by byte."""
    try:
        if not one.is_dir() or not other.is_dir():
            return one.is_file() and other.is_file() and (one.samefile(other) or filecmp.cmp(one, other, shallow=False))
        parts = [sorted(path.relative_to(top) for path in top.rglob("*") if path.is_file()) for top in (one, other)]
        return parts[0] == parts[1] and all(same_content(one / part, other / part) for part in parts[0])
    except OSError:  # reading it will say why
        return False


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of a file that may be drawn from: rows, and a hash of name and donor, distinct and sorted."""

    job: Job
    keys: np.ndarray
    rows: np.ndarray

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, -1 for one that is not there."""
        at = np.minimum(np.searchsorted(self.keys, keys), max(0, len(self.keys) - 1))
        return np.where(self.keys[at] == keys, self.rows[at], -1) if len(self.keys) else np.full(len(keys), -1)


def repeated_cells(out: Path, jobs: Sequence[Job]) -> tuple[list[Job], list[FileResult]]:
    """Find the jobs to do again, without cells that a file before has or the file itself twice, and the copies."""
    again, copies, known = [], [], list[_Cells]()
    for job in jobs:
        keys, rows = part_cells(out, job)
        n_usable, repeated = len(rows), dict[str, np.ndarray]()
        for other in [_cells(job, keys, rows), *known]:
            theirs = other.rows_of(keys)
            inside = (theirs >= 0) & ((theirs != rows) | (other.job is not job))
            if inside.any() and _same_genes(job, rows[inside], other.job, theirs[inside]):
                repeated[other.job.name] = rows[inside]
                keys, rows = keys[~inside], rows[~inside]
        if twin := next((name for name, found in repeated.items() if len(found) == n_usable), ""):
            note = f"it has the cells of {twin} and no others, so they are used once ({KEEP_THEM})"
            copies.append(FileResult(job.name, notes=(note,), copy_of=twin))
            continue
        if repeated:
            again.append(replace(job, repeated=repeated))
        known.append(_cells(job, keys, rows))
    return again, copies


def _cells(job: Job, keys: np.ndarray, rows: np.ndarray) -> _Cells:
    distinct, first = np.unique(keys, return_index=True)
    return _Cells(job, distinct, rows[first])


def _same_genes(job: Job, rows: np.ndarray, other: Job, others: np.ndarray) -> bool:
    """Compare the genes of some cells of one name: most are alike, and far more than of cells of different names."""
    chosen = job.settings.rng("copies", job.name, other.name).permutation(len(rows))[:_SAMPLE]
    try:
        pairs = list(zip(_genes(job, rows[chosen]), _genes(other, others[chosen]), strict=True))
    except (BadFileError, OSError, MemoryError):  # nothing is left out for what cannot be read any more
        return False
    alike = sum(_alike(one, two) for one, two in pairs)
    by_chance = sum(_alike(one, two) for (one, _), (_, two) in zip(pairs, pairs[1:], strict=False))
    return 2 * alike > len(pairs) and 2 * by_chance <= alike


def _genes(job: Job, rows: np.ndarray) -> Iterator[tuple[str, ...] | None]:
    distinct = np.unique(rows)
    with Store(job.path) as store:
        found = dict(CellReader(store, replace(job.settings, rank_by="expression"), job.threads).read(distinct))
    return (found[row] for row in rows.tolist())


def _alike(one: tuple[str, ...] | None, two: tuple[str, ...] | None) -> bool:
    if not one or not two:
        return False
    return one == two or len({*one} & {*two}) >= _ALIKE * max(len(one), len(two))


def without_repeated_puzzles(found: Sequence[Imported]) -> tuple[list[Imported], list[str]]:
    """Leave out the sources whose puzzles another one of the same side has, all of them."""
    kept, notes = list[tuple[Imported, frozenset[int]]](), []
    for part in found:
        answers = [join_types(puzzle.answer or ()) for puzzle in part.puzzles]
        shown = (known.shown for known in fingerprints_of(part.puzzles))
        keys = frozenset(hash64(str(key), answer) for key, answer in zip(shown, answers, strict=True))
        others = (other.name for other, theirs in kept if keys and other.split == part.split and keys <= theirs)
        if twin := next(others, ""):
            notes.append(f"{part.name}: {twin} has its {len(part.puzzles):,} puzzles, so they are used once")
            part, keys = replace(part, puzzles=()), frozenset()
        if part.puzzles or part.failures:
            kept.append((part, keys))
    return [part for part, _ in kept], notes
