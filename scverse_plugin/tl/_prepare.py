"""Parameters and data to everything that is known before the first puzzle is asked, and what is recorded of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.formats.provenance import package_versions
from recipe.cello1.task.gene_names import compile_patterns
from recipe.cello1.task.puzzle import Puzzle
from scverse_plugin.adata import _store
from scverse_plugin.adata._context import ContextWriter
from scverse_plugin.adata._groups import make_units, only, read_groups, read_samples
from scverse_plugin.adata._matrix import Expression, check_values, list_genes, open_expression
from scverse_plugin.adata._species import check_symbols
from scverse_plugin.adata._types import check_decoys, read_types
from scverse_plugin.method._plan import Draft, choose_puzzle_size
from scverse_plugin.method._solve import Lists, fill
from scverse_plugin.method._units import Unit
from scverse_plugin.tl._options import AUTO, Options

FREE_PUZZLES = 1000  # without groups, more than these are asked only if max_puzzles allows them
MANY_HOUSEKEEPING = 1 / 3  # of the listed genes


@dataclass(slots=True, eq=False)
class Prepared:
    """Everything that is known before the first puzzle is asked."""

    # What gets a label, and the unit of each cell (int64, -1 for none)
    units: list[Unit]
    unit_of: np.ndarray
    # The candidates, and the most cells in a puzzle for each donor
    lists: Lists
    size: dict[str, int]
    # bool of shape (units, types): which types stand on the list of each unit
    allowed: np.ndarray
    # Samples in which no type is given twice
    one_to_one: tuple[str, ...]
    # Listed genes of each cell drawn
    genes: dict[int, tuple[str, ...]]
    # Writes the context
    context: ContextWriter
    # Random numbers, and what they started from
    rng: np.random.Generator
    seed: int
    # Name of the matrix that was read
    matrix: str

    def puzzle(self, draft: Draft) -> Puzzle:
        """Fill a draft in."""
        return fill(draft, self.genes, self.context(draft.donor, draft.cells))


def expression_of(adata: AnnData, given: Options) -> Expression:
    """Open the matrix that the options choose."""
    return open_expression(
        adata,
        layer=given.layer,
        use_raw=given.use_raw,
        gene_symbols=given.gene_symbols,
        mask_var=given.mask_var,
        exclude_genes=given.exclude_genes,
    )


def prepare(adata: AnnData, given: Options, *, here: bool = True) -> Prepared:
    """Read what is needed from the object; donor metadata go to a server elsewhere only if they are named."""
    rng = given.rng
    seed = int(rng.integers(2**31)) if isinstance(rng, np.random.Generator) else int(rng)
    own = np.random.default_rng(seed)
    groups = read_groups(adata, given.groupby, given.groups)
    if given.within is not None:
        groups = only(groups, given.within)
    rows = np.flatnonzero(groups.codes >= 0)
    _check_cells(given, len(rows))
    samples = read_samples(adata, given.sample_key, rows)
    present = None
    if samples is not None:
        present = [samples.categories[code] for code in np.unique(samples.codes[rows]).tolist()]
    of, by_sample = read_types(() if given.cell_types is None else given.cell_types, adata, given.reference, present)
    types = tuple(sorted({name for found in of.values() for name in found}))
    decoys = check_decoys(given.decoys, types, given.unassigned)
    if given.max_false is not None and not decoys:
        raise ValueError(
            f"max_false={given.max_false} needs decoys, types that these cells cannot be: how often they are chosen "
            "says how many labels are false; give some, decoys=['neuron', 'hepatocyte'] for blood"
        )
    lists = Lists(types, of, decoys, given.n_candidates, given.shuffle_candidates)
    context = given.context
    if isinstance(context, str) and context == AUTO and given.context_keys is None and not here:
        context = ""
    writer = ContextWriter(adata, context, given.context_keys, present, types)
    source = expression_of(adata, given)
    check_values(source, rows, adata.obs_names)
    units, unit_of = make_units(
        groups,
        samples,
        by_sample=by_sample,
        n_cells=given.cells_per_group,
        cell_choice=given.cell_choice,
        source=source,
        rng=own,
    )
    one_to_one = _one_to_one(units, of, by_sample) if given.one_to_one is True else ()
    drawn = np.array([row for unit in units for row in unit.cells], dtype=np.int64)
    genes = list_genes(source, drawn, adata.obs_names, n_top=given.n_top_genes, rank_by=given.rank_by)
    genes = check_symbols(genes, given.organism)
    _note_housekeeping(genes)
    allowed = np.zeros((len(units), len(types)), dtype=bool)
    column = {name: j for j, name in enumerate(types)}
    for i, unit in enumerate(units):
        allowed[i, [column[name] for name in of[unit.sample or next(iter(of))]]] = True
    return Prepared(
        units,
        unit_of,
        lists,
        puzzle_sizes(given, units, lists),
        allowed,
        one_to_one,
        genes,
        writer,
        own,
        seed,
        source.name,
    )


def puzzle_sizes(given: Options, units: Sequence[Unit], lists: Lists) -> dict[str, int]:
    """Choose how many cells the puzzles of each donor have: never more than candidates."""
    sizes = {}
    for donor, types in lists.of.items():
        n_units = sum(donor in unit.donors for unit in units)
        wanted = given.puzzle_size or choose_puzzle_size(n_units, len(types), cells=given.groupby is None)
        sizes[donor] = min(wanted, lists.n_types(donor) + lists.n_decoys(donor))
    return sizes


def _one_to_one(units: Sequence[Unit], of: Mapping[str, Sequence[str]], by_sample: bool) -> tuple[str, ...]:
    """Return the samples in which no type is given twice: all of them, if there are enough types."""
    samples = tuple(dict.fromkeys(unit.sample for unit in units))
    for sample in samples:
        n_units = sum(unit.sample == sample for unit in units)
        n_types = len(of[sample] if by_sample else next(iter(of.values())))
        if n_units > n_types:
            where = f" of sample {sample!r}" if by_sample else ""
            msg = f"one_to_one=True, but there are {n_units} groups{where} and only {n_types} cell_types; add types"
            raise ValueError(msg)
    return samples


def _check_cells(given: Options, n_cells: int) -> None:
    """Check that many puzzles about single cells are wanted."""
    needed = -(-n_cells // (given.puzzle_size or 1)) * given.n_votes
    if given.groupby is None and given.max_puzzles is None and needed > FREE_PUZZLES:
        raise ValueError(
            f"groupby: without it each of {n_cells} cells is asked about, which takes {needed} puzzles; "
            f"name a column of obs with groups, lower n_votes, or allow it with max_puzzles={needed}"
        )


def _note_housekeeping(genes: Mapping[int, Sequence[str]]) -> None:
    patterns = compile_patterns(["housekeeping"])
    listed = [gene for found in genes.values() for gene in found]
    known = {gene: any(pattern.search(gene) for pattern in patterns) for gene in set(listed)}
    share = sum(known[gene] for gene in listed) / len(listed)
    if share > MANY_HOUSEKEEPING:
        logg.warning(
            f"{share:.0%} of the listed genes are housekeeping genes, which lead the lists of raw counts and tell "
            "types apart badly; exclude_genes=['housekeeping'] leaves them out"
        )


def _mask_mark(mask: Any) -> dict[str, Any]:
    """Return what an array of genes can be told by."""
    kept = np.asarray(mask, dtype=bool)
    return {"kept": int(kept.sum()), "of": len(kept), "sha256": hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()}


def provenance(given: Options, prepared: Prepared, about: Mapping[str, str]) -> dict[str, Any]:
    """Return what is needed to repeat the run, and no secret."""
    import scverse_plugin

    left_out = {"reference", "engine", "model", "engine_options", "base_url", "rng", "progress", "copy", "dry_run"}
    left_out |= {"calibration", "mask_var", "cell_types", "cache", "context_keys", "groups", "max_puzzles"}
    left_out |= {"price_per_million_tokens", "within"}
    found = {field.name: getattr(given, field.name) for field in fields(given) if field.name not in left_out}
    mask, keys = given.mask_var, given.context_keys
    found |= {
        "tool": _store.TOOL,
        "cell_types": {donor: list(types) for donor, types in prepared.lists.of.items()},
        "decoys": list(prepared.lists.decoys),
        "exclude_genes": list(given.exclude_genes),
        "groups": None if given.groups is None else [str(name) for name in given.groups],
        "mask_var": mask if mask is None or isinstance(mask, str) else _mask_mark(mask),
        "context_keys": dict(keys) if isinstance(keys, Mapping) else list(prepared.context.keys),
        "context": prepared.context.given,
        "calibrated": given.calibration is not None,
        "puzzle_size": max(prepared.size.values()),
        "one_to_one": bool(prepared.one_to_one),
        "matrix": prepared.matrix,
        "seed": prepared.seed,
        # Texts may be keys and addresses; numbers are not.
        "engine_options": {
            name: value
            for name, value in (given.engine_options or {}).items()
            if isinstance(value, bool | int | float) or name == "dtype"
        },
        "version": scverse_plugin.__version__,
        **package_versions(("scanpy", "anndata")),
        **about,
    }
    return found
