"""Train and test sets: nothing on both sides, and the test set stratified by the number of cells.

Plain arrays in, plain arrays out. Puzzles that share a key (a donor, a data set, a tissue, a cell) form a group, and so
do groups that are joined by a chain of puzzles; a group goes to one side as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from recipe.cello1.data.fingerprints import (
    Fingerprint,
    all_have_ids,
    cell_keys,
    donor_id,
    donor_keys,
    hash64,
    nameless_contexts,
)
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.task.prompt import Layout

MAX_TEST = 1100
MIN_PER_STRATUM = 5
SMALL_SHARE = 0.1
LARGE_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of the puzzles of each side, ascending."""

    # The two sides
    train: np.ndarray
    test: np.ndarray
    # Puzzles of test groups beyond the quota: of use for testing, never for training
    left_out: np.ndarray
    # How many groups there are
    n_groups: int
    # Test puzzles wanted of each stratum
    quotas: Mapping[int, int]


def quotas_of(
    counts: Mapping[int, int], max_test: int | None = None, min_per_stratum: int | None = None
) -> dict[int, int]:
    """Say how many test puzzles to take of each stratum; unless a limit is given, a fifth of all at most."""
    total = sum(counts.values())
    share = LARGE_SHARE if max_test is None else 1
    max_test = MAX_TEST if max_test is None else max_test
    most = {key: max(0, count - 1) for key, count in counts.items()}
    if total <= max_test:
        least = 1 if min_per_stratum is None else min_per_stratum
        return {key: min(most[key], max(least, int(SMALL_SHARE * count))) for key, count in counts.items()}
    least = MIN_PER_STRATUM if min_per_stratum is None else min_per_stratum
    quotas = {key: min(least, most[key]) for key in counts}
    target = min(max_test, int(share * total))
    rest, spare = total - sum(quotas.values()), target - sum(quotas.values())
    if spare > 0:
        quotas = {key: min(most[key], quotas[key] + (counts[key] - quotas[key]) * spare // rest) for key in counts}
    elif spare < 0:
        quotas = {key: min(most[key], max(1, quotas[key] * target // sum(quotas.values()))) for key in counts}
    return quotas


def group_puzzles(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Find the groups of puzzles that must stay together."""
    n = len(keys)
    if n == 0:
        return np.empty(0, dtype=np.int64)
    owner = np.repeat(np.arange(n, dtype=np.int32), [len(own) for own in keys])
    distinct, codes = np.unique(np.concatenate([np.empty(0, np.uint64), *keys]), return_inverse=True)
    graph = sp.coo_array(
        (np.ones(len(owner), dtype=np.int8), (owner, (n + codes).astype(np.int32))),
        shape=(n + len(distinct), n + len(distinct)),
    )
    _, labels = connected_components(graph, directed=False)
    _, first, groups = np.unique(labels[:n], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[groups]


def split_puzzles(
    strata: Sequence[int] | np.ndarray,
    keys: Sequence[np.ndarray],
    *,
    rng: np.random.Generator,
    max_test: int | None = None,
    min_per_stratum: int | None = None,
    wanted: np.ndarray | None = None,
) -> Split:
    """Choose the test puzzles: by the quotas, or the groups of those that are wanted."""
    strata = np.asarray(strata, dtype=np.int64)
    n = len(strata)
    if n < 2:
        raise ValueError(f"{n} puzzles cannot be split into train and test; make more, or choose another split")
    if max_test is not None and max_test < 1:
        raise ValueError(f"the test set must have at least one puzzle, got a limit of {max_test}")
    quotas = quotas_of(Counter(strata.tolist()), max_test, min_per_stratum)
    groups = group_puzzles(keys)
    n_groups = int(groups.max()) + 1
    if wanted is not None:
        taken = np.isin(np.arange(n_groups), groups[wanted])
        counts = Counter(strata[taken[groups]].tolist())
        share = min(1.0, (max_test or MAX_TEST) / counts.total())
        quotas = {key: min(count, max(min_per_stratum or 1, int(share * count))) for key, count in counts.items()}
        if taken.all():
            raise ValueError("test_donors leaves no puzzle to train on; name fewer donors, or add files of others")
    elif n_groups == 1:
        raise ValueError(
            "all puzzles belong together (they are linked by what must not be on both sides), so that none can be "
            "held out; add files, or split by something smaller: split='puzzle' always works, but leaks"
        )
    else:
        taken = _take_groups(strata, groups, n_groups, quotas, rng)
    side = np.zeros(n, dtype=np.int8)
    for stratum in sorted(quotas):
        inside = np.flatnonzero(taken[groups] & (strata == stratum))
        chosen = rng.permutation(inside)[: quotas[stratum]]
        side[inside] = 2
        side[chosen] = 1
    if not (side == 1).any():
        raise ValueError("no group of puzzles is small enough to be held out; add files, or split by something smaller")
    parts = [np.flatnonzero(side == value) for value in (0, 1, 2)]
    return Split(parts[0], parts[1], parts[2], n_groups, quotas)


def _take_groups(
    strata: np.ndarray, groups: np.ndarray, n_groups: int, quotas: Mapping[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Choose the groups of the test set: a bool for each."""
    names, codes = np.unique(strata, return_inverse=True)
    need = np.array([quotas[name] for name in names.tolist()])
    table = np.zeros((n_groups, len(names)), dtype=np.int64)
    np.add.at(table, (groups, codes), 1)
    sizes = table.sum(axis=1)
    taken = np.zeros(n_groups, dtype=bool)
    training = len(strata)

    def fit(group: int) -> int:
        return int(np.minimum(table[group], need).sum())

    order = rng.permutation(n_groups)
    for group in order.tolist():
        if not need.any():
            return taken
        if 2 * fit(group) >= sizes[group] and sizes[group] < training:
            taken[group] = True
            need = np.maximum(need - table[group], 0)
            training -= int(sizes[group])
    while need.any():
        gains = {g: fit(g) for g in order.tolist() if not taken[g] and 2 * (training - sizes[g]) >= len(strata)}
        useful = {group: gain for group, gain in gains.items() if gain}
        if not useful:
            return taken
        best = max(useful, key=lambda group: useful[group] / sizes[group])
        taken[best] = True
        need = np.maximum(need - table[best], 0)
        training -= int(sizes[best])
    return taken


LEFT_OUT = "left_out"


SPLIT_MODES = ("donor", "dataset", "tissue", "puzzle", "given", "none")


@dataclass(frozen=True, slots=True)
class DataPlan:
    """How the data set is put together."""

    # One of ``SPLIT_MODES``
    split: str = "donor"
    # Test puzzles at most, and of each number of cells at least; for ``None`` see
    # :func:`recipe.cello1.data.split.quotas_of`
    max_test: int | None = None
    min_per_size: int | None = None
    # Donors to test on, where the split is by donor; none: they are drawn
    test_donors: tuple[str, ...] = ()
    # Validation puzzles taken from the training side, 0 for none
    val_size: int = 0
    # Whether test puzzles that share a cell with training are left out
    drop_overlap: bool = False
    # Prompt layout of the RL rows
    layout: Layout = "system"
    # Whether to write the training puzzles in the published raw form, too
    raw: bool = False


def decide_sides(
    names: Sequence[tuple[str, str]], known: Sequence[Sequence[Fingerprint]], settings: PuzzleSettings, plan: DataPlan
) -> tuple[list[np.ndarray], list[str]]:
    """Decide the side of each puzzle."""
    notes: list[str] = []
    flat = [puzzle for own in known for puzzle in own]
    if plan.test_donors and plan.split != "donor":
        raise ValueError(f"test_donors needs the split 'donor', and it is {plan.split!r}; leave one of them out")
    if plan.split == "given":
        side = _given_sides(names, known)
    else:
        side = np.full(len(flat), "train", dtype=object)
    if plan.split not in ("given", "none"):
        rows, notes = _of_known_donors(flat, plan.split)
        own = [flat[row] for row in rows.tolist()]
        found, more = _hold_out(
            own, plan.split, settings.rng("split"), plan.max_test, plan.min_per_size, plan.test_donors
        )
        side[np.setdiff1d(np.arange(len(flat)), rows)] = LEFT_OUT
        side[rows[found.test]], side[rows[found.left_out]] = "test", LEFT_OUT
        notes += more + _notes_on(found, "test")
    if plan.drop_overlap:
        notes += _drop_overlap(flat, side)
    if plan.val_size:
        rows = np.flatnonzero(side == "train")
        own = [flat[row] for row in rows.tolist()]
        mode = {"given": "puzzle", "none": "donor"}.get(plan.split, plan.split)
        found, more = _hold_out(own, mode, settings.rng("val"), plan.val_size, 1)
        notes += [f"validation set: {note}" for note in more] + _notes_on(found, "validation")
        side[rows[found.test]], side[rows[found.left_out]] = "val", LEFT_OUT
    return np.split(side, np.cumsum([len(own) for own in known])[:-1]), notes


def _notes_on(found: Split, name: str) -> list[str]:
    """Say where a set that is held out is smaller than wanted, and what it costs."""
    notes, wanted = [], sum(found.quotas.values())
    if len(found.test) < wanted:
        notes.append(
            f"the {name} set has {len(found.test):,} of the {wanted:,} puzzles wanted: its groups are too large"
        )
    if len(found.left_out):
        notes.append(
            f"{len(found.left_out):,} puzzles of the {name} groups are more than the {name} set takes: they are in "
            f"{LEFT_OUT}.json, and must not be trained on"
        )
    return notes


def _given_sides(names: Sequence[tuple[str, str]], known: Sequence[Sequence[Fingerprint]]) -> np.ndarray:
    # A file without any puzzle, which is listed as bad, need not say whose it is.
    nameless = [name for (name, side), own in zip(names, known, strict=True) if not side and own]
    if nameless:
        raise ValueError(
            f"split='given': the name of {nameless[0]!r} does not say train, test, val or reasoning; rename it, or "
            "choose another split"
        )
    return np.array([side for (_, side), own in zip(names, known, strict=True) for _ in own], dtype=object)


def _hold_out(
    puzzles: Sequence[Fingerprint],
    mode: str,
    rng: np.random.Generator,
    max_test: int | None,
    least: int | None,
    test_donors: Sequence[str] = (),
) -> tuple[Split, list[str]]:
    """Choose the test puzzles. Donors stay on one side in every mode but ``puzzle``, if that can be."""
    strata = [puzzle.n_cells for puzzle in puzzles]
    if mode == "puzzle":  # the same puzzle may be there several times
        shown = [np.array([puzzle.cells_shown], dtype=np.uint64) for puzzle in puzzles]
        return split_puzzles(strata, shown, rng=rng, max_test=max_test, min_per_stratum=least), []
    keys, notes = _keys(puzzles, mode), []
    if mode != "donor":
        donors = _donors(puzzles)
        strict = [np.concatenate(pair) for pair in zip(keys, donors, strict=True)]
        if len(np.unique(group_puzzles(strict))) > 1:
            keys = strict
        else:
            notes.append(
                f"every {mode} is linked to every other by donors that both have: donors may be in train and in test"
            )
    wanted = _of_donors(puzzles, test_donors) if test_donors else None
    return split_puzzles(strata, keys, rng=rng, max_test=max_test, min_per_stratum=least, wanted=wanted), notes


def _of_donors(puzzles: Sequence[Fingerprint], names: Sequence[str]) -> np.ndarray:
    """Find the puzzles of some donors."""
    wanted = {hash64("donor", donor_id(name)): name for name in names}
    if unknown := wanted.keys() - {puzzle.donor for puzzle in puzzles}:
        names = sorted(wanted[key] for key in unknown)
        msg = f"test_donors names {names}, of whom there are no puzzles; name donors as the puzzles have them"
        raise ValueError(msg)
    return np.array([puzzle.donor in wanted for puzzle in puzzles])


def _of_known_donors(puzzles: Sequence[Fingerprint], mode: str) -> tuple[np.ndarray, list[str]]:
    """Leave out the puzzles that name no donor where, for their context, they may be of any, and so link all others."""
    named = np.array([puzzle.donor is not None for puzzle in puzzles])
    mixed = mode == "donor" and named.any() and not named.all()
    if not mixed or len(np.unique(group_puzzles(_keys(puzzles, mode)))) > 1:
        return np.arange(len(puzzles)), []
    count = int((~named).sum())
    note = f"{count:,} puzzles name no donor and may come from any of them: they are in {LEFT_OUT}.json"
    return np.flatnonzero(named), [f"{note}, and must not be trained on"]


def _donors(puzzles: Sequence[Fingerprint]) -> list[np.ndarray]:
    nameless = nameless_contexts(puzzles)
    return [donor_keys(puzzle, nameless) for puzzle in puzzles]


def _keys(puzzles: Sequence[Fingerprint], mode: str) -> list[np.ndarray]:
    """List what must not be on both sides: donors, data sets or tissues, and cells in any case."""
    have_ids = all_have_ids(puzzles)
    if mode == "donor":
        found = _donors(puzzles)
    elif mode == "dataset":
        found = [np.array([] if p.dataset is None else [p.dataset], dtype=np.uint64) for p in puzzles]
    else:
        found = [puzzle.tissues for puzzle in puzzles]
    if missing := sum(len(own) == 0 for own in found):
        msg = f"split={mode!r}: {missing:,} of {len(found):,} puzzles do not say their {mode}; choose another split"
        raise ValueError(msg)
    return [np.concatenate([own, cell_keys(puzzle, have_ids)]) for own, puzzle in zip(found, puzzles, strict=True)]


def _drop_overlap(flat: Sequence[Fingerprint], side: np.ndarray) -> list[str]:
    """Take test puzzles that share a cell with any other side out of the test set; changes ``side``."""
    have_ids = all_have_ids(flat)
    others = [cell_keys(flat[row], have_ids) for row in np.flatnonzero(~np.isin(side, ["test", LEFT_OUT])).tolist()]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *others]))
    rows = [
        row for row in np.flatnonzero(side == "test").tolist() if np.isin(cell_keys(flat[row], have_ids), known).any()
    ]
    side[rows] = LEFT_OUT
    if not (side == "test").any():
        msg = "drop_overlap leaves no test puzzles: every one shares a cell with training; choose another split"
        raise ValueError(msg)
    return [f"{len(rows):,} test puzzles that share a cell with training are left out"] if rows else []
