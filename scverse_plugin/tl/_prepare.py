"""Parameters and data to everything that is known before the first puzzle is asked, and what is recorded of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.formats.provenance import package_versions
from recipe.cello1.task.prompt import check_layout
from recipe.cello1.task.puzzle import Puzzle
from scverse_plugin.adata import _store
from scverse_plugin.adata._context import ContextWriter
from scverse_plugin.adata._groups import CELL_CHOICES, make_units, read_groups, read_samples
from scverse_plugin.adata._matrix import check_values, list_genes, open_expression
from scverse_plugin.adata._types import check_decoys, read_types
from scverse_plugin.method._ask import ON_ERROR
from scverse_plugin.method._plan import Draft, choose_puzzle_size
from scverse_plugin.method._solve import Lists, fill
from scverse_plugin.method._units import Unit


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


def check_options(given: Mapping[str, Any]) -> None:
    """Check what needs no data."""
    _store.check_key(given["key_added"])
    try:
        check_layout(given["prompt_layout"])
    except ValueError as error:
        msg = f"prompt_layout: {error}"
        raise ValueError(msg) from None
    for name in ("groupby", "sample_key", "layer", "gene_symbols"):
        if given[name] is not None and not isinstance(given[name], str):
            msg = f"{name} must be one name, a str, got {given[name]!r}"
            raise ValueError(msg)
    if not isinstance(given["engine_options"] or {}, Mapping):
        msg = f"engine_options must be a dict ({{'max_model_len': 8192}}), got {given['engine_options']!r}"
        raise ValueError(msg)
    for name in ("cells_per_group", "n_votes", "n_candidates", "puzzle_size", "max_concurrency"):
        value = given[name]
        if value is None and name in ("puzzle_size", "max_concurrency"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            msg = f"{name} must be a positive integer, got {value!r}"
            raise ValueError(msg)
    if given["cell_choice"] not in CELL_CHOICES:
        msg = f"cell_choice must be one of {', '.join(CELL_CHOICES)}, got {given['cell_choice']!r}"
        raise ValueError(msg)
    if given["on_error"] not in ON_ERROR:
        msg = f"on_error must be one of {', '.join(ON_ERROR)}, got {given['on_error']!r}"
        raise ValueError(msg)
    if given["one_to_one"] not in (True, False, "auto"):
        msg = f"one_to_one must be True, False or 'auto', got {given['one_to_one']!r}"
        raise ValueError(msg)
    support = given["min_support"]
    if isinstance(support, bool) or not isinstance(support, int | float | np.number) or not 0 <= support <= 1:
        msg = f"min_support must be a number between 0 and 1, got {support!r}"
        raise ValueError(msg)
    rng = given["rng"]
    whole = isinstance(rng, int | np.integer) and not isinstance(rng, bool)
    if not isinstance(rng, np.random.Generator) and not (whole and rng >= 0):
        msg = f"rng is {rng!r}; pass a seed (0 or more) or a numpy Generator, so that the run can be repeated"
        raise ValueError(msg)


def prepare(adata: AnnData, given: Mapping[str, Any]) -> Prepared:
    """Read what is needed from the object."""
    rng = given["rng"]
    seed = int(rng.integers(2**31)) if isinstance(rng, np.random.Generator) else int(rng)
    own = np.random.default_rng(seed)
    groups = read_groups(adata, given["groupby"], given["groups"])
    rows = np.flatnonzero(groups.codes >= 0)
    samples = read_samples(adata, given["sample_key"], rows)
    present = None
    if samples is not None:
        present = [samples.names[code] for code in np.unique(samples.codes[rows]).tolist()]
    of, by_sample = read_types(given["cell_types"], adata, given["reference"], present)
    types = tuple(sorted({name for found in of.values() for name in found}))
    decoys = check_decoys(given["decoys"], types, given["unassigned"])
    lists = Lists(types, of, decoys, given["n_candidates"], given["shuffle_candidates"])
    writer = ContextWriter(adata, given["context"], given["context_keys"], present)
    source = open_expression(
        adata,
        layer=given["layer"],
        use_raw=given["use_raw"],
        gene_symbols=given["gene_symbols"],
        mask_var=given["mask_var"],
        exclude_genes=given["exclude_genes"],
    )
    check_values(source, rows, adata.obs_names)
    units, unit_of = make_units(
        groups,
        samples,
        by_sample=by_sample,
        n_cells=given["cells_per_group"],
        cell_choice=given["cell_choice"],
        source=source,
        rng=own,
    )
    one_to_one = _one_to_one(given["one_to_one"], units, of, by_sample)
    drawn = np.array([row for unit in units for row in unit.cells], dtype=np.int64)
    genes = list_genes(source, drawn, adata.obs_names, n_top=given["n_top_genes"], rank_by=given["rank_by"])
    allowed = np.zeros((len(units), len(types)), dtype=bool)
    column = {name: j for j, name in enumerate(types)}
    for i, unit in enumerate(units):
        allowed[i, [column[name] for name in of[unit.sample or next(iter(of))]]] = True
    return Prepared(
        units,
        unit_of,
        lists,
        _sizes(given, units, lists),
        allowed,
        one_to_one,
        genes,
        writer,
        own,
        seed,
        source.name,
    )


def _sizes(given: Mapping[str, Any], units: Sequence[Unit], lists: Lists) -> dict[str, int]:
    """Choose how many cells the puzzles of each donor have: never more than candidates."""
    sizes = {}
    for donor, types in lists.of.items():
        n_units = sum(donor in unit.donors for unit in units)
        wanted = given["puzzle_size"] or choose_puzzle_size(n_units, len(types), cells=given["groupby"] is None)
        sizes[donor] = min(wanted, lists.n_types(donor) + lists.n_decoys(donor))
    return sizes


def _one_to_one(
    wanted: bool | str, units: Sequence[Unit], of: Mapping[str, Sequence[str]], by_sample: bool
) -> tuple[str, ...]:
    """Decide for which samples no type may be given twice."""
    found = []
    for sample in dict.fromkeys(unit.sample for unit in units):
        n_units = sum(unit.sample == sample for unit in units)
        n_types = len(of[sample] if by_sample else next(iter(of.values())))
        where = f" of sample {sample!r}" if by_sample else ""
        if wanted is True and n_units > n_types:
            msg = f"one_to_one=True, but there are {n_units} groups{where} and only {n_types} cell_types; add types"
            raise ValueError(msg)
        if wanted == "auto" and n_units == n_types > 1:
            logg.warning(
                f"{n_units} groups{where} and as many types: each type is given to one group "
                "(one_to_one=False lifts this)"
            )
        if wanted is True or (wanted == "auto" and n_units == n_types):
            found.append(sample)
    return tuple(found)


def _mask_mark(mask: Any) -> dict[str, Any]:
    """Return what an array of genes can be told by."""
    kept = np.asarray(mask, dtype=bool)
    return {"kept": int(kept.sum()), "of": len(kept), "sha256": hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()}


def provenance(given: Mapping[str, Any], prepared: Prepared, about: Mapping[str, str]) -> dict[str, Any]:
    """Return what is needed to repeat the run, and no secret."""
    import scverse_plugin

    left_out = {"adata", "reference", "engine", "model", "engine_options", "base_url", "rng", "progress", "copy"}
    left_out |= {"dry_run", "mask_var", "cell_types", "cache", "context_keys", "groups"}
    found = {name: value for name, value in given.items() if name not in left_out}
    mask, keys = given["mask_var"], given["context_keys"]
    found |= {
        "tool": _store.TOOL,
        "cell_types": {donor: list(types) for donor, types in prepared.lists.of.items()},
        "decoys": list(prepared.lists.decoys),
        "exclude_genes": list(given["exclude_genes"]),
        "groups": None if given["groups"] is None else [str(name) for name in given["groups"]],
        "mask_var": mask if mask is None or isinstance(mask, str) else _mask_mark(mask),
        "context_keys": dict(keys) if isinstance(keys, Mapping) else list(prepared.context.keys),
        "context": given["context"] if not isinstance(given["context"], Mapping) else dict(given["context"]),
        "puzzle_size": max(prepared.size.values()),
        "one_to_one": bool(prepared.one_to_one),
        "matrix": prepared.matrix,
        "seed": prepared.seed,
        # Texts may be keys and addresses; numbers are not.
        "engine_options": {
            name: value
            for name, value in (given["engine_options"] or {}).items()
            if isinstance(value, bool | int | float) or name == "dtype"
        },
        "version": scverse_plugin.__version__,
        **package_versions(("scanpy", "anndata")),
        **about,
    }
    return found
