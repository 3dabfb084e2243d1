"""The report of a run as one HTML file. Everything that comes from data or model is escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from anndata import AnnData
from matplotlib import pyplot as plt

from recipe.cello1.formats.atomic import atomic_write
from recipe.cello1.task.prompt import parse_user
from scverse_plugin import pl
from scverse_plugin._files import check_place
from scverse_plugin._report._genes import Finder, Mention
from scverse_plugin._report._page import page, table
from scverse_plugin.adata import _store
from scverse_plugin.get import cello1_df
from scverse_plugin.pl._shared import PAGE

LARGEST = 2_700_000  # characters of a page; puzzles beyond are left to the object
LEAST = 300_000  # of which puzzles have so many in any case


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
    puzzles = _Puzzles(traces, Finder(_symbols(adata, run["params"]), [str(name) for name in run["types"]]))
    of_group = _by_group(groups, traces)
    params = escape(json.dumps(_values(run["params"]), indent=1, ensure_ascii=False))
    sections = [
        ("overview", "Overview", _overview(groups)),
        *_plots(adata, key),
        ("parameters", "Parameters", f"<pre>{params}</pre>"),
    ]
    wanted = [found[:max_traces] for found in of_group]
    links = sum(map(len, wanted)) * len('<a href="#p1000"></a>')
    used = sum(len(html) for *_, html in sections) + len(_groups(groups, of_group, puzzles, max_traces)) + links
    puzzles.show(wanted, max(LEAST, LARGEST - used))
    texts = _groups(groups, of_group, puzzles, max_traces)
    sections[-1:-1] = [("groups", "Groups", texts), ("puzzles", "Puzzles", puzzles.html())]
    atomic_write(path, page(f"Cell types: {key}", sections, _summary(run)))
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
        facts.append(
            f"{int(checks['n_repeated'])} answers name a type twice: they count only for the groups "
            "whose type stands in them once"
        )
    cut = int((run["traces"]["finish_reason"] == "length").sum())
    if cut:
        facts.append(f"{cut} answers were cut at max_tokens={params['max_tokens']}")
    if checks["decoy_rate"] == checks["decoy_rate"]:
        facts.append(f"decoys chosen in {float(checks['decoy_rate']):.1%} of the chances (false assignments)")
    if checks["position_p_value"] == checks["position_p_value"]:
        facts.append(f"effect of the position in the puzzle: p = {float(checks['position_p_value']):.2g}")
    return "<ul>" + "".join(f"<li>{escape(fact)}" for fact in facts) + "</ul>"


def _overview(groups: Sequence[Mapping[str, Any]]) -> str:
    columns = [("group", False), ("label", False), ("support", True), ("runner-up", False), ("margin", True)]
    columns += [("votes", True), ("failures", True), ("status", False)]
    rows = []
    for i, row in enumerate(groups):
        runner_up = f"{row['runner_up']} ({row['runner_up_support']:.2f})" if row["runner_up"] else ""
        name = f'<a href="#g{i}">{_name(row)}</a>'
        numbers = (f"{row['margin']:.2f}", str(row["votes"]), str(row["failures"]))
        rows.append((name, escape(row["label"]), f"{row['support']:.2f}", escape(runner_up), *numbers, _flags(row)))
    return table("Label and support of each group; a group's name leads to its puzzles", columns, rows)


def _name(row: Mapping[str, Any]) -> str:
    return escape(row["group"]) + (f" <span class=dim>{escape(row['sample'])}</span>" if row["sample"] else "")


def _flags(row: Mapping[str, Any]) -> str:
    flags = [] if row["status"] == "ok" else [row["status"]]
    flags += ["mixed"] if row["mixed"] else []
    return f"<span class=flag>{escape(', '.join(flags))}</span>" if flags else "ok"


def _plots(adata: AnnData, key: str) -> list[tuple[str, str, str]]:
    groups = adata.uns[key]["groups"]
    n, ok = len(groups), int((groups["status"] == "ok").sum())
    part = "" if n <= PAGE else f" (the first {PAGE} of {n} groups; pl.support and pl.votes draw the others)"
    bars = f"A bar for each group, as long as its support; {ok} of {n} groups have a label."
    shown: list[tuple[str, str, Callable[..., Any], str]] = [
        ("support", "Support", pl.support, bars),
        ("votes", "Votes", pl.votes, "A matrix of groups and types, darker where a type was chosen more often."),
    ]
    if "X_umap" in adata.obsm:
        seen = "The cells on the embedding, coloured by label on the left and by support on the right."
        shown.append(("umap", "Labels and support", pl.umap, seen))
    parts = []
    for anchor, title, draw, seen in shown:
        figure = draw(adata, key, return_fig=True)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        plt.close(figure)
        data = base64.b64encode(buffer.getvalue()).decode()
        caption = seen + ("" if anchor == "umap" else part)
        html = f'<figure><img alt="{escape(seen)}" src="data:image/png;base64,{data}"><figcaption>{escape(caption)}'
        parts.append((anchor, title, f"{html}</figcaption></figure>"))
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


class _Puzzles:
    """The puzzles of a run: what they have in genes, and the HTML of those that are shown."""

    def __init__(self, traces: Sequence[Mapping[str, Any]], finder: Finder) -> None:
        self.traces = traces
        self.mentions = [self._mentions(trace, finder) for trace in traces]
        self.shown: dict[int, str] = {}

    @staticmethod
    def _mentions(trace: Mapping[str, Any], finder: Finder) -> list[Mention]:
        if "puzzle" not in trace:
            return []
        listed = {gene for cell in parse_user(str(trace["puzzle"])).cells for gene in cell}
        return list(finder(_text(trace), listed))

    def show(self, wanted: Sequence[Sequence[int]], budget: int) -> None:
        """Write puzzles, one of each group after the other, until the budget is used up."""
        longest = max(map(len, wanted), default=0)
        for i in [found[rank] for rank in range(longest) for found in wanted if rank < len(found)]:
            if i not in self.shown:
                html = self._puzzle(i)
                budget -= len(html)
                if budget < 0:
                    return
                self.shown[i] = html

    def _puzzle(self, i: int) -> str:
        trace = self.traces[i]
        answer = list(trace["answer"])
        told = [
            f"cell {n} (group {member}): {answer[n - 1] if n <= len(answer) else '?'}"
            for n, member in enumerate(trace["groups"], start=1)
        ]
        body = f"<p>{escape('; '.join(told))}</p>" + (f"<p>{escape(trace['error'])}</p>" if trace["error"] else "")
        if "puzzle" in trace:
            text = _text(trace)
            body += f"<pre>{_marked(text, self.mentions[i])}</pre>" if text else "<p class=dim>no reasoning</p>"
            body += f"<details><summary>puzzle</summary><pre>{escape(str(trace['puzzle']))}</pre></details>"
        # The anchor is inside, so that a browser opens what it is led to.
        return f'<details><summary>{escape(_title(i, trace))}</summary><div id="p{i}">{body}</div></details>'

    def html(self) -> str:
        """Return the section of the puzzles."""
        legend = (
            "<p><span class=listed>GENE</span> is listed in the prompt; <span class=invented>GENE</span> is not: "
            "the reasoning names a gene that it was not given.</p>"
        )
        left = len(self.traces) - len(self.shown)
        rest = f"<p>{left} further puzzles are in the object: <code>get.cello1_df(adata, table='traces')</code>.</p>"
        return legend + "".join(self.shown[i] for i in sorted(self.shown)) + (rest if left else "")


def _title(i: int, trace: Mapping[str, Any]) -> str:
    return f"puzzle {i + 1}: round {trace['round']}{' (screening)' if trace['screening'] else ''}, {trace['status']}"


def _groups(
    groups: Sequence[Mapping[str, Any]], of_group: Sequence[Sequence[int]], puzzles: _Puzzles, max_traces: int
) -> str:
    each = zip(groups, of_group, strict=True)
    return "".join(_group(i, row, found, puzzles, max_traces) for i, (row, found) in enumerate(each))


def _group(i: int, row: Mapping[str, Any], found: Sequence[int], puzzles: _Puzzles, max_traces: int) -> str:
    runner_up = f"; runner-up {row['runner_up']} ({row['runner_up_support']:.2f})" if row["runner_up"] else ""
    facts = f"support {row['support']:.2f}{runner_up}; {row['votes']} votes in {row['puzzles']} puzzles"
    if row["cell_agreement"] == row["cell_agreement"]:
        facts += f"; {row['cell_agreement']:.0%} of {row['cells_asked']} cells agree"
    if found and "puzzle" in puzzles.traces[found[0]]:
        named = [mention for each in found for mention in puzzles.mentions[each]]
        invented = sum(not mention.in_prompt for mention in named)
        facts += f"; {invented} of {len(named)} genes in the reasoning are not in the prompt"
    lines = []
    for each in found[:max_traces]:
        trace = puzzles.traces[each]
        position = trace["groups"].index(row["group"])
        said = trace["answer"][position] if position < len(trace["answer"]) else trace["status"]
        link = f'<a href="#p{each}">puzzle {each + 1}</a>' if each in puzzles.shown else f"puzzle {each + 1}"
        lines.append(f"<li>{link}: {escape(said)}")
    return (
        f'<h2 id="g{i}">{_name(row)}: {escape(row["label"])}</h2><p>{escape(facts)} · {_flags(row)}</p>'
        f"<ul>{''.join(lines)}</ul>"
    )


def _text(trace: Mapping[str, Any]) -> str:
    return str(trace["reasoning"]) or str(trace["response"])


def _marked(text: str, found: Sequence[Mention]) -> str:
    parts, at = [], 0
    for mention in found:
        kind = "listed" if mention.in_prompt else "invented"
        parts += [escape(text[at : mention.start]), f"<span class={kind}>{escape(mention.gene)}</span>"]
        at = mention.stop
    return "".join([*parts, escape(text[at:])])
