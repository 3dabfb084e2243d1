"""The candidate types, from whatever the caller has: a list, one for each sample, or a column of a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.task.answer import check_types
from recipe.cello1.task.text import is_usable, normal_form

CellTypes: TypeAlias = Iterable[str] | Mapping[str, Iterable[str]] | str


def read_types(
    cell_types: CellTypes, adata: AnnData, reference: AnnData | None, samples: Sequence[str] | None
) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Read the candidates."""
    if isinstance(cell_types, Mapping):
        return _by_sample(cell_types, samples), True
    if isinstance(cell_types, str):
        where = "reference" if reference is not None else "adata"
        obs = (reference if reference is not None else adata).obs
        if cell_types not in obs.columns:
            raise ValueError(
                f"cell_types: {where}.obs has no column {cell_types!r}; give a list of types (['B cell', 'T cell']), "
                f"or a column: {list(map(str, obs.columns))}"
            )
        cell_types = obs[cell_types]
    elif reference is not None:
        msg = "reference is given, but cell_types is no column name; name the column of reference.obs with the types"
        raise ValueError(msg)
    if getattr(cell_types, "ndim", 0) == 1:  # a column, or its values: of pandas, or numpy
        columns: Any = cell_types
        cell_types = list(dict.fromkeys(map(str, columns.tolist())))
    types = checked_types(cell_types, "cell_types")
    return dict.fromkeys(samples if samples is not None else ("",), types), False


def _by_sample(cell_types: Mapping[Any, Any], samples: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    if samples is None:
        msg = f"cell_types maps samples to lists ({', '.join(map(str, cell_types))}), which needs sample_key"
        raise ValueError(msg)
    named = {str(sample): types for sample, types in cell_types.items()}
    if lacking := [sample for sample in samples if sample not in named]:
        raise ValueError(f"cell_types has no list for the samples {lacking}; give one for each sample")
    return {sample: checked_types(named[sample], f"cell_types[{sample!r}]") for sample in samples}


def checked_types(types: Any, name: str) -> tuple[str, ...]:
    """Check types; a name that says nothing ("unknown", NaN) is none, and is left out."""
    if isinstance(types, str | bytes) or not isinstance(types, Iterable):
        raise ValueError(f"{name} must be a list of types (['B cell', 'T cell']), got {type(types).__name__}")
    given = list(types)
    found = [label for label in given if is_usable(label)]
    if not found:
        what = f"{name} has no types, only {given}" if given else f"{name} is empty"
        raise ValueError(f"{what}; give the types that the cells may be, ['B cell', 'T cell'] for example")
    check_types(name, found)
    found = list(map(normal_form, found))
    if hidden := [label for label in found if not label.isprintable()]:
        msg = f"{name}: the type {hidden[0]!r} has a character that cannot be seen (NUL, tab, ...); rename it"
        raise ValueError(msg)
    if nothing := [label for label in dict.fromkeys(map(str, given)) if not is_usable(label)]:
        logg.warning(f"{name}: left out entries that name no type: {', '.join(map(repr, nothing))}")
    return tuple(sorted(found))


def check_decoys(decoys: Iterable[str], types: Sequence[str], unassigned: str) -> tuple[str, ...]:
    """Check the decoys, and that no type is called like the mark for cells without a label."""
    if not isinstance(unassigned, str) or not unassigned.strip():
        raise ValueError(f"unassigned must be a name, got {unassigned!r}; 'Unassigned' for example")
    decoys = decoys if isinstance(decoys, str) or not isinstance(decoys, Iterable) else list(decoys)
    found = () if decoys == [] else checked_types(decoys, "decoys")
    if both := sorted({name.lower() for name in found} & {name.lower() for name in types}):
        raise ValueError(f"decoys: {both} are candidates, too; decoys are types that these cells cannot be")
    if unassigned.lower() in {name.lower() for name in (*types, *found)}:
        raise ValueError(f"unassigned={unassigned!r} is one of the cell types; choose another name")
    return found
