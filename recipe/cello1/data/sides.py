"""Which side each puzzle goes to: train, test, validation, or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipe.cello1.data.identity import Fingerprint, all_have_ids, cell_keys, donor_keys, nameless_contexts
from recipe.cello1.data.settings import Settings
from recipe.cello1.data.splits import MAX_TEST, Split, group_puzzles, split_puzzles
from recipe.cello1.prompt import Layout

LEFT_OUT = "left_out"
SPLIT_MODES = ("donor", "dataset", "tissue", "puzzle", "given")


@dataclass(frozen=True, slots=True)
class Plan:
    """How the data set is put together.

    Attributes
    ----------
    split
        One of ``SPLIT_MODES``.
    max_test, min_per_size
        Test puzzles at most, and of each number of cells at least; for ``None`` see
        :func:`recipe.cello1.data.splits.quotas_of`.
    val_size
        Validation puzzles taken from the training side, 0 for none.
    drop_overlap
        Whether test puzzles that share a cell with training are left out.
    layout
        Prompt layout of the RL rows.
    raw
        Whether to write the training puzzles in the published raw form, too.
    """

    split: str = "donor"
    max_test: int = MAX_TEST
    min_per_size: int | None = None
    val_size: int = 0
    drop_overlap: bool = False
    layout: Layout = "system"
    raw: bool = False


def decide_sides(
    names: Sequence[tuple[str, str]], known: Sequence[Sequence[Fingerprint]], settings: Settings, plan: Plan
) -> tuple[list[np.ndarray], list[str]]:
    """Decide the side of each puzzle.

    Parameters
    ----------
    names
        Name of each source, and the side that it gives its puzzles (empty if it leaves that open).
    known
        The puzzles of each source.
    settings
        How the puzzles were made; its seed serves here, too.
    plan
        How they are put together.

    Returns
    -------
    For each source an array of names of sides, and notes on the split.

    Raises
    ------
    ValueError
        If they cannot be split as wanted.
    """
    notes: list[str] = []
    flat = [puzzle for own in known for puzzle in own]
    if plan.split == "given":
        side = _given_sides(names, known)
    else:
        side = np.full(len(flat), "train", dtype=object)
        found, notes = _hold_out(flat, plan.split, settings.rng("split"), plan.max_test, plan.min_per_size)
        side[found.test], side[found.left_out] = "test", LEFT_OUT
        notes += _notes_on(found, "test")
    if plan.drop_overlap:
        notes += _drop_overlap(flat, side)
    if plan.val_size:
        rows = np.flatnonzero(side == "train")
        own = [flat[row] for row in rows.tolist()]
        mode = "puzzle" if plan.split == "given" else plan.split
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
    nameless = [name for name, side in names if not side]
    if nameless:
        msg = (
            f"--split given: the name of {nameless[0]!r} does not say train, test, val or reasoning; rename it, or "
            "choose another --split"
        )
        raise ValueError(msg)
    return np.array([side for (_, side), own in zip(names, known, strict=True) for _ in own], dtype=object)


def _hold_out(
    puzzles: Sequence[Fingerprint], mode: str, rng: np.random.Generator, max_test: int, least: int | None
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
    return split_puzzles(strata, keys, rng=rng, max_test=max_test, min_per_stratum=least), notes


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
        msg = f"--split {mode}: {missing:,} of {len(found):,} puzzles do not say their {mode}; choose another --split"
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
        msg = "--drop-overlap leaves no test puzzles: every one shares a cell with training; choose another --split"
        raise ValueError(msg)
    return [f"{len(rows):,} test puzzles that share a cell with training are left out"] if rows else []
