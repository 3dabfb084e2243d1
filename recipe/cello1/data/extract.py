"""One file to puzzles (and, on request, to cell records): the same function whatever machine it runs on."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.data.expression.reader import CellReader, OnCells
from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.fingerprints import VALUE_SEPARATOR, hash64
from recipe.cello1.data.pool import (
    CellTable,
    Peers,
    candidates_of_group,
    draw,
    lonely_cells,
    read_table,
    shortfall,
    wanted_puzzles,
)
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.formats.atomic import JsonListWriter
from recipe.cello1.formats.stores import BadFileError
from recipe.cello1.task.context import CONTEXT_FIELDS, TISSUE_KIND, names_type
from recipe.cello1.task.labels import Labels
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.sampling import PuzzleIndex
from recipe.cello1.task.text import clean_value, on_one_line

_ENDS = 1 << 20  # bytes at either end of a file that its fingerprint covers


@dataclass(frozen=True, slots=True)
class Job:
    """One file to work on."""

    # The file
    path: str
    # Its path below the input folder without suffix; the name of its data set
    name: str
    # Name of the folder it lies in, which decides its extra context fields
    folder: str
    # What is wanted
    settings: PuzzleSettings
    # Threads to read with
    threads: int = 1
    # Where to write the cell records, if wanted
    records: str | None = None
    # Rows of cells that are not used, since they are used from another file, or from an earlier row, by its name
    repeated: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of a file."""

    # As in the job
    name: str
    # Its puzzles
    puzzles: Sequence[Puzzle] = ()
    # What was left out or falls short, and why
    notes: tuple[str, ...] = ()
    # Cells in the file, cells drawn from, cell records written
    n_cells: int = 0
    n_pool: int = 0
    n_records: int = 0
    # Why it could not be used, and what to do; empty if it could
    reason: str = ""
    remedy: str = ""
    # The file that has the same content, and is used instead
    copy_of: str = ""
    # Size and content hash of the file, see :func:`file_fingerprint`
    fingerprint: dict[str, Any] = field(default_factory=dict)
    # Of the cells that can be used, in the order of their rows: a hash of name and donor, uint64, and the row
    cells: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)


def what_has(other: str, itself: bool) -> str:
    """Say which file has cells or puzzles, too."""
    return "the file has them twice" if itself else f"{other} has them, too"


def file_fingerprint(path: str | Path) -> dict[str, Any]:
    """Describe the content of a file without reading all of it."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted(part for part in path.rglob("*") if part.is_file())
        sizes = [part.stat().st_size for part in files]
        for part, size in zip(files, sizes, strict=True):
            digest.update(f"{part.relative_to(path).as_posix()}\0{size}\0".encode())
        return {"bytes": sum(sizes), "sha256_of_ends": digest.hexdigest()}
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(_ENDS))
        file.seek(max(0, size - _ENDS))
        digest.update(file.read(_ENDS))
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


def process_file(job: Job, progress: OnCells | None = None) -> FileResult:
    """Make the puzzles of one file."""
    try:
        with Store(job.path) as store:
            return _process(store, job, progress or (lambda count: None), file_fingerprint(job.path))
    except Exception as error:  # one file that nobody foresaw must not stop the others; it is listed as bad
        reason, remedy = what_failed(error)
        return FileResult(job.name, reason=reason, remedy=remedy)


def what_failed(error: Exception) -> tuple[str, str]:
    """Say why a file could not be read, and what to do."""
    if isinstance(error, BadFileError):
        return error.reason, error.remedy
    if isinstance(error, OSError):  # permissions, a network drive that went away
        return f"it cannot be read ({error})", "check the file and its folder"
    if isinstance(error, MemoryError):
        return "it needs more memory than is available", "use fewer workers= or threads="
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__} in {Path(where.filename).name}, line {where.lineno}: {error}"
    return reason, "write it again with anndata; if that fails, report the error"


def _process(store: Store, job: Job, progress: OnCells, known: dict[str, Any]) -> FileResult:
    settings = job.settings
    rng = settings.rng("file", job.name)
    again = {what_has(other, other == job.name): rows for other, rows in job.repeated.items()}
    table = read_table(store, settings, rng, again)
    reader = CellReader(store, settings, job.threads, progress)
    table, few = _without_poor_cells(table, reader, settings)
    notes = [*table.notes, *few]
    if not len(table.pool):
        notes.append("no cells are left, so it gives no puzzles")
        return FileResult(job.name, notes=tuple(notes), n_cells=table.n_cells, fingerprint=known)
    chosen, genes, more = _choose(table, reader, settings, rng)
    notes += [*reader.notes, *more]
    rows = np.array(sorted({row for puzzle in chosen for row in puzzle.rows}), dtype=np.int64)
    names, n_repeated = store.cell_ids(rows)
    if n_repeated:
        notes.append(f"{n_repeated:,} cell names occur more than once: cell ids are made of name and row")
    ids = dict(zip(rows.tolist(), names, strict=True))
    puzzles = _puzzles(store, job, table, chosen, genes, ids)
    n_records = _write_records(store, job, table, reader) if job.records else 0
    donors = np.array([hash64(name) for name in table.donors.categories], dtype=np.uint64)
    # Times an odd number, so that name and donor are no longer of one weight.
    keys = store.name_hashes[table.usable] * np.uint64(31) + donors[table.donors.codes[table.usable]]
    return FileResult(
        job.name,
        puzzles,
        tuple(notes),
        table.n_cells,
        len(table.pool),
        n_records,
        fingerprint=known,
        cells=(keys, table.usable),
    )


def _without_poor_cells(table: CellTable, reader: CellReader, settings: PuzzleSettings) -> tuple[CellTable, list[str]]:
    """Leave out the cells of which is known, without reading them, that they express too few genes."""
    stored = reader.matrix.stored()
    if stored is None:
        return table, []
    poor = stored[table.pool] < settings.min_genes
    if not poor.any():
        return table, []
    note = f"{int(poor.sum()):,} cells left out: they express fewer than min_genes={settings.min_genes}"
    return replace(table, pool=table.pool[~poor]), [note]


class _Cells:
    """What is known of the cells that were read."""

    def __init__(self, reader: CellReader, min_genes: int) -> None:
        self.genes: dict[int, tuple[str, ...]] = {}
        self.useless: set[int] = set()
        self.spoiled = 0
        self._reader, self._min_genes = reader, min_genes

    def read(self, rows: Iterable[int]) -> None:
        """Read those that were not read before."""
        new = set(rows) - self.genes.keys() - self.useless
        for row, found in self._reader.read(np.array(sorted(new), dtype=np.int64)):
            self.spoiled += found is None
            if found is None or len(found) < self._min_genes:
                self.useless.add(row)
            else:
                self.genes[row] = found


def _choose(
    table: CellTable, reader: CellReader, settings: PuzzleSettings, rng: np.random.Generator
) -> tuple[list[PuzzleIndex], dict[int, tuple[str, ...]], list[str]]:
    """Draw puzzles and read their cells, until there are enough or no more that could be drawn."""
    cells = _Cells(reader, settings.min_genes)
    chosen: list[PuzzleIndex] = []
    seen: set[tuple[int, ...]] = set()
    wanted = wanted_puzzles(table, settings)
    missing, known = dict.fromkeys(settings.sizes, wanted), -1
    while missing and known < len(cells.useless):  # else drawing again would give no others
        known = len(cells.useless)
        # As many as are wanted in all: those that were chosen before may come again.
        drawn = draw(table, settings, rng, cells.useless, missing, wanted)
        for puzzle in _with_useful_cells(_first_new(drawn, seen, missing), table, cells, rng):
            if (key := _cell_set(puzzle)) not in seen:
                seen.add(key)
                chosen.append(puzzle)
        found = Counter(len(puzzle.rows) for puzzle in chosen)
        missing = {size: wanted - found[size] for size in settings.sizes if found[size] < wanted}
    if cells.spoiled and not cells.genes:
        raise BadFileError(
            f"its matrix holds NaN or infinity in all of the {cells.spoiled:,} cells drawn",
            "remove these cells, or take other values with layer= or use_raw=True",
        )
    chosen.sort(key=lambda puzzle: settings.sizes.index(len(puzzle.rows)))
    return chosen, cells.genes, _notes_on_cells(chosen, table, cells, settings)


def _cell_set(puzzle: PuzzleIndex) -> tuple[int, ...]:
    return tuple(sorted(puzzle.rows))


def _first_new(
    drawn: Sequence[PuzzleIndex], seen: Collection[tuple[int, ...]], missing: Mapping[int, int]
) -> list[PuzzleIndex]:
    """Take the puzzles that were not chosen before, as many of each size as are missing."""
    left = dict(missing)
    found = []
    for puzzle in drawn:
        if left[len(puzzle.rows)] and _cell_set(puzzle) not in seen:
            left[len(puzzle.rows)] -= 1
            found.append(puzzle)
    return found


def _with_useful_cells(
    puzzles: Sequence[PuzzleIndex], table: CellTable, cells: _Cells, rng: np.random.Generator
) -> Iterator[PuzzleIndex]:
    """Read the cells of puzzles and put others of their kind in the place of those that turn out to be of no use."""
    cells.read(row for puzzle in puzzles for row in puzzle.rows)
    n_tried = 1  # doubled each time, so that of a kind without any use all cells are read soon
    while True:
        yield from (puzzle for puzzle in puzzles if cells.useless.isdisjoint(puzzle.rows))
        spoilt = [puzzle for puzzle in puzzles if not cells.useless.isdisjoint(puzzle.rows)]
        if not spoilt:
            return
        peers = Peers(table, cells.useless)
        tried = [
            {row: peers.draw(row, n_tried, rng) for row in puzzle.rows if row in cells.useless} for puzzle in spoilt
        ]
        cells.read(row for own in tried for rows in own.values() for row in rows)
        puzzles = [
            replace(puzzle, rows=tuple(_first_useful(own.get(row, ()), cells, row) for row in puzzle.rows))
            for puzzle, own in zip(spoilt, tried, strict=True)
            if all(own.values())
        ]
        n_tried *= 2


def _first_useful(rows: Iterable[int], cells: _Cells, otherwise: int) -> int:
    return next((row for row in rows if row not in cells.useless), otherwise)


def _notes_on_cells(
    chosen: Sequence[PuzzleIndex], table: CellTable, cells: _Cells, settings: PuzzleSettings
) -> list[str]:
    notes = []
    if cells.spoiled:
        notes.append(f"{cells.spoiled:,} drawn cells left out: their values are NaN or infinite")
    if poor := len(cells.useless) - cells.spoiled:
        notes.append(f"{poor:,} drawn cells left out: they express fewer than min_genes={settings.min_genes}")
    used = {row for puzzle in chosen for row in puzzle.rows}
    if short := sum(len(cells.genes[row]) < settings.n_top for row in used):
        notes.append(
            f"{short:,} cells of its puzzles express fewer than {settings.n_top} genes: their lists are shorter"
        )
    found = Counter(len(puzzle.rows) for puzzle in chosen)
    return notes + lonely_cells(table, settings) + shortfall(table, settings, found, bool(cells.useless))


class _Metadata:
    """The context columns of a file."""

    def __init__(self, store: Store, job: Job, types: Labels) -> None:
        wanted = dict.fromkeys((*CONTEXT_FIELDS, *job.settings.context.extra(job.folder)))
        present = set(store.columns("obs"))
        self._job = job
        self._columns: dict[str, Labels] = {name: store.labels(name, on_one_line) for name in wanted if name in present}
        self._kinds = store.labels(TISSUE_KIND) if TISSUE_KIND in present else None
        self._types = {name.lower() for name in types.categories}

    def values(self, row: int) -> dict[str, str]:
        """Return the values of a cell that say something."""
        found = {name: labels.value(row) for name, labels in self._columns.items()}
        return {name: value for name, value in found.items() if value}

    def all_of(self, name: str, rows: Sequence[int]) -> str:
        """Return the different values of some cells on one line."""
        labels = self._columns.get(name)
        values = [labels.value(row) for row in rows] if labels is not None else []
        return VALUE_SEPARATOR.join(sorted({clean_value(value) for value in values if value}))

    def sentences(self, row: int) -> str:
        """Write the context of a cell; the tissue of a cell culture is its cell type, and would give it away."""
        values = self.values(row)
        if names_type(values.get("tissue"), self._kinds.value(row) if self._kinds else None, self._types):
            values.pop("tissue", None)
        return self._job.settings.context.sentences(values, self._job.folder)


def _puzzles(
    store: Store,
    job: Job,
    table: CellTable,
    chosen: list[PuzzleIndex],
    genes: dict[int, tuple[str, ...]],
    ids: dict[int, str],
) -> list[Puzzle]:
    settings = job.settings
    metadata = _Metadata(store, job, table.types)
    of_group = candidates_of_group(table) if settings.single and not settings.open_ended else {}
    puzzles = []
    for puzzle in chosen:
        candidates = puzzle.candidates
        if settings.open_ended:
            candidates = ()
        elif settings.single:
            candidates = of_group[puzzle.donor, puzzle.batch]
        meta = {
            "donor_id": puzzle.donor,
            **({"batch": puzzle.batch} if puzzle.batch else {}),
            "dataset": job.name,
            "tissue": metadata.all_of("tissue", puzzle.rows),
            "disease": metadata.all_of("disease", puzzle.rows),
            "cell_ids": [str(ids[row]) for row in puzzle.rows],
        }
        try:
            puzzles.append(
                Puzzle(
                    tuple(genes[row] for row in puzzle.rows),
                    candidates,
                    puzzle.labels,
                    # The first cell speaks for all, as in the published data: they are of one donor.
                    metadata.sentences(puzzle.rows[0]),
                    meta,
                )
            )
        except ValueError as error:
            raise BadFileError(
                f"its metadata cannot be used in a puzzle ({error})", "correct them in the file"
            ) from error
    return puzzles


def _write_records(store: Store, job: Job, table: CellTable, reader: CellReader) -> int:
    """Write one record for each cell of the pool, in the published form; returns how many."""
    metadata = _Metadata(store, job, table.types)
    ids, _ = store.cell_ids(table.pool)
    with JsonListWriter(job.records or "", indent=None) as writer:
        for (row, genes), name in zip(reader.read(table.pool), ids, strict=True):
            if genes is None or len(genes) < job.settings.min_genes:
                continue
            values = metadata.values(row)
            context = f"{metadata.sentences(row)} Top expressed genes are: {', '.join(genes)}.".strip()
            batch = table.batches.value(row) if table.batches is not None else ""
            writer.write(
                {
                    "cell_index": str(name),
                    "donor_id": table.donors.value(row),
                    "top_expressed_genes": list(genes),
                    "cell_type": table.types.value(row),
                    "context": context,
                    **({"batch_id": batch} if batch else {}),
                    **values,
                }
            )
    return writer.count
