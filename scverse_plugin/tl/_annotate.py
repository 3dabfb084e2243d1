"""``tl.annotate``: the thin layer between an AnnData object and the method."""

from __future__ import annotations

import copy as copies
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.engines.protocol import Engine
from recipe.cello1.task.prompt import Layout, annotation_messages
from recipe.cello1.task.text import visible
from scverse_plugin.adata import _store
from scverse_plugin.adata._types import CellTypes
from scverse_plugin.method._ask import Cache, Reply, ask, completion_seeds
from scverse_plugin.method._engines import engine_version, opened, public_address
from scverse_plugin.method._plan import LARGEST_LIST, Draft
from scverse_plugin.method._solve import Solved, final_rounds, screening, solve
from scverse_plugin.method._tally import Tally, call, check_cells, decoy_rate, position_bias
from scverse_plugin.tl._before import Prompts, address, announce, is_here, journal
from scverse_plugin.tl._options import Options, Price
from scverse_plugin.tl._prepare import Prepared, prepare, provenance

ENOUGH = 500  # prompts to estimate the length of all from


def annotate(
    adata: AnnData,
    cell_types: CellTypes,
    *,
    groupby: str | None = None,
    groups: Iterable[str] | None = None,
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
    min_support: float = 0.5,
    unassigned: str = "Unassigned",
    model: str | Path | None = None,
    engine: str | Engine = "vllm",
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
        types (of ``reference``, if given). What names no type ("unknown", NaN) is left out.
    groupby
        Column of ``obs``, categorical or of texts, whose groups are labelled; cells without a group ("unknown", NaN)
        get no label. ``None`` labels every cell by itself, which takes up to ``n_votes`` puzzles for each; more than
        1,000 are asked only if ``max_puzzles`` allows them.
    groups
        The groups to label; all by default. Other cells get no value.
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
        1 with ``groupby=None``, since cells of a puzzle are taken to be of different types.
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
    min_support
        Groups with less support get the label ``unassigned``.
    unassigned
        Label of groups without one.
    model
        Folder of the model, or its name on the server.
    engine
        ``"vllm"`` (in this process), ``"openai"`` (a server with an OpenAI-compatible API, its key in the environment
        variable ``OPENAI_API_KEY``), ``"transformers"``, or a :class:`recipe.cello1.engines.protocol.Engine`.
    base_url
        Address of the server, ``http://127.0.0.1:8000/v1`` for example.
    engine_options
        Further options of the engine, ``{"max_model_len": 8192}`` for example.
    prompt_layout
        Layout that the model was trained with.
    constrained
        Whether the decoder is held to legal answers; ignored for engine objects that cannot.
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
        none of this package's has no file by itself.
    on_error
        ``"raise"``, or ``"skip"`` to go on without the puzzles that the engine failed on. A response that makes no
        sense is no such failure: it gives no vote, and is counted.
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
        Support of the group's best type, 0 to 1.
    ``adata.obsm[key_added + "_votes"]`` : :class:`numpy.ndarray` (shape ``(n_obs, n_types)``, dtype ``float32``)
        Support for every type; the columns are ``uns[key_added]["types"]``, decoys last.
    ``adata.uns[key_added]["columns"]`` : :class:`numpy.ndarray`
        Columns of ``obs`` and ``obsm`` that are written: a further run replaces these and no others.
    ``adata.uns[key_added]["params"]`` : :class:`dict`
        All parameters, model and its fingerprint, seed, versions. No keys, no password.
    ``adata.uns[key_added]["groups"]`` : :class:`pandas.DataFrame`
        For each group ``group``, ``sample``, ``label``, ``support``, ``best`` (the label, were there no threshold),
        ``runner_up``, ``runner_up_support``, ``margin``, ``entropy`` (bits), ``votes``, ``puzzles``, ``failures``,
        ``status`` (``ok``, ``low_support``, ``tie``, ``decoy``, ``no_votes``), ``n_cells``, ``cells_asked``,
        ``cell_agreement``, ``cell_gap`` and ``mixed`` (the group's cells are clear and differ: a mixture).
    ``adata.uns[key_added]["traces"]`` : :class:`pandas.DataFrame`
        For each puzzle ``round``, ``screening``, ``sample``, ``groups``, ``cells``, ``candidates``, ``answer`` (JSON
        lists), ``status``, ``finish_reason``, ``tokens``, ``prompt_tokens``, ``seed``, ``cached``, ``error``; with
        ``store_reasoning`` also ``puzzle``, ``reasoning`` and ``response`` (of unreadable answers).
    ``adata.uns[key_added]["positions"]`` : :class:`pandas.DataFrame`
        For each position in a puzzle the votes, and how often they are for the group's best type.
    ``adata.uns[key_added]["checks"]`` : :class:`dict`
        ``decoy_rate``, ``position_p_value``, ``n_puzzles``, ``n_failures``, ``n_repeated`` (puzzles whose
        answer names a type twice: they count only for the groups whose type stands in it once), ``n_errors``.

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
    return _run(adata, Options(**given))


def _run(adata: AnnData, options: Options) -> AnnData | Prompts | None:
    start = logg.info("annotating with cello1")
    if not options.dry_run:
        _store.check_free(adata, options.key_added)
        _store.check_writable(adata, copy=options.copy)
    place = None if options.dry_run else journal(options)
    kept = None if place is None else Cache(place)
    prepared = prepare(adata, options, here=is_here(address(options)))
    prompts = _prompts(prepared, options)
    prompts.check(options.max_puzzles)
    if options.dry_run:
        return prompts
    announce(prompts, options, prepared.context.keys, place)
    del prompts
    if options.copy:
        adata = adata.copy()
    solved, about = _ask(prepared, options, kept)
    table = _write(adata, prepared, options, solved, about)
    _warn(table, prepared, solved.tally)
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


def _wording(prepared: Prepared, options: Options) -> Any:
    """Return what tells equal questions; sampling answers the same question anew."""
    return None if options.temperature > 0 else prepared.puzzle


def _prompts(prepared: Prepared, options: Options) -> Prompts:
    """Draw the puzzles as the run will; which types lead after a screening is not known yet."""
    rng, units, lists, size = copies.deepcopy(prepared.rng), prepared.units, prepared.lists, prepared.size
    drafts = screening(units, lists, size, rng)
    drafts += final_rounds(units, lists, size, options.n_votes, rng, wording=_wording(prepared, options))
    shown = drafts if options.dry_run else drafts[:: -(-len(drafts) // ENOUGH)]
    found = [annotation_messages(prepared.puzzle(draft), options.prompt_layout) for draft in shown]
    return Prompts(found, options, len(drafts))


def _ask(prepared: Prepared, options: Options, kept: Cache | None) -> tuple[Solved, dict[str, str]]:
    """Ask all rounds; returns what came out, and what there is to say of the engine."""
    with opened(
        options.engine,
        options.model,
        base_url=options.base_url,
        constrained=options.constrained,
        max_concurrency=options.max_concurrency,
        options=options.engine_options,
    ) as running:
        constrain = options.constrained and bool(running.constraint)

        def put(drafts: Sequence[Draft]) -> list[Reply]:
            return ask(
                running,
                [prepared.puzzle(draft) for draft in drafts],
                layout=options.prompt_layout,
                sampling=options.sampling(),
                seeds=completion_seeds(len(drafts), prepared.rng),
                constrain=constrain,
                cache=kept,
                on_error=options.on_error,
                progress=options.progress,
            )

        wording = _wording(prepared, options)
        solved = solve(prepared.units, prepared.lists, prepared.size, options.n_votes, put, prepared.rng, wording)
        return solved, {
            "engine": running.name,
            "engine_version": engine_version(running),
            "base_url": public_address(getattr(running, "base_url", None)),  # it may come from the environment
            "model": running.model,
            "fingerprint": running.fingerprint,
            "constraint": running.constraint if constrain else "",
        }


def _write(
    adata: AnnData, prepared: Prepared, options: Options, solved: Solved, about: Mapping[str, str]
) -> pd.DataFrame:
    """Decide on the labels and write everything; returns the table of the groups."""
    tally = solved.tally
    samples = [unit.sample for unit in prepared.units]
    calls = call(
        tally, prepared.allowed, samples=samples, one_to_one=prepared.one_to_one, min_support=options.min_support
    )
    checks = check_cells(tally, calls.best)
    bias = position_bias(tally, calls.best)
    sizes = np.bincount(prepared.unit_of[prepared.unit_of >= 0], minlength=len(prepared.units))
    table = _store.groups_table(prepared.units, tally, calls, checks, sizes, options.unassigned)
    reasoning = options.store_reasoning
    rest = {
        "params": _store.plain_params(provenance(options, prepared, about)),
        "traces": _store.traces_table(
            solved.drafts,
            [prepared.puzzle(draft) for draft in solved.drafts] if reasoning else [],
            solved.replies,
            prepared.units,
            adata.obs_names,
            reasoning=reasoning,
        ),
        "positions": _store.position_table(bias),
        "checks": {
            "decoy_rate": decoy_rate(tally),
            "position_p_value": bias.p_value,
            "n_puzzles": len(solved.replies),
            "n_failures": int(tally.failures.sum()),
            "n_repeated": tally.repeated,
            "n_errors": sum(reply.text is None for reply in solved.replies),
        },
    }
    _store.write(
        adata,
        options.key_added,
        unit_of=prepared.unit_of,
        groups=table,
        rates=tally.rates,
        types=tally.types,
        rest=rest,
        categories=[*prepared.lists.types, options.unassigned],
    )
    return table


def _warn(table: pd.DataFrame, prepared: Prepared, tally: Tally) -> None:
    """Say what the analyst should look at."""
    if prepared.context.differing:
        logg.hint(
            f"left out of the context where cells of a puzzle differ: {', '.join(prepared.context.differing)} "
            "(sample_key keeps donors apart)"
        )
    if tally.repeated:
        logg.warning(
            f"{tally.repeated} answers name a type twice: they count only for the groups whose type stands in them once"
        )
    for status, meaning in (
        ("no_votes", "got no usable answer: they are not labelled"),
        ("low_support", "have less support than min_support"),
        ("tie", "have two types with the same support"),
        ("decoy", "look most like a decoy: their type may be missing from cell_types"),
    ):
        if names := table.loc[table["status"] == status, "group"].tolist():
            logg.warning(f"{len(names)} of {len(table)} groups {meaning}: {_some(names)}")
    if names := table.loc[table["mixed"], "group"].tolist():
        logg.warning(f"cells of these groups are clear but differ, as in mixtures and doublets: {_some(names)}")


def _some(names: Sequence[str]) -> str:
    return visible(", ".join(names[:10]) + (", ..." if len(names) > 10 else ""))
