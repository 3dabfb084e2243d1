"""``tl.annotate``: the thin layer between an AnnData object and the method."""

from __future__ import annotations

import copy as copies
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.engines.protocol import Engine
from recipe.cello1.task.prompt import Evidence, Layout, annotation_messages
from recipe.cello1.task.text import visible
from scverse_plugin.adata import _store
from scverse_plugin.adata._types import CellTypes
from scverse_plugin.method._ask import Cache
from scverse_plugin.method._calibrate import apply
from scverse_plugin.method._false import FalseRate
from scverse_plugin.method._plan import LARGEST_LIST
from scverse_plugin.method._solve import final_rounds, screening
from scverse_plugin.method._tally import call, check_cells, decoy_rate, position_bias, together
from scverse_plugin.tl._back_off import back_off
from scverse_plugin.tl._before import Prompts, address, announce, is_here, journal, tell
from scverse_plugin.tl._free import dispatch
from scverse_plugin.tl._models import Answers, about_all, ask_each, wording
from scverse_plugin.tl._ontology import ontology_tables
from scverse_plugin.tl._options import Options, Price
from scverse_plugin.tl._prepare import Prepared, prepare, provenance

ENOUGH = 500  # prompts to estimate the length of all from


def annotate(
    adata: AnnData,
    cell_types: CellTypes | None = None,
    *,
    groupby: str | None = None,
    groups: Iterable[str] | None = None,
    tissue: str | None = None,
    organism: str | None = None,
    evidence: Evidence = "cells",
    refine: str | None = None,
    sample_key: str | None = None,
    reference: AnnData | None = None,
    context: str | Mapping[str, str] | None = "auto",
    context_keys: Sequence[str] | Mapping[str, Any] | None = None,
    layer: str | None = None,
    use_raw: bool | None = None,
    gene_symbols: str | None = None,
    mask_var: str | np.ndarray | None = None,
    n_top_genes: int = 50,
    rank_by: Literal["expression", "specificity"] = "expression",
    exclude_genes: Sequence[str] = (),
    cells_per_group: int = 5,
    cell_choice: Literal["random", "representative"] = "random",
    n_votes: int = 10,
    puzzle_size: int | None = None,
    n_candidates: int = LARGEST_LIST,
    shuffle_candidates: bool = False,
    decoys: Iterable[str] = (),
    one_to_one: bool | Literal["auto"] = False,
    support: Literal["auto", "votes", "readout"] = "auto",
    min_support: float = 0.5,
    max_false: float | None = None,
    back_off: bool = False,
    calibration: Mapping[str, Any] | None = None,
    unassigned: str = "Unassigned",
    model: str | Path | Sequence[str | Path] | None = None,
    engine: str | Engine | Sequence[str | Engine] = "vllm",
    base_url: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    prompt_layout: Layout = "system",
    constrained: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 2048,
    reasoning_budget: int | None = None,
    max_concurrency: int | None = None,
    max_puzzles: int | None = None,
    price_per_million_tokens: Price | None = None,
    cache: str | Path | None = "auto",
    on_error: Literal["raise", "skip"] = "raise",
    store_reasoning: bool = True,
    dry_run: bool = False,
    rng: int | np.random.Generator = 0,
    progress: bool = True,
    key_added: str = "cello1",
    copy: bool = False,
) -> AnnData | Prompts | None:
    """Label groups of cells, or single cells, with a model that solves cell puzzles.

    In each round one cell of every group is drawn, the cells are dealt into puzzles of one donor each, and the model
    matches the cells of a puzzle with candidate types, one to one. Over ``n_votes`` rounds cells, company, order and
    (where not all fit) candidates change. A group's support for a type is the share of the puzzles with both in them
    in which the type was chosen for the group.

    Parameters
    ----------
    adata
        Annotated data.
    cell_types
        The types that the cells may be: a list (or set, array, ...), a mapping of samples to lists (needs
        ``sample_key``; each sample of a group then gets a label of its own), or the name of an ``obs`` column with
        types (of ``reference``, if given). What names no type ("unknown", NaN) is left out. ``None``, with ``tissue``:
        the model names the types itself. In an open-ended round it says what each group is; names that the Cell
        Ontology has (as label or synonym) become the candidates, the others are kept as text in
        ``uns[key_added]["names"]`` and counted. Needs the ``[ontology]`` extra and ``groupby``.
    groupby
        Column of ``obs``, categorical or of texts, whose groups are labelled; cells without a group ("unknown", NaN)
        get no label. ``None`` labels every cell by itself, which takes up to ``n_votes`` puzzles for each; more than
        1,000 are asked only if ``max_puzzles`` allows them.
    groups
        The groups to label; all by default. Other cells get no value.
    tissue
        Where the cells are from, in a word or two; for ``cell_types=None``. It is told to the model, wherever it runs.
    organism
        The species, ``"human"`` or ``"mouse"`` for example; told to the model with ``tissue``. The listed symbols are
        checked against its way to write them: upper-case symbols of a mouse are listed as a mouse's (``CD3E`` as
        ``Cd3e``), a mouse's symbols with ``organism="human"`` are refused. Without it, symbols are listed as they are;
        names that are no symbols are refused, and symbols of two species, or in lower case, warned about, all the same.
    evidence
        What the open-ended round shows: ``"cells"``, one cell of each group, or ``"markers"``, the genes that are most
        specific to each group among its cells.
    refine
        A label of the run ``key_added``, ``"T cell"`` for example: its cells are asked about again, with the terms
        below it in the Cell Ontology as candidates (or ``cell_types``, if given). The run is stored as
        ``key_added + "_T_cell"``; in ``obs[key_added]`` and its support only cells with enough support for a finer
        label change.
    sample_key
        Column of ``obs`` with the donor (or sample). No puzzle has cells of two.
    reference
        The object that has the column named by ``cell_types``.
    context
        What is known of the donor, one line of sentences, or one for each sample. ``"auto"`` makes it from columns of
        ``obs`` where the model runs on this machine; to a server elsewhere no donor metadata are sent, unless
        ``context_keys`` names them. ``None`` sends none anywhere.
    context_keys
        Columns of ``obs`` that the sentences are made from, or a mapping of columns to sentences with ``{value}``. By
        default the CELLxGENE columns that ``obs`` has (``sex``, ``development_stage``, ``self_reported_ethnicity``,
        ``tissue``, ``disease``). A column in which the cells of a puzzle differ is left out of it.
    layer
        Layer to take the expression from.
    use_raw
        Whether to take it from ``adata.raw``. By default it is, if there is one and no ``layer`` is given.
    gene_symbols
        Column of ``var`` with the gene symbols; ``var_names`` by default.
    mask_var
        Boolean column of ``var`` (or array): the genes that may be listed.
    n_top_genes
        Genes listed for each cell: as many as in the puzzles that the model was trained on.
    rank_by
        ``"expression"``, or ``"specificity"`` (expression against the mean of the drawn cells).
    exclude_genes
        Regular expressions of symbols not to list, without regard to case; ``"housekeeping"`` names a built-in set.
    cells_per_group
        Cells drawn to stand for a group. With fewer than ``n_votes``, each is asked about more than once, which shows
        whether a group's cells differ from each other.
    cell_choice
        ``"random"``, or ``"representative"``: of 50 random cells those most like their mean.
    n_votes
        Rounds: each group is in at least so many puzzles. With greedy decoding nothing is asked twice: what would
        repeat an earlier puzzle shows its candidates in another order, and where there is no other it is left out, so
        that a group may have fewer votes.
    puzzle_size
        Most cells in a puzzle. By default 8 at most, half the number of types if there are more groups than types, and
        1 with ``groupby=None``, since cells of a puzzle are taken to be of different types. If it is ``n_candidates``,
        with enough groups and no decoys every puzzle has so many: a few left over are asked with cells of others.
    n_candidates
        Most types shown in a puzzle. If there are more, a screening in which each group meets every type at least
        three times comes first, and the types that lead there are shown afterwards.
    shuffle_candidates
        Whether to show them in random order; models are trained on sorted ones.
    decoys
        Types that these cells cannot be. How often they are chosen estimates how often any wrong type is.
    one_to_one
        Whether no type may be given to two groups (of a sample). Off unless asked, ``"auto"`` included: that there are
        as many groups as types may be chance. Within a puzzle it always holds.
    support
        What support is made of. ``"votes"``: the model's answers. ``"readout"``: its probabilities of the candidates,
        read where it decides on a cell, which needs an engine that gives them (vLLM, transformers): with each cell in
        turn at the front of the puzzle, if the model's traces go cell by cell as those of the recipe do, else in its
        answer behind its reasoning. ``"auto"``: the read-out where the engine can, else votes. ``uns`` says which.
    min_support
        Groups with less support get the label ``unassigned``. Not used with ``max_false``.
    max_false
        Share of false labels that is accepted, 0.05 for example: instead of ``min_support``, the lowest support is
        required at which no more of the labels are expected to be false, judged by ``decoys``, which it needs.
    back_off
        Whether a group that two close types share gets their nearest common ancestor in the Cell Ontology for a label,
        if both together have the support that one alone lacks. The ancestor is at most four steps above either, and
        stands for at most 400 terms of one lineage: "lymphocyte" is a label, "leukocyte" is none.
    calibration
        What :func:`calibrate` has stored with a labelled object (``labelled.uns["cello1"]["calibration"]``), from the
        same model: support becomes the chance of being right.
    unassigned
        Label of groups without one.
    model
        Folder of the model, or its name on the server. A list: each is asked the same, one after the other, and their
        votes are added up; only one is in memory at a time.
    engine
        ``"vllm"`` (in this process), ``"openai"`` (a server with an OpenAI-compatible API, its key in the environment
        variable ``OPENAI_API_KEY``), ``"transformers"``, or a :class:`recipe.cello1.engines.protocol.Engine`. A
        list of these goes with a list of models, or asks engine objects one after the other.
    base_url
        Address of the server, ``http://127.0.0.1:8000/v1`` for example; of several engines, of the servers among them.
    engine_options
        Further options of the engine, ``{"max_model_len": 8192}`` for example.
    prompt_layout
        Layout that the model was trained with.
    constrained
        Whether the decoder is held to legal answers; ignored for engine objects that cannot, and always so for a
        read-out where the engine can.
    temperature, top_p, max_tokens, reasoning_budget
        Sampling options; greedy by default.
    max_concurrency
        Puzzles under way at a time.
    max_puzzles
        Most puzzles to ask; a run that needs more is refused before it starts.
    price_per_million_tokens
        What the server charges, one number, or two (prompt, answer): the most that the run can cost is said first.
    cache
        A ``.jsonl`` file in which responses are kept as they come in. A repeated or interrupted call asks only what
        is not in it. ``"auto"``: one for each model in the user's cache folder, said before anything is asked
        (``~/.cache/cello1``, or what the platform has for it); ``None``: nothing is kept. An engine object that is
        none of this package's has no file by itself. Of several models each has a file of its own.
    on_error
        ``"raise"``, or ``"skip"`` to go on without the puzzles (of several models: without the models) that the engine
        failed on. A response that makes no sense is no such failure: it gives no vote, and is counted. If none of the
        first 20 makes sense, the run stops, unless it is ``"skip"``.
    store_reasoning
        Whether to keep puzzle texts and reasoning in ``uns``.
    dry_run
        Return the prompts (chat messages) without starting an engine or changing ``adata``: a list, which has
        ``n_puzzles``, ``prompt_tokens`` (estimated), ``max_answer_tokens`` and ``max_price``, too.
    rng
        Seed, or generator.
    progress
        Whether to show a progress bar, and before it what is asked and sent where (else logged as info).
    key_added
        Name under which results are stored.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    ``None``, a changed copy with ``copy=True``, or the prompts with ``dry_run=True``. Sets the following fields:

    ``adata.obs[key_added]`` : :class:`pandas.Series` (dtype ``category``)
        Label of each cell. Missing for cells outside ``groups``.
    ``adata.obs[key_added + "_support"]`` : :class:`pandas.Series` (dtype ``float32``)
        Support of the group's best type, or of the ancestor that it is backed off to, 0 to 1.
    ``adata.obsm[key_added + "_votes"]`` : :class:`numpy.ndarray` (shape ``(n_obs, n_types)``, dtype ``float32``)
        Support for every type; the columns are ``uns[key_added]["types"]``, decoys last.
    ``adata.uns[key_added]["columns"]`` : :class:`numpy.ndarray`
        Columns of ``obs`` and ``obsm`` that are written: a further run replaces these and no others.
    ``adata.uns[key_added]["params"]`` : :class:`dict`
        All parameters, model and its fingerprint, seed, versions. No keys, no password.
    ``adata.uns[key_added]["groups"]`` : :class:`pandas.DataFrame`
        For each group ``group``, ``sample``, ``label``, ``support``, ``raw_support`` (before calibration), ``best``
        (the label, were there no threshold), ``backed_off_from`` (types whose ancestor the label is),
        ``runner_up``, ``runner_up_support``, ``margin``, ``entropy`` (bits; these before calibration), ``votes``,
        ``puzzles``, ``failures``,
        ``status`` (``ok``, ``backed_off``, ``low_support``, ``tie``, ``decoy``, ``no_votes``), ``n_cells``,
        ``cells_asked``, ``cell_agreement``, ``cell_gap`` and ``mixed`` (the group's cells are clear and differ: a
        mixture). Of several models also ``agreement``, the share of them whose best type it is.
    ``adata.uns[key_added]["models"]`` : :class:`pandas.DataFrame`
        Of several models only: for each model and group ``model``, ``group``, ``sample``, ``best``, ``support``,
        ``votes``, ``status``.
    ``adata.uns[key_added]["traces"]`` : :class:`pandas.DataFrame`
        For each puzzle ``round``, ``screening``, ``sample``, ``groups``, ``cells``, ``candidates``, ``answer`` (JSON
        lists), ``status``, ``finish_reason``, ``tokens``, ``prompt_tokens``, ``seed``, ``cached``, ``error``; with
        ``store_reasoning`` also ``puzzle``, ``reasoning`` and ``response`` (of unreadable answers); of several models
        ``model``.
    ``adata.uns[key_added]["names"]`` : :class:`pandas.DataFrame`
        With ``cell_types=None``: ``group``, ``answer`` (as the model wrote it), ``term``, ``cell_type`` (both empty for
        a name that the Cell Ontology lacks) and ``n``, how often.
    ``adata.uns[key_added]["positions"]`` : :class:`pandas.DataFrame`
        For each position in a puzzle the votes, and how often they are for the group's best type.
    ``adata.uns[key_added]["checks"]`` : :class:`dict`
        ``decoy_rate``, ``position_p_value``, ``n_puzzles``, ``n_failures``, ``n_repeated`` (puzzles whose
        answer names a type twice: they count only for the groups whose type stands in it once), ``n_errors``.
        With ``max_false`` also ``support_threshold``, and the share of false labels to expect beyond it,
        ``false_rate``, with its 95% interval, ``false_rate_low`` and ``false_rate_high``.

    Raises
    ------
    ValueError
        If a parameter or the data cannot be used; the message names the parameter, what came, and the remedy.
    FileNotFoundError
        If there is no such model folder.
    recipe.cello1.engines.protocol.EngineError
        If the engine cannot be started or, with ``on_error="raise"``, fails on a puzzle.

    Examples
    --------
    >>> import scanpy as sc, scverse_plugin
    >>> sc.tl.cello1_annotate(adata, ["B cell", "NK cell"], groupby="leiden", model="MODEL")  # doctest: +SKIP
    """
    given = dict(locals())
    _store.check_object(given.pop("adata"))
    return dispatch(adata, Options(**given), _run)


def _run(adata: AnnData, options: Options, prepared: Prepared | None = None) -> AnnData | Prompts | None:
    start = logg.info("annotating with cello1")
    each = options.each()
    if not options.dry_run:
        _store.check_free(adata, options.key_added)
        _store.check_writable(adata, copy=options.copy)
        if options.back_off:
            ontology_tables()
    places = [None if options.dry_run else journal(one) for one in each]
    kept = [None if place is None else Cache(place) for place in places]
    prepared = prepared or prepare(adata, options, here=all(is_here(address(one)) for one in each))
    if len(prepared.lists.types) + len(prepared.lists.decoys) == 1:
        logg.warning(
            f"cell_types: {prepared.lists.types[0]!r} is the only candidate, so every group gets it, and support says "
            "nothing; add the other types that there may be, or decoys"
        )
    prompts = _prompts(prepared, options, len(each))
    prompts.check(options.max_puzzles)
    if options.dry_run:
        return prompts
    announce(prompts, options, prepared.context.keys, kept)
    del prompts
    if options.copy:
        adata = adata.copy()
    table = _write(adata, prepared, options, ask_each(prepared, each, kept))
    _warn(table, prepared, options, adata.uns[options.key_added])
    key = options.key_added
    logg.info(
        "    finished",
        time=start,
        deep=(
            f"added\n    {key!r}, labels (adata.obs, categorical)\n"
            f"    {key + _store.SUPPORT!r}, support of the labels (adata.obs)\n"
            f"    {key + _store.VOTES!r}, support for every type (adata.obsm)\n"
            f"    {key!r}, parameters, groups and traces (adata.uns)"
        ),
    )
    return adata if options.copy else None


def _prompts(prepared: Prepared, options: Options, n_models: int) -> Prompts:
    """Draw the puzzles as the run will; which types lead after a screening is not known yet."""
    rng, units, lists, size = copies.deepcopy(prepared.rng), prepared.units, prepared.lists, prepared.size
    drafts = screening(units, lists, size, rng)
    drafts += final_rounds(units, lists, size, options.n_votes, rng, wording=wording(prepared, options))
    shown = drafts if options.dry_run else drafts[:: -(-len(drafts) // ENOUGH)]
    found = [annotation_messages(prepared.puzzle(draft), options.prompt_layout) for draft in shown]
    return Prompts(found, options, len(drafts) * n_models)


def _write(adata: AnnData, prepared: Prepared, options: Options, answers: Sequence[Answers]) -> pd.DataFrame:
    """Decide on the labels and write everything; returns the table of the groups."""
    decide = partial(
        call, allowed=prepared.allowed, samples=[u.sample for u in prepared.units], one_to_one=prepared.one_to_one
    )
    tally = together([answer.solved.tally for answer in answers])
    calibrated = np.asarray if options.calibration is None else partial(apply, options.calibration)
    decide = partial(decide, min_support=options.min_support, max_false=options.max_false, adjust=calibrated)
    calls = decide(tally)
    checks = check_cells(tally, calls.best)
    bias = position_bias(tally, calls.best)
    sizes = np.bincount(prepared.unit_of[prepared.unit_of >= 0], minlength=len(prepared.units))
    table = _store.groups_table(prepared.units, tally, calls, checks, sizes, options.unassigned)
    if options.back_off:
        back_off(table, tally, prepared.allowed, calls.threshold, calibrated)
    replies = [reply for answer in answers for reply in answer.solved.replies]
    several = {}
    if options.several:
        own = [decide(answer.solved.tally) for answer in answers]
        table["agreement"] = np.mean([(found.best == calls.best) & (calls.best >= 0) for found in own], axis=0)
        tables = [
            _store.model_table(a.name, prepared.units, a.solved.tally, c) for a, c in zip(answers, own, strict=True)
        ]
        several["models"] = _store.stacked(tables)
    rest = {
        "params": _store.plain_params(provenance(options, prepared, about_all(answers))),
        "traces": _store.stacked([_traces(adata, prepared, options, answer) for answer in answers]),
        **several,
        "positions": _store.position_table(bias),
        "checks": {
            "decoy_rate": decoy_rate(tally),
            "position_p_value": bias.p_value,
            "n_puzzles": len(replies),
            "n_failures": int(tally.failures.sum()),
            "n_repeated": tally.repeated,
            "n_errors": sum(reply.text is None for reply in replies),
            **({} if calls.false is None else _false_facts(calls.false)),
        },
    }
    labels = table["label"].tolist()
    ancestors = sorted(set(labels) - {*prepared.lists.types, options.unassigned})
    _store.write(
        adata,
        options.key_added,
        unit_of=prepared.unit_of,
        groups=table,
        rates=tally.rates,
        types=tally.types,
        rest=rest,
        categories=[*prepared.lists.types, *ancestors, options.unassigned],
    )
    return table


def _false_facts(false: FalseRate) -> dict[str, float]:
    return {
        "support_threshold": false.threshold,
        "false_rate": false.rate,
        "false_rate_low": false.low,
        "false_rate_high": false.high,
    }


def _traces(adata: AnnData, prepared: Prepared, options: Options, answer: Answers) -> pd.DataFrame:
    reasoning, drafts = options.store_reasoning, answer.solved.drafts
    table = _store.traces_table(
        drafts,
        [prepared.puzzle(draft) for draft in drafts] if reasoning else [],
        answer.solved.replies,
        prepared.units,
        adata.obs_names,
        reasoning=reasoning,
    )
    return table.assign(model=_store.storable(answer.name)) if options.several else table


def _warn(table: pd.DataFrame, prepared: Prepared, options: Options, run: Mapping[str, Any]) -> None:
    """Say what the analyst should look at."""
    checks = run["checks"]
    if prepared.context.differing:
        logg.hint(
            f"left out of the context where cells of a puzzle differ: {', '.join(prepared.context.differing)} "
            "(sample_key keeps donors apart)"
        )
    if not np.isfinite(checks.get("support_threshold", 0.0)):
        logg.warning(
            f"no support is enough for max_false={options.max_false}: "
            f"decoys are chosen in {checks['decoy_rate']:.1%} of the puzzles that show them"
        )
    elif "support_threshold" in checks:
        rate, low, high = (f"{checks[f'false_rate{end}']:.1%}" for end in ("", "_low", "_high"))
        tell(
            f"labels need a support of {checks['support_threshold']:.2f}; expected to be false: {rate} "
            f"(95% interval {low} to {high})",
            options,
        )
    if unread := _store.unreadable(run):
        logg.warning(f"{unread}: see status and response in the traces, or the report")
    if (repeated := checks["n_repeated"]) > 0:
        logg.warning(
            f"{repeated} answers name a type twice: they count only for the groups whose type stands in them once"
        )
    for status, meaning in (
        ("no_votes", "got no usable answer: they are not labelled"),
        ("low_support", "have less support than " + ("max_false asks" if "false_rate" in checks else "min_support")),
        ("backed_off", "are shared by close types: their label is the nearest common ancestor"),
        ("tie", "have two types with the same support"),
        ("decoy", "look most like a decoy: their type may be missing from cell_types"),
    ):
        if names := table.loc[table["status"] == status, "group"].tolist():
            logg.warning(f"{len(names)} of {len(table)} groups ({_some(names)}) {meaning}")
    if names := table.loc[table["mixed"], "group"].tolist():
        logg.warning(f"cells of these groups are clear but differ, as in mixtures and doublets: {_some(names)}")


def _some(names: Sequence[str]) -> str:
    return visible(", ".join(names[:10]) + (", ..." if len(names) > 10 else ""))
