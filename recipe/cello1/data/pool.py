"""Which cells make puzzles: decided from the metadata alone, before any expression is read.

Cells of one donor (and batch, where there is one), each of another type, from at most ``max_cells`` of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.fingerprints import donor_id
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.formats.stores import BadFileError
from recipe.cello1.task.answer import type_fault
from recipe.cello1.task.labels import Labels
from recipe.cello1.task.sampling import PuzzleIndex, sample_puzzles
from recipe.cello1.task.text import canonical_id, clean_value

SUSPENSION = "suspension_type"
PRIMARY = "is_primary_data"
ANY_SUSPENSION = "any"
KEEP_THEM = "keep them with keep_duplicates=True"


@dataclass(frozen=True, slots=True)
class CellTable:
    """The metadata of a file that puzzles are made from."""

    # Of every cell
    types: Labels
    donors: Labels
    # The same; ``None`` where the file has none
    batches: Labels | None
    # int64, sorted: rows of cells that can be used, and those of them that may be drawn from
    usable: np.ndarray
    pool: np.ndarray
    # What was left out and why
    notes: tuple[str, ...]
    # Cells in the file
    n_cells: int

    def take(self, rows: np.ndarray) -> tuple[Labels, Labels, Labels | None]:
        """Return types, donors and batches of some rows."""
        return self.types.take(rows), self.donors.take(rows), None if self.batches is None else self.batches.take(rows)


def read_table(
    store: Store, settings: PuzzleSettings, rng: np.random.Generator, repeated: Mapping[str, np.ndarray] | None = None
) -> CellTable:
    """Read the metadata and draw the pool, without the cells that are there again, by what is to be said of them."""
    columns = store.columns("obs")
    notes = []
    usable = np.ones(store.n_obs, dtype=bool)

    def leave_out(bad: np.ndarray, why: str) -> None:
        count = int((bad & usable).sum())
        if count:
            notes.append(f"{count:,} of {store.n_obs:,} cells left out: {why}")
        usable[bad] = False

    if settings.suspension != ANY_SUSPENSION:
        kinds = _column(store, columns, SUSPENSION, "take all cells with suspension='any'")
        leave_out(~_is(kinds, settings.suspension.lower()), f"their {SUSPENSION} is not {settings.suspension!r}")
    if PRIMARY in columns and not settings.keep_duplicates:
        copies = _is(store.labels(PRIMARY, canonical_id), "false", "0", "no")
        leave_out(copies, f"{PRIMARY} is False: other data sets have them ({KEEP_THEM})")
    types = _column(store, columns, settings.type_column, "name the column of the cell types with type_column=")
    leave_out(types.codes < 0, f"{settings.type_column} names no type")
    dropped = settings.excluded_types(types.categories)
    if dropped:
        codes = [types.categories.index(name) for name in dropped]
        leave_out(np.isin(types.codes, codes), f"exclude_types= fits {', '.join(map(repr, dropped))}")
    _check_types(types, usable)
    wanted = "name the column of the donors with donor_column="
    donors = _column(store, columns, settings.donor_column, wanted, canonical_id)
    if not (donors.codes >= 0).any():
        raise BadFileError(f"{settings.donor_column} names no donor", "fill it, or name another with donor_column=")
    leave_out(donors.codes < 0, f"{settings.donor_column} names no donor")
    if pools := [name for name in donors.categories if not donor_id(name)]:
        codes = [donors.categories.index(name) for name in pools]
        leave_out(np.isin(donors.codes, codes), f"{settings.donor_column} is {', '.join(pools)}, which is no donor")
    for why, rows in (repeated or {}).items():
        leave_out(np.isin(np.arange(store.n_obs), rows), f"{why} ({KEEP_THEM})")
    batches = store.labels(settings.batch_column, canonical_id) if settings.batch_column in columns else None

    rows = pool = np.flatnonzero(usable)
    if settings.max_cells and len(pool) > settings.max_cells:
        pool = np.sort(rng.choice(pool, settings.max_cells, replace=False))
    return CellTable(types, donors, batches, rows, pool, tuple(notes), store.n_obs)


def _column(
    store: Store, columns: Collection[str], name: str, remedy: str, clean: Callable[[object], str] = clean_value
) -> Labels:
    if name not in columns:
        raise BadFileError(f"obs has no column {name!r}", f"{remedy}; it has {sorted(columns)}")
    return store.labels(name, clean)


def _is(labels: Labels, *values: str) -> np.ndarray:
    return np.isin(labels.codes, [i for i, name in enumerate(labels.categories) if name.lower() in values])


def _check_types(types: Labels, usable: np.ndarray) -> None:
    remedy = "rename it in the file, or leave its cells out with exclude_types="
    present = np.unique(types.codes[usable])
    seen: dict[str, str] = {}
    for name in [types.categories[code] for code in present.tolist() if code >= 0]:
        if fault := type_fault(name):
            raise BadFileError(f"the cell type {name!r} {fault}", remedy)
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise BadFileError(f"the cell types {other!r} and {name!r} differ in case only", remedy)


def draw(
    table: CellTable,
    settings: PuzzleSettings,
    rng: np.random.Generator,
    without: Collection[int],
    sizes: Iterable[int],
    wanted: int,
) -> list[PuzzleIndex]:
    """Draw puzzles from the pool."""
    pool = table.pool
    if without:
        pool = pool[~np.isin(pool, np.fromiter(without, np.int64, len(without)))]
    types, donors, batches = table.take(pool)
    if settings.single and not settings.open_ended:
        lonely = _groups_of_one_type(types, donors, batches)
        types = Labels(np.where(lonely, -1, types.codes), types.categories)
    drawn = sample_puzzles(types, donors, sizes=sizes, n_per_size=wanted, rng=rng, batches=batches)
    return [replace(puzzle, rows=tuple(pool[list(puzzle.rows)].tolist())) for puzzle in drawn]


class Peers:
    """The cells of a pool that may stand for each other: those of one donor (and batch) and type."""

    def __init__(self, table: CellTable, without: Collection[int]) -> None:
        self._pool = table.pool
        types, donors, batches = table.take(table.pool)
        self._kinds = _group_codes(donors, batches) * len(types.categories) + types.codes
        useful = np.flatnonzero(~np.isin(table.pool, np.fromiter(without, np.int64, len(without))))
        useful = useful[np.argsort(self._kinds[useful], kind="stable")]
        self._rows, self._sorted = self._pool[useful], self._kinds[useful]

    def draw(self, row: int, count: int, rng: np.random.Generator) -> list[int]:
        """Draw cells that may stand for another."""
        kind = self._kinds[np.searchsorted(self._pool, row)]
        first, last = np.searchsorted(self._sorted, [kind, kind + 1])
        return self._rows[first + rng.choice(last - first, min(count, last - first), replace=False)].tolist()


def wanted_puzzles(table: CellTable, settings: PuzzleSettings) -> int:
    """Say how many puzzles of each size are wanted: ``per_size``, or one for each cell where that is 0."""
    return settings.per_size or max(1, len(table.pool))


def shortfall(table: CellTable, settings: PuzzleSettings, found: Mapping[int, int], any_useless: bool) -> list[str]:
    """Say where there are fewer puzzles than wanted."""
    least = max(1, settings.per_size)
    short = {size: found.get(size, 0) for size in settings.sizes if found.get(size, 0) < least}
    if not short:
        return []
    what = ", ".join(f"N={size}: {count}" for size, count in short.items())
    among = " among the cells that are left" if any_useless else ""
    few = f"fewer than {least} puzzles" if least > 1 else "no puzzle"
    return [
        f"{few} ({what}): no donor (and batch) has more sets of that many cells of "
        f"different types{among}; change sizes= or max_cells="
    ]


def lonely_cells(table: CellTable, settings: PuzzleSettings) -> list[str]:
    """Say how many cells make no single-cell puzzle, since their donor has no other type to choose from."""
    if not settings.single or settings.open_ended:
        return []
    count = int(_groups_of_one_type(*table.take(table.pool)).sum())
    if not count:
        return []
    return [f"{count:,} of {len(table.pool):,} cells are in no puzzle: their donor (and batch) has a single type"]


def candidates_of_group(table: CellTable) -> dict[tuple[str, str], tuple[str, ...]]:
    """List the types of each donor and batch in the pool: the candidates of single-cell puzzles."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    types, donors, batches = table.take(table.pool)
    keys, codes = _group_codes(donors, batches), types.codes
    n_types = len(table.types.categories)
    pairs = np.unique(np.stack([keys, codes.astype(np.int64)]), axis=1)
    first = {key: row for row, key in zip(table.pool[::-1].tolist(), keys[::-1].tolist(), strict=True)}
    members: dict[int, list[str]] = {}
    for key, code in pairs.T.tolist():
        if 0 <= code < n_types:
            members.setdefault(key, []).append(table.types.categories[code])
    for key, names in members.items():
        row = first[key]
        batch = table.batches.value(row) if table.batches is not None else ""
        found[table.donors.value(row), batch] = tuple(sorted(names))
    return found


def _group_codes(donors: Labels, batches: Labels | None) -> np.ndarray:
    codes = donors.codes.astype(np.int64)
    if batches is None:
        return codes
    return codes * (len(batches.categories) + 1) + batches.codes + 1


def _groups_of_one_type(types: Labels, donors: Labels, batches: Labels | None) -> np.ndarray:
    """Find the cells whose donor (and batch) has one type only: naming it would be no question."""
    keys, inverse = np.unique(_group_codes(donors, batches), return_inverse=True)
    pairs = np.unique(np.stack([inverse, types.codes.astype(np.int64)]), axis=1)
    return np.bincount(pairs[0], minlength=len(keys))[inverse] < 2
