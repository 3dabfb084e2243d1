"""The report of a run as one HTML file. Everything that comes from data or model is escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData
from matplotlib import pyplot as plt

from recipe.cello1.formats.atomic import atomic_write
from recipe.cello1.task.prompt import parse_user
from scverse_plugin import pl
from scverse_plugin._files import check_place
from scverse_plugin._report._genes import Mention, mentions
from scverse_plugin.adata import _store
from scverse_plugin.get import cello1_df

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}h2{margin-top:2.5rem;border-bottom:2px solid #ddd}
img{max-width:100%}details{margin:.5rem 0}pre{white-space:pre-wrap;background:#f7f7f7;padding:.7rem;margin:.3rem 0}
.listed{background:#d9f2d9}.invented{background:#ffd6d6;text-decoration:underline wavy #c00}
.flag{color:#a40000;font-weight:600}.dim{color:#666}
"""


def report(adata: AnnData, path: str | Path, key: str = "cello1", *, max_traces: int = 5) -> Path:
    """Write a report: every group with its label, support, runner-up, and the reasoning with its genes checked.

    Genes that the reasoning names are marked: green if the prompt lists them, red if it does not.

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
        If there is no such run, or the path does not end in ``.html``.
    """
    path = check_path(path)
    run = _store.stored(adata, key)
    groups = run["groups"]
    traces = cello1_df(adata, key, table="traces")
    parts = [
        f"<h1>Cell types: {escape(key)}</h1>",
        _summary(run),
        _overview(groups),
        *_plots(adata, key),
        "<p><span class=listed>GENE</span> is listed in the prompt; <span class=invented>GENE</span> is not: "
        "the reasoning names a gene that it was not given.</p>",
    ]
    known = _symbols(adata, run["params"])
    by_group: dict[tuple[str, str], list[int]] = {}
    own_samples = bool((groups["sample"] != "").any())
    for i, (members, sample) in enumerate(zip(traces["groups"], traces["sample"], strict=True)):
        for name in members:
            by_group.setdefault((name, sample if own_samples else ""), []).append(i)
    types = [str(name) for name in run["types"]]
    for row in groups.to_dict("records"):
        chosen = by_group.get((row["group"], row["sample"]), [])
        chosen = sorted(chosen, key=lambda i: bool(traces["screening"].iloc[i]))
        parts.append(_group(row, [traces.iloc[i] for i in chosen], known, types, max_traces))
    parts.append(
        f"<h2>Parameters</h2><pre>{escape(json.dumps(_values(run['params']), indent=1, ensure_ascii=False))}</pre>"
    )
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(key)}</title><style>{_STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    atomic_write(path, html)
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
        msg = f"report: {path} must end in .html"
        raise ValueError(msg)
    check_place(path, "report")
    return path


def _values(params: Any) -> dict[str, Any]:
    return {str(name): value.item() if hasattr(value, "item") else value for name, value in params.items()}


def _summary(run: Any) -> str:
    params, checks, groups = run["params"], run["checks"], run["groups"]
    labelled = int((groups["status"] == "ok").sum())
    facts = [
        f"{labelled} of {len(groups)} groups have a label",
        f"model {params['model']}",
        f"engine {params['engine']}",
        f"{int(checks['n_puzzles'])} puzzles, {int(checks['n_errors'])} without a response",
    ]
    if checks["n_repeated"]:
        facts.append(f"{int(checks['n_repeated'])} puzzles do not count: their answer names a type twice")
    if checks["decoy_rate"] == checks["decoy_rate"]:
        facts.append(f"decoys chosen in {float(checks['decoy_rate']):.1%} of the chances (false assignments)")
    if checks["position_p_value"] == checks["position_p_value"]:
        facts.append(f"effect of the position in the puzzle: p = {float(checks['position_p_value']):.2g}")
    return "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>"


def _overview(groups: pd.DataFrame) -> str:
    head = "<tr><th>group<th>label<th>support<th>runner-up<th>margin<th>votes<th>failures<th>status</tr>"
    rows = []
    for row in groups.to_dict("records"):
        runner_up = f"{row['runner_up']} ({row['runner_up_support']:.2f})" if row["runner_up"] else ""
        rows.append(
            f"<tr><td>{_name(row)}<td>{escape(row['label'])}<td class=n>{row['support']:.2f}<td>{escape(runner_up)}"
            f"<td class=n>{row['margin']:.2f}<td class=n>{row['votes']}<td class=n>{row['failures']}"
            f"<td>{_flags(row)}</tr>"
        )
    return f"<table>{head}{''.join(rows)}</table>"


def _name(row: Any) -> str:
    return escape(row["group"]) + (f" <span class=dim>{escape(row['sample'])}</span>" if row["sample"] else "")


def _flags(row: Any) -> str:
    flags = [] if row["status"] == "ok" else [row["status"]]
    flags += ["mixed"] if row["mixed"] else []
    return f"<span class=flag>{escape(', '.join(flags))}</span>" if flags else "ok"


def _plots(adata: AnnData, key: str) -> list[str]:
    figures = [("Support", pl.support(adata, key, return_fig=True)), ("Votes", pl.votes(adata, key, return_fig=True))]
    if "X_umap" in adata.obsm:
        figures.append(("Labels and support", pl.umap(adata, key, return_fig=True)))
    parts = []
    for title, figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">')
    return parts


def _symbols(adata: AnnData, params: Any) -> frozenset[str]:
    """Return the gene symbols of the data."""
    use_raw = params.get("matrix") == "adata.raw.X" and adata.raw is not None
    var = adata.raw.var if use_raw else adata.var
    column = params.get("gene_symbols")
    names = var[column] if column in var.columns else var.index
    return frozenset(str(name) for name in names)


def _group(row: Any, traces: Sequence[Any], known: frozenset[str], types: Sequence[str], max_traces: int) -> str:
    runner_up = f"; runner-up {row['runner_up']} ({row['runner_up_support']:.2f})" if row["runner_up"] else ""
    facts = f"support {row['support']:.2f}{runner_up}; {row['votes']} votes in {row['puzzles']} puzzles"
    if row["cell_agreement"] == row["cell_agreement"]:
        facts += f"; {row['cell_agreement']:.0%} of {row['cells_asked']} cells agree"
    if traces and "puzzle" in traces[0]:
        found = [mention for trace in traces for mention in _mentions(trace, known, types)]
        invented = sum(not mention.in_prompt for mention in found)
        facts += f"; {invented} of {len(found)} genes in the reasoning are not in the prompt"
    return f"<h2>{_name(row)}: {escape(row['label'])}</h2><p>{escape(facts)} · {_flags(row)}</p>" + "".join(
        _trace(row["group"], trace, known, types) for trace in traces[:max_traces]
    )


def _trace(group: str, trace: Any, known: frozenset[str], types: Sequence[str]) -> str:
    answer = list(trace["answer"])
    told = [
        f"cell {i}{' (this group)' if member == group else ''}: {answer[i - 1] if i <= len(answer) else '?'}"
        for i, member in enumerate(trace["groups"], start=1)
    ]
    title = f"round {trace['round']}{' (screening)' if trace['screening'] else ''}, {trace['status']}: " + "; ".join(
        told
    )
    body = f"<p>{escape(trace['error'])}</p>" if trace["error"] else ""
    if "puzzle" in trace:
        text = _text(trace)
        marked = _marked(text, _mentions(trace, known, types))
        body += f"<pre>{marked}</pre>" if text else "<p class=dim>no reasoning</p>"
        body += f"<details><summary>puzzle</summary><pre>{escape(str(trace['puzzle']))}</pre></details>"
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _text(trace: Any) -> str:
    return str(trace["reasoning"]) or str(trace["response"])


def _mentions(trace: Any, known: frozenset[str], types: Sequence[str]) -> list[Mention]:
    listed = {gene for cell in parse_user(str(trace["puzzle"])).cells for gene in cell}
    return list(mentions(_text(trace), listed, known, types))


def _marked(text: str, found: Sequence[Mention]) -> str:
    parts, at = [], 0
    for mention in found:
        kind = "listed" if mention.in_prompt else "invented"
        parts += [escape(text[at : mention.start]), f"<span class={kind}>{escape(mention.gene)}</span>"]
        at = mention.stop
    return "".join([*parts, escape(text[at:])])
