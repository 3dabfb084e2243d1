"""Labels without a list of types: the model names them, or the Cell Ontology gives those below a label."""

from __future__ import annotations

import copy as copies
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.task.answer import parse_answer, text_fault, type_fault
from recipe.cello1.task.gene_names import specificity
from recipe.cello1.task.genes import top_genes
from recipe.cello1.task.ontology import CellOntology
from recipe.cello1.task.prompt import annotation_messages, free_messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import clean_value, shown
from scverse_plugin._files import visible
from scverse_plugin.adata import _store
from scverse_plugin.adata._matrix import mean_profiles
from scverse_plugin.adata._species import check_symbols, of_species
from scverse_plugin.method._ask import Cache, Reply, ask_puzzles, completion_seeds
from scverse_plugin.method._plan import LARGEST_PUZZLE, Draft, Members
from scverse_plugin.method._solve import final_rounds, screening
from scverse_plugin.tl._before import Prompts, address, announce, is_here, journal
from scverse_plugin.tl._ontology import ontology_tables
from scverse_plugin.tl._options import Options
from scverse_plugin.tl._prepare import Prepared, expression_of, prepare, puzzle_sizes

ROUNDS = 3  # in which every group is named
PROFILE_CELLS = 200  # of a group, for its marker genes
_PLACEHOLDER = "cell"  # a type of which every cell is, until others are named
_ROOT = "CL:0000000"
_WIDEST = "CD4-positive, alpha-beta memory T cell {}"  # a name of usual length, to count tokens by

_Result: TypeAlias = AnnData | Prompts | None
Closed: TypeAlias = Callable[..., _Result]  # adata, options, what is prepared


def dispatch(adata: AnnData, options: Options, closed: Closed) -> _Result:
    """Run with candidates, find them first, or take them from the ontology, whatever is asked."""
    if options.tissue is not None and (options.cell_types is not None or options.refine is not None):
        msg = f"tissue={options.tissue!r} goes with cell_types=None (and no refine); leave it out, or the others"
        raise ValueError(msg)
    if options.refine is not None:
        return _refine(adata, options, closed)
    if options.cell_types is None:
        return _free(adata, options, closed)
    return closed(adata, options)


# ------------------------------------------------------------------------------------------------------ finer labels


def _refine(adata: AnnData, options: Options, closed: Closed) -> _Result:
    """Label the cells of one label anew, and put finer labels in their place."""
    key, label = options.key_added, str(options.refine)
    _store.stored(adata, key)
    if key not in adata.obs.columns or key + _store.SUPPORT not in adata.obs.columns:
        msg = f"refine: adata.obs has no column {key!r} or {key + _store.SUPPORT!r} any more; run annotate again"
        raise ValueError(msg)
    labels = adata.obs[key].astype(object)
    inside = (labels == label).to_numpy()
    if not inside.any():
        there = sorted(map(str, labels.dropna().unique()))
        raise ValueError(f"refine: no cell in adata.obs[{key!r}] has the label {label!r}; it has {there}")
    types: Any = options.cell_types
    if types is not None and not isinstance(types, str | Mapping):
        types = list(types)
        if label in types:
            msg = f"refine: cell_types holds {label!r} itself; give only finer types, cells without one keep {label!r}"
            raise ValueError(msg)
    if types is None:
        ontology = ontology_tables()
        term = ontology.find(label)
        if not term:
            raise ValueError(f"refine: {label!r} is no term of the Cell Ontology; pass the finer types as cell_types")
        below = {ontology.label(other) for other in ontology.descendants(term)}
        types = sorted(name for name in below if not type_fault(name) and of_species(name, options.organism))
        if not types:
            msg = f"refine: the Cell Ontology has no term below {label!r}; pass the finer types as cell_types"
            raise ValueError(msg)
    own = f"{key}_{re.sub(r'[^A-Za-z0-9]+', '_', label).strip('_')}"
    # Cells without a finer label keep the one they have.
    run = replace(options, cell_types=types, key_added=own, unassigned=label, within=inside)
    found = closed(adata, run)
    if options.dry_run:
        return found
    target = found if isinstance(found, AnnData) else adata
    _put(target, key, own, label)
    return found


def _put(adata: AnnData, key: str, own: str, label: str) -> None:
    """Write the finer labels of a run of its own over those of the run it refines."""
    finer = adata.obs[own].astype(object)
    changed = finer.notna() & (finer != label)
    labels = adata.obs[key].astype(object).where(~changed, finer)
    support = adata.obs[key + _store.SUPPORT].where(~changed, adata.obs[own + _store.SUPPORT])
    used = set(labels.dropna())
    named = [*adata.obs[key].astype("category").cat.categories, *adata.obs[own].cat.categories]
    categories = [name for name in dict.fromkeys(named) if name in used]
    adata.obs[key] = pd.Series(pd.Categorical(labels, categories=categories), index=adata.obs.index)
    adata.obs[key + _store.SUPPORT] = support.astype(np.float32)
    ids = key + _store.ONTOLOGY
    if ids in _store.columns_of(adata, key) and ids in adata.obs.columns:  # they are those of the labels before
        del adata.obs[ids]
        adata.uns.pop(f"{ids}_colors", None)
    adata.uns.pop(f"{key}_colors", None)
    logg.info(f"refined {label!r} in adata.obs[{key!r}]: {int(changed.sum())} cells have a finer label")


# ----------------------------------------------------------------------------------------------- types that are named


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """The open-ended round."""

    prepared: Prepared
    options: Options
    # Listed genes of each unit; None where its cells are shown
    markers: list[tuple[str, ...]] | None
    drafts: list[Draft]

    def puzzle(self, draft: Draft) -> Puzzle:
        """Fill a draft in; what is told of the cells stands before the donor's metadata."""
        listed = self.prepared.genes
        genes = (
            [listed[row] for row in draft.cells] if self.markers is None else [self.markers[i] for i in draft.members]
        )
        named = " ".join(clean_value(text) for text in (self.options.organism, self.options.tissue) if text)
        context = f"The cells are from {named}. {self.prepared.context(draft.donor, draft.cells)}".strip()
        return Puzzle(tuple(genes), (), None, context)

    def messages(self) -> list[list[dict[str, str]]]:
        write = partial(free_messages, evidence=self.options.evidence)
        return [write(self.puzzle(draft), self.options.prompt_layout) for draft in self.drafts]


def _free(adata: AnnData, options: Options, closed: Closed) -> _Result:
    """Have the types named, and ask with them as candidates."""
    _check(options)
    place = None
    if not options.dry_run:
        _store.check_free(adata, options.key_added)
        _store.check_writable(adata, copy=options.copy)
        place = journal(options)
    kept = None if place is None else Cache(place)
    ontology = None if options.dry_run else ontology_tables()
    if ontology is not None and ontology.find(options.unassigned):
        msg = f"unassigned={options.unassigned!r} is a cell type, which the model may name; choose another name"
        raise ValueError(msg)
    prepared = prepare(adata, replace(options, cell_types=[_PLACEHOLDER]), here=is_here(address(options)))
    asking = _drawn(adata, prepared, options)
    prompts = _both(asking)
    prompts.check(options.max_puzzles)
    if ontology is None:
        return prompts
    note = (
        f"{len(asking.drafts)} of them open-ended, with the tissue{' and organism' if options.organism else ''}; "
        "the others, at most so many, with the types named there"
    )
    announce(prompts, options, prepared.context.keys, [kept], note)
    with options.opened() as engine:
        replies = ask_puzzles(
            engine,
            [asking.puzzle(draft) for draft in asking.drafts],
            layout=options.prompt_layout,
            sampling=options.sampling(),
            seeds=completion_seeds(len(asking.drafts), prepared.rng),
            constrain=False,
            cache=kept,
            on_error=options.on_error,
            progress=options.progress,
            write=partial(free_messages, evidence=options.evidence),
        )
        table, types = _names(asking, replies, ontology)
        run = replace(
            options,
            cell_types=types,
            engine=engine,
            model=None,
            base_url=None,
            engine_options=None,
            cache=place,
            max_puzzles=None,  # both rounds have been allowed
        )
        found = closed(adata, run, with_types(prepared, run, types))
    target = found if isinstance(found, AnnData) else adata
    target.uns[options.key_added] = {**target.uns[options.key_added], "names": table}
    return found


def _check(options: Options) -> None:
    if options.tissue is None:
        raise ValueError(
            "cell_types is missing; give the types that the cells may be (['B cell', 'T cell']), or tissue='blood' "
            "to have the model name them"
        )
    for name in ("tissue", "organism"):
        value = getattr(options, name)
        if value is not None and (fault := text_fault(value)):
            raise ValueError(f"{name} {fault}, got {value!r}; give a word or two on one line")
    if options.several:
        msg = "model: cell_types=None has one model name the types, got several; pass what one has named as cell_types"
        raise ValueError(msg)
    if options.groupby is None:
        raise ValueError(
            "groupby is missing: without cell_types it is groups that are named; name a column of obs with groups"
        )
    if options.reference is not None:
        raise ValueError("reference is given, but cell_types=None; name the column of reference.obs with the types")
    if options.one_to_one is True:
        raise ValueError("one_to_one=True needs cell_types: the model may name fewer types than there are groups")


def _drawn(adata: AnnData, prepared: Prepared, options: Options) -> _Open:
    """Draw the puzzles of the open-ended round."""
    units, markers = prepared.units, None
    if options.evidence == "markers":
        markers = _markers(adata, prepared, options)
        # A group's markers are those of all its donors.
        units = [replace(unit, donors=("",) * len(unit.cells)) for unit in units]
    size = dict.fromkeys(("", *prepared.lists.of), min(options.puzzle_size or LARGEST_PUZZLE, len(units)))
    members = Members(units, size, copies.deepcopy(prepared.rng))
    drafts = [Draft(number, *found, ()) for number in range(1, ROUNDS + 1) for found in members.round()]
    return _Open(prepared, options, markers, drafts)


def _markers(adata: AnnData, prepared: Prepared, options: Options) -> list[tuple[str, ...]]:
    """List the genes that are most specific to each group among all."""
    source = expression_of(adata, options)
    rng = copies.deepcopy(prepared.rng)
    rows = [np.flatnonzero(prepared.unit_of == i) for i in range(len(prepared.units))]
    chosen = [rng.choice(found, min(PROFILE_CELLS, len(found)), replace=False) for found in rows]
    means = mean_profiles(source, chosen)
    weighed = means * specificity(means.sum(axis=0), len(means))
    listed = dict(enumerate(top_genes(weighed, source.genes.names, options.n_top_genes)))
    return list(check_symbols(listed, options.organism, quiet=True).values())


def _both(asking: _Open) -> Prompts:
    """Count both rounds: the first as it is, the second as many as there can be."""
    options, prepared = asking.options, asking.prepared
    prompts = Prompts(asking.messages(), options, len(asking.drafts))
    most: list[Prompts] = []
    n_units = len(prepared.units)
    # One cell a puzzle, or as many types as can be named, with a screening.
    for n_types in (1, ROUNDS * n_units):
        given = with_types(prepared, options, [_WIDEST.format(i) for i in range(n_types)])
        drafts = screening(given.units, given.lists, given.size, given.rng)
        drafts += final_rounds(given.units, given.lists, given.size, options.n_votes, given.rng)
        some = drafts[:: -(-len(drafts) // 50)]
        texts = [annotation_messages(given.puzzle(draft), options.prompt_layout) for draft in some]
        most.append(Prompts(texts, options, len(drafts)))
    prompts.n_puzzles += max(part.n_puzzles for part in most)
    prompts.prompt_tokens += max(part.prompt_tokens for part in most)
    prompts.max_answer_tokens += max(part.max_answer_tokens for part in most)
    if prompts.max_price is not None:
        prompts.max_price += max(part.max_price or 0.0 for part in most)
    return prompts


def with_types(prepared: Prepared, options: Options, types: Sequence[str]) -> Prepared:
    """Return what is prepared with other candidates for all donors."""
    named = tuple(sorted(types))
    lists = replace(prepared.lists, types=named, of=dict.fromkeys(prepared.lists.of, named))
    return replace(
        prepared,
        lists=lists,
        size=puzzle_sizes(options, prepared.units, lists),
        allowed=np.ones((len(prepared.units), len(named)), dtype=bool),
        rng=copies.deepcopy(prepared.rng),
    )


def _names(asking: _Open, replies: Sequence[Reply], ontology: CellOntology) -> tuple[pd.DataFrame, list[str]]:
    """Count what each group was called, and collect the types that the ontology has."""
    counts: Counter[tuple[int, str]] = Counter()
    unread: list[str] = []
    for draft, reply in zip(asking.drafts, replies, strict=True):
        parsed = parse_answer(reply.text)
        if not parsed.ok or len(parsed.items) != len(draft.members):
            unread.append(shown(reply.text) if reply.text is not None else reply.error)
            continue
        counts.update(zip(draft.members, parsed.items, strict=True))
    rows = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    terms = {name: _term(name, ontology) for _, name in counts}
    called = {name: ontology.label(term) if term else "" for name, term in terms.items()}
    table = pd.DataFrame(
        {
            "group": _objects([asking.prepared.units[unit].group for (unit, _), _ in rows]),
            "answer": _objects([_store.storable(name) for (_, name), _ in rows]),
            "term": _objects([terms[name] for (_, name), _ in rows]),
            "cell_type": _objects([called[name] for (_, name), _ in rows]),
            "n": np.array([n for _, n in rows], dtype=np.int64),
        },
        index=pd.Index([str(i) for i in range(len(rows))], dtype=object),
    )
    if unread:
        logg.warning(
            f"{len(unread)} of {len(replies)} open-ended answers cannot be read: they name no type, or not one "
            f"for each group; the first is {unread[0]}"
        )
    unmapped: Counter[str] = Counter()
    for (_, name), n in counts.items():
        if not terms[name] and clean_value(name):  # "unknown" is no name
            unmapped[name] += n
    if unmapped:
        logg.warning(
            f"{unmapped.total()} answers of the open-ended round name no type that the Cell Ontology has; they become "
            f"no candidates: {_shown(unmapped)}"
        )
    decoys = {name.lower() for name in asking.prepared.lists.decoys}
    found = {name for name in called.values() if name and not type_fault(name)}
    types = sorted(name for name in found if name.lower() not in decoys)
    if not types:
        raise ValueError(
            f"no open-ended answer names a type that the Cell Ontology has ({_shown(unmapped) or 'none can be read'}); "
            "pass the types as cell_types"
        )
    return table, types


def _term(name: str, ontology: CellOntology) -> str:
    """Find the term of a name; the root says no more than "unknown" does."""
    found = ontology.find(name) if clean_value(name) else ""
    return "" if found == _ROOT else found


def _shown(names: Counter[str]) -> str:
    listed = [f"{name!r} ({n})" for name, n in names.most_common(20)]
    return visible(", ".join(listed) + (", ..." if len(names) > 20 else ""))


def _objects(values: Sequence[str]) -> np.ndarray:
    return np.array(list(values), dtype=object)
