"""``tl.annotate``: the thin layer between an AnnData object and the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from recipe.cello1.engines.protocol import Engine, Sampling
from recipe.cello1.task.prompt import Layout, Variant, messages
from scverse_plugin.adata import _store
from scverse_plugin.adata._types import CellTypes
from scverse_plugin.method._ask import Cache, Reply, ask, completion_seeds
from scverse_plugin.method._engines import check_engine, engine_version, opened, public_address
from scverse_plugin.method._plan import LARGEST_LIST, Draft
from scverse_plugin.method._solve import final_rounds, screening, solve
from scverse_plugin.method._tally import Tally, call, check_cells, decoy_rate, position_bias
from scverse_plugin.tl._prepare import Prepared, check_options, prepare, provenance

Prompts = list[list[dict[str, str]]]
VARIANT: Variant = "batch"  # also for a cell alone: it is the task that models are trained on


def annotate(
    adata: AnnData,
    cell_types: CellTypes,
    *,
    groupby: str | None = None,
    groups: Sequence[str] | None = None,
    sample_key: str | None = None,
    reference: AnnData | None = None,
    context: str | Mapping[str, str] | None = None,
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
    decoys: Sequence[str] = (),
    one_to_one: bool | Literal["auto"] = "auto",
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
    cache: str | Path | None = None,
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
        The types that the cells may be: a list, a mapping of samples to lists (needs ``sample_key``; each sample of a
        group then gets a label of its own), or the name of an ``obs`` column with types (of ``reference``, if given).
    groupby
        Categorical column of ``obs`` whose groups are labelled. ``None`` labels every cell by itself, which takes
        up to ``n_votes`` puzzles for each.
    groups
        The groups to label; all by default. Other cells get no value.
    sample_key
        Column of ``obs`` with the donor (or sample). No puzzle has cells of two.
    reference
        The object that has the column named by ``cell_types``.
    context
        What is known of the donor, one line of sentences, or one for each sample.
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
        Whether no type may be given to two groups (of a sample). ``"auto"``: if there are as many groups as types;
        the log says so.
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
    cache
        A ``.jsonl`` file in which responses are kept as they come in. A repeated or interrupted call asks only what
        is not in it.
    on_error
        ``"raise"``, or ``"skip"`` to go on without the puzzles that the engine failed on. A response that makes no
        sense is no such failure: it gives no vote, and is counted.
    store_reasoning
        Whether to keep puzzle texts and reasoning in ``uns``.
    dry_run
        Return the prompts (chat messages) without starting an engine or changing ``adata``.
    rng
        Seed, or generator.
    progress
        Whether to show a progress bar.
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
        answer names a type twice: they count for none of their groups), ``n_errors``.

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
    start = logg.info("annotating with cello1")
    check_options(given)
    check_engine(engine, model=model, base_url=base_url, options=engine_options)
    sampling = Sampling(temperature, top_p, max_tokens, reasoning_budget=reasoning_budget)
    kept = None if cache is None else Cache(cache)
    if not dry_run:
        _store.check_free(adata, key_added)
        _store.check_writable(adata, copy=copy)
    prepared = prepare(adata, given)
    wording = None if temperature > 0 else prepared.puzzle  # a puzzle is equal to what asks the same
    if dry_run:
        drafts = screening(prepared.units, prepared.lists, prepared.size, prepared.rng)
        drafts += final_rounds(prepared.units, prepared.lists, prepared.size, n_votes, prepared.rng, wording=wording)
        return [messages(prepared.puzzle(draft), prompt_layout, VARIANT) for draft in drafts]
    if copy:
        adata = adata.copy()

    with opened(
        engine,
        model,
        base_url=base_url,
        constrained=constrained,
        max_concurrency=max_concurrency,
        options=engine_options,
    ) as running:
        constrain = constrained and bool(running.constraint)

        def put(drafts: Sequence[Draft]) -> list[Reply]:
            return ask(
                running,
                [prepared.puzzle(draft) for draft in drafts],
                layout=prompt_layout,
                variant=VARIANT,
                sampling=sampling,
                seeds=completion_seeds(len(drafts), prepared.rng),
                constrain=constrain,
                cache=kept,
                on_error=on_error,
                progress=progress,
            )

        solved = solve(prepared.units, prepared.lists, prepared.size, n_votes, put, prepared.rng, wording)
        about = {
            "engine": running.name,
            "engine_version": engine_version(running),
            "base_url": public_address(getattr(running, "base_url", None)),  # it may come from the environment
            "model": running.model,
            "fingerprint": running.fingerprint,
            "constraint": running.constraint if constrain else "",
        }

    tally = solved.tally
    calls = call(
        tally,
        prepared.allowed,
        samples=[unit.sample for unit in prepared.units],
        one_to_one=prepared.one_to_one,
        min_support=min_support,
    )
    checks = check_cells(tally, calls.best)
    bias = position_bias(tally, calls.best)
    sizes = np.bincount(prepared.unit_of[prepared.unit_of >= 0], minlength=len(prepared.units))
    table = _store.groups_table(prepared.units, tally, calls, checks, sizes, unassigned)
    texts = [reply.text for reply in solved.replies]
    rest = {
        "params": _store.plain_params(provenance(given, prepared, about)),
        "traces": _store.traces_table(
            solved.drafts,
            [prepared.puzzle(draft) for draft in solved.drafts] if store_reasoning else [],
            solved.replies,
            prepared.units,
            adata.obs_names,
            variant=VARIANT,
            reasoning=store_reasoning,
        ),
        "positions": _store.position_table(bias),
        "checks": {
            "decoy_rate": decoy_rate(tally),
            "position_p_value": bias.p_value,
            "n_puzzles": len(texts),
            "n_failures": int(tally.failures.sum()),
            "n_repeated": tally.repeated,
            "n_errors": sum(text is None for text in texts),
        },
    }
    _store.write(
        adata,
        key_added,
        unit_of=prepared.unit_of,
        groups=table,
        rates=tally.rates,
        types=tally.types,
        rest=rest,
        categories=[*prepared.lists.types, unassigned],
    )
    _warn(table, prepared, tally)
    logg.info(
        "    finished",
        time=start,
        deep=(
            f"added\n    {key_added!r}, labels (adata.obs, categorical)\n"
            f"    {key_added + _store.SUPPORT!r}, support of the labels (adata.obs)\n"
            f"    {key_added + _store.VOTES!r}, support for every type (adata.obsm)\n"
            f"    {key_added!r}, parameters, groups and traces (adata.uns)"
        ),
    )
    return adata if copy else None


def _warn(table: Any, prepared: Prepared, tally: Tally) -> None:
    """Say what the analyst should look at."""
    if prepared.context.differing:
        logg.hint(
            f"left out of the context where cells of a puzzle differ: {', '.join(prepared.context.differing)} "
            "(sample_key keeps donors apart)"
        )
    if tally.repeated:
        logg.warning(f"{tally.repeated} puzzles do not count: their answer names a type twice")
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
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
