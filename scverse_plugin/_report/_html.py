"""The report of a run as one HTML file. Everything that comes from data or model is escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape as escape_text
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from markupsafe import Markup, escape
from matplotlib import pyplot as plt
from matplotlib import rc_context, rcParamsDefault
from matplotlib.backends.backend_agg import FigureCanvasAgg

from recipe.cello1.formats.atomic import atomic_write, check_place
from recipe.cello1.formats.pages import render_page
from recipe.cello1.task.prompt import parse_user
from scverse_plugin import pl
from scverse_plugin._report._genes import Finder, Mention
from scverse_plugin.adata import _store
from scverse_plugin.get import cello1_df
from scverse_plugin.pl._shared import PAGE
from scverse_plugin.pl._umap import undrawable

_LARGEST = 2_700_000  # characters of a page; puzzles beyond are left to the object
_LEAST = 300_000  # of which puzzles have so many in any case
# Matplotlib's own colours, whatever style is in use; the page inverts them where it is dark.
_LIGHT = {name: rcParamsDefault[name] for name in plt.style.library["dark_background"]}
# Parameters that are lists or dicts, and what is one of several models.
_LISTS = ("cell_types", "decoys", "exclude_genes", "groups", "context_keys", "engine_options")
_OF_EACH_MODEL = (
    *("engine", "engine_version", "base_url", "model", "fingerprint"),
    *("constraint", "support", "readout"),
)
FRAME = 250  # of a puzzle besides its texts
TEMPLATE = Path(__file__).with_name("report.html.j2")


def report(adata: AnnData, path: str | Path, key: str = "cello1", *, max_traces: int = 5) -> Path:
    """Write a report: every group with its label, support, runner-up, and the reasoning with its genes checked.

    Genes that the reasoning names are marked: green if the prompt lists them, red if it does not. Each puzzle stands in
    it once. With many groups not all of them do, so that the page stays below 3 MB.

    Parameters
    ----------
    adata
        Annotated data with a run of :func:`scverse_plugin.tl.annotate`.
    path
        The ``.html`` file to write.
    key
        The run's ``key_added``.
    max_traces
        Puzzles shown for each group.

    Returns
    -------
    The path.

    Raises
    ------
    ValueError
        If there is no such run, or the path does not end in ``.html`` or cannot be written.
    """
    path = check_path(path)
    run = _store.stored(adata, key)
    groups = run["groups"].to_dict("records")
    traces = cello1_df(adata, key, table="traces").to_dict("records")
    finder = Finder(_symbols(adata, run["params"]), [str(name) for name in run["types"]])
    mentions = [_mentions(trace, finder) for trace in traces]
    of_group = _by_group(groups, traces)
    page = {
        "title": f"Cell types: {key}",
        "headlines": _headlines(run),
        "notes": _notes(run),
        "overview": _overview(groups),
        "tables": {"models": _models(run, groups), "backed_off": _back_offs(groups)},
        "plots": _plots(adata, key),
        "groups": [
            _group(*each, traces, mentions, max_traces)
            for each in zip(groups, of_group, _each_says(run, len(groups)), strict=True)
        ],
        "params": json.dumps(_values(run), indent=1, ensure_ascii=False),
    }

    def render(puzzles: Mapping[int, Any]) -> str:
        return render_page(TEMPLATE, **page, puzzles=puzzles, n_left=len(traces) - len(puzzles))

    wanted = [found[:max_traces] for found in of_group]
    links = sum(map(len, wanted)) * len('<a href="#p1000"></a>')
    budget = max(_LEAST, _LARGEST - len(render({})) - links)
    atomic_write(path, render(_shown(wanted, traces, mentions, budget)))
    return path


def check_path(path: str | Path) -> Path:
    """Check where a report is to go.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    The path.

    Raises
    ------
    ValueError
        If it does not end in ``.html``, or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report: {path} must end in .html")
    check_place(path, "report")
    return path


def _values(run: Any) -> dict[str, Any]:
    """Return parameters as they were given; a list is stored as JSON."""
    found = {str(name): value.item() if hasattr(value, "item") else value for name, value in run["params"].items()}
    lists = {*_LISTS, *(_OF_EACH_MODEL if "models" in run else ())}
    if "sample_key" in found and str(found.get("context")).startswith("{"):
        lists.add("context")  # one of each sample
    for name in lists & found.keys():
        with suppress(TypeError, ValueError, RecursionError):
            found[name] = json.loads(found[name])
    return found


def _headlines(run: Any) -> list[dict[str, str]]:
    checks, groups = run["checks"], run["groups"]
    n, labelled, ancestors = len(groups), _labelled(groups), int((groups["status"] == "backed_off").sum())
    found = [
        ("groups with a label", f"{labelled} of {n}", f"{ancestors} backed off to an ancestor" if ancestors else ""),
        ("support", f"{groups['support'].median():.2f}", "median over the groups"),
        ("puzzles", str(int(checks["n_puzzles"])), f"{int(checks['n_errors'])} without a response"),
    ]
    if checks["decoy_rate"] == checks["decoy_rate"]:
        found.append(("decoys chosen", f"{float(checks['decoy_rate']):.1%}", "of the chances: false assignments"))
    if "models" in run:
        shared, n_models = groups["agreement"], run["models"]["model"].nunique()
        all_agree = f"all {n_models} on {int((shared == 1).sum())} of {n} groups"
        found.append(("agreement of models", f"{shared.mean():.0%}", all_agree))
    return [dict(zip(("label", "value", "note"), each, strict=True)) for each in found]


def _labelled(groups: pd.DataFrame) -> int:
    return int(groups["status"].isin(_store.LABELLED).sum())


def _notes(run: Any) -> list[str]:
    params, checks = run["params"], run["checks"]
    facts = [f"model: {params['model']}", f"engine: {params['engine']}"]
    if checks["n_repeated"]:
        facts.append(
            f"{int(checks['n_repeated'])} answers name a type twice: they count only for the groups "
            "whose type stands in them once"
        )
    if unread := _store.unreadable(run):
        facts.append(unread)
    if checks["position_p_value"] == checks["position_p_value"]:
        facts.append(f"effect of the position in the puzzle: p = {float(checks['position_p_value']):.2g}")
    return facts


def _overview(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    several = "agreement" in groups[0]
    for i, row in enumerate(groups):
        first = (_link(i, row), row["label"], f"{row['support']:.2f}", _flags(row), _runner_up(row))
        shared = (f"{row['agreement']:.0%}",) if several else ()
        rows.append((*first, f"{row['margin']:.2f}", str(row["votes"]), str(row["failures"]), *shared))
    # What matters most first: a narrow window shows no more without being scrolled.
    columns = ("group", "label", "support", "status", "runner-up", "margin", "votes", "failures")
    title = "label and support of each group"
    return {"title": title, "columns": (*columns, *["agreement"] * several), "rows": rows, "left": (0, 1, 3, 4)}


def _link(i: int, row: Mapping[str, Any]) -> Markup:
    return Markup('<a href="#g{}">{}</a>').format(i, _name(row))


def _back_offs(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """List the groups whose label is an ancestor: of which types, and which."""
    rows = [
        (_link(i, row), row["backed_off_from"], row["label"], f"{row['support']:.2f}")
        for i, row in enumerate(groups)
        if row["status"] == "backed_off"
    ]
    columns = ("group", "from", "to", "support of both")
    return {"title": "backed off to an ancestor", "columns": columns, "rows": rows, "left": (0, 1, 2)}


def _models(run: Any, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say of each model how often it names the type that all of them together do."""
    together = [row["best"] for row in groups]
    rows = []
    for model, own in run["models"].groupby("model", sort=False) if "models" in run else ():
        same = int((own["best"].to_numpy() == np.array(together, dtype=object)).sum())
        rows.append((model, f"{same} of {len(groups)}", f"{own['support'].median():.2f}", str(own["votes"].sum())))
    columns = ("model", "groups as all together", "median support", "votes")
    return {"title": "models", "columns": columns, "rows": rows, "left": (0,)}


def _each_says(run: Any, n: int) -> list[str]:
    """Say of each group what each model takes it for."""
    if "models" not in run:
        return [""] * n
    of_model = [own.to_dict("records") for _, own in run["models"].groupby("model", sort=False)]
    return [
        "; ".join(f"{row['model']}: {row['best'] or 'nothing'} ({row['support']:.2f})" for row in rows)
        for rows in zip(*of_model, strict=True)
    ]


def _name(row: Mapping[str, Any]) -> Markup:
    return Markup('{} <span class="dim">{}</span>' if row["sample"] else "{}").format(row["group"], row["sample"])


def _runner_up(row: Mapping[str, Any]) -> str:
    return f"{row['runner_up']} ({row['runner_up_support']:.2f})" if row["runner_up"] else ""


def _flags(row: Mapping[str, Any]) -> Markup:
    flags = [row["status"]] * (row["status"] != "ok") + ["mixed"] * bool(row["mixed"])
    return Markup('<span class="flag">{}</span>' if flags else "{}").format(", ".join(flags) or "ok")


def _plots(adata: AnnData, key: str) -> list[dict[str, str]]:
    groups = adata.uns[key]["groups"]
    n, ok = len(groups), _labelled(groups)
    part = "" if n <= PAGE else f" The first {PAGE} of {n} groups; pl.support and pl.votes draw the others."
    first = groups.sort_values("support", ascending=False).iloc[0]
    most = f"The highest support, {first['support']:.2f}, is that of {first['group']} for {first['best'] or 'no type'}."
    shown: list[tuple[str, Callable[..., Any], str]] = [
        (
            "support",
            pl.support,
            f"A bar for each group, as long as its support; {ok} of {n} groups have a label. {most}",
        ),
        (
            "votes",
            pl.votes,
            f"A matrix of groups and types, stronger in colour where a type was chosen more often. {most}",
        ),
    ]
    if not undrawable(adata, key):
        names = ", ".join(f"{name} {count}" for name, count in adata.obs[key].value_counts().head(5).items())
        seen = "The cells on the embedding, coloured by label on the left and by support on the right."
        shown.append(("umap", pl.umap, f"{seen} Most frequent: {names}."))
    parts = []
    for anchor, draw, seen in shown:
        with rc_context(_LIGHT):
            figure = draw(adata, key, return_fig=True)
            buffer = io.BytesIO()
            figure.set_dpi(80)
            FigureCanvasAgg(figure).print_png(buffer)  # figure.savefig draws twice
            plt.close(figure)
        png = base64.b64encode(buffer.getvalue()).decode()
        caption = seen.split(". ")[0].removesuffix(".") + "." + ("" if anchor == "umap" else part)
        title = "labels and support" if anchor == "umap" else anchor
        parts.append({"anchor": anchor, "title": title, "seen": seen, "caption": caption, "png": png})
    return parts


def _symbols(adata: AnnData, params: Any) -> frozenset[str]:
    """Return the gene symbols of the data."""
    use_raw = params.get("matrix") == "adata.raw.X" and adata.raw is not None
    var = adata.raw.var if use_raw else adata.var
    column = params.get("gene_symbols")
    names = var[column] if column in var.columns else var.index
    return frozenset(str(name) for name in names)


def _by_group(groups: Sequence[Mapping[str, Any]], traces: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the puzzles of each group, those of the screening last."""
    own_samples = any(row["sample"] for row in groups)
    found: dict[tuple[str, str], list[int]] = {}
    for i in sorted(range(len(traces)), key=lambda i: bool(traces[i]["screening"])):
        for name in traces[i]["groups"]:
            found.setdefault((name, traces[i]["sample"] if own_samples else ""), []).append(i)
    return [found.get((row["group"], row["sample"]), []) for row in groups]


def _mentions(trace: Mapping[str, Any], finder: Finder) -> list[Mention]:
    if "puzzle" not in trace:
        return []
    return list(finder(_text(trace), {gene for cell in parse_user(str(trace["puzzle"])).cells for gene in cell}))


def _shown(
    wanted: Sequence[Sequence[int]], traces: Sequence[Mapping[str, Any]], mentions: Sequence[list[Mention]], budget: int
) -> dict[int, dict[str, Any]]:
    """Make puzzles ready to be shown, one of each group after the other, until the budget is used up."""
    shown: dict[int, dict[str, Any]] = {}
    longest = max(map(len, wanted), default=0)
    for i in [found[rank] for rank in range(longest) for found in wanted if rank < len(found)]:
        if i not in shown:
            puzzle = _puzzle(i, traces[i], mentions[i])
            budget -= FRAME + sum(len(text) for text in puzzle.values() if text)
            if budget < 0:
                break
            shown[i] = puzzle
    return shown


def _puzzle(i: int, trace: Mapping[str, Any], mentions: Sequence[Mention]) -> dict[str, Any]:
    answer = [*trace["answer"], *["?"] * len(trace["groups"])]
    screening = " (screening)" if trace["screening"] else ""
    told = [f"cell {n} (group {group}): {answer[n - 1]}" for n, group in enumerate(trace["groups"], start=1)]
    return {
        "title": f"puzzle {i + 1}: round {trace['round']}{screening}, {trace['status']}",
        "told": escape("; ".join(told)),
        "error": escape(trace["error"]),
        "text": _marked(_text(trace), mentions) if "puzzle" in trace else "",
        "question": escape(str(trace["puzzle"])) if "puzzle" in trace else None,
    }


def _group(
    row: Mapping[str, Any],
    found: Sequence[int],
    each_says: str,
    traces: Sequence[Mapping[str, Any]],
    mentions: Sequence[list[Mention]],
    max_traces: int,
) -> dict[str, Any]:
    runner_up = f"; runner-up {_runner_up(row)}" if row["runner_up"] else ""
    facts = f"support {row['support']:.2f}{runner_up}; {row['votes']} votes in {row['puzzles']} puzzles"
    if row["cell_agreement"] == row["cell_agreement"]:
        facts += f"; {row['cell_agreement']:.0%} of {row['cells_asked']} cells agree"
    if row["status"] == "backed_off":
        facts += f"; backed off from {row['backed_off_from']} to {row['label']}"
    if each_says:
        facts += f"; {row['agreement']:.0%} of the models agree ({each_says})"
    if found and "puzzle" in traces[found[0]]:
        named = sum(len(mentions[i]) for i in found)
        invented = sum(not mention.in_prompt for i in found for mention in mentions[i])
        facts += f"; {invented} of {named} genes in the reasoning are not in the prompt"
    puzzles = []
    for i in found[:max_traces]:
        position, answer = traces[i]["groups"].index(row["group"]), traces[i]["answer"]
        puzzles.append((i, answer[position] if position < len(answer) else traces[i]["status"]))
    return {"name": _name(row), "label": row["label"], "facts": facts, "flags": _flags(row), "puzzles": puzzles}


def _text(trace: Mapping[str, Any]) -> str:
    return str(trace["reasoning"]) or str(trace["response"])


def _marked(text: str, found: Sequence[Mention]) -> Markup:
    parts, at = [], 0
    for mention in found:
        kind = "listed" if mention.in_prompt else "invented"
        # A gene is letters, digits, '-' and '.'; Markup for every piece would take most of a report's time.
        parts += [escape_text(text[at : mention.start]), f'<span class="{kind}">{mention.gene}</span>']
        at = mention.stop
    return Markup("".join([*parts, escape_text(text[at:])]))
