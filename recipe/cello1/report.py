"""An evaluation for people: tables for the terminal, Markdown, and one self-contained HTML page with plots.

All of them show what :func:`recipe.cello1.evaluate.evaluate` returned. Whatever comes from the model or the data is
escaped: a response is shown, never obeyed.
"""

from __future__ import annotations

import html
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

METRICS = {
    "cell_accuracy": "cell accuracy",
    "cell_accuracy_micro": "cell accuracy (micro)",
    "exact_match": "exact match",
    "format_valid": "format validity",
    "uniqueness": "uniqueness",
    "legal": "legal answers",
    "length": "length",
}
_SLICED = ("cell_accuracy", "exact_match", "format_valid")
_RULED = ("cell_accuracy", "exact_match", "legal")
_MEANINGS = {"ontology": "what the types mean, by ontology", "judge": "what the types mean, by a language model"}
_MOST_PAIRS = 15  # confusions listed in text
_MOST_TYPES = 40  # types in the confusion picture

# ------------------------------------------------------------------------------------------------------------ tables


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1f}" if name == "length" else f"{value:.3f}"


def _interval(name: str, found: Mapping[str, Any]) -> str:
    return f"[{_number(name, found['low'])}, {_number(name, found['high'])}]"


def _both(name: str, found: Mapping[str, Any]) -> str:
    return f"{_number(name, found['mean'])} {_interval(name, found)}"


def _heading(name: str, result: Mapping[str, Any]) -> str:
    return METRICS[name] + (f" ({result['length_unit']})" if name == "length" else "")


class _Table:
    """A table in no particular format; the first column holds text, the others numbers."""

    def __init__(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.title = title
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]


def _tables(result: Mapping[str, Any]) -> list[_Table]:
    level = f"{result['level']:.0%} interval"
    tables = [
        _Table(
            f"{result['n']} puzzles, {result['n_answers']} answers",
            ["metric", "mean", level],
            [
                [_heading(name, result), _number(name, found["mean"]), _interval(name, found)]
                for name, found in result["metrics"].items()
            ],
        )
    ]
    if rules := result.get("rules"):
        tables.append(_rule_table(rules))
    tables += [_relation_table(result[key], title) for key, title in _MEANINGS.items() if result.get(key)]
    if comparison := result.get("comparison"):
        tables.append(_comparison_table(comparison))
    for key, groups in result["slices"].items():
        if len(groups) > 1:
            rows = [
                [value, str(metrics["cell_accuracy"]["n"]), *(_both(name, metrics[name]) for name in _SLICED)]
                for value, metrics in groups.items()
            ]
            tables.append(_Table(f"by {key}", [key, "puzzles", *(METRICS[name] for name in _SLICED)], rows))
    return tables


def _rule_table(rules: Mapping[str, Any]) -> _Table:
    rows = []
    for rule, metrics in rules.items():
        behind = metrics.get("behind")
        rows.append([rule, *(_both(name, metrics[name]) for name in _RULED), _change(behind) if behind else ""])
    columns = ["rule", *(METRICS[name] for name in _RULED), "consensus minus rule (cell accuracy)"]
    return _Table("several answers to each puzzle, combined", columns, rows)


def _change(found: Mapping[str, Any]) -> str:
    if found["low"] is None:  # the same on every puzzle
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _relation_table(found: Mapping[str, Any], title: str) -> _Table:
    by = found.get("version") or found.get("model")
    rows = [[name, _both("", metric)] for name, metric in found["relations"].items()]
    return _Table(f"{title} ({by})", ["answer is", "share of cells"], rows)


def _comparison_table(comparison: Mapping[str, Any]) -> _Table:
    rows = []
    for name, found in comparison["metrics"].items():
        mean = _number(name, found["mean"])
        rows.append([_heading(name, comparison), mean if mean.startswith("-") else f"+{mean}", _interval(name, found)])
    title = f"change against {comparison.get('with', 'the other run')}, {comparison['n']} puzzles in both"
    return _Table(title, ["metric", "difference", f"{comparison['level']:.0%} interval"], rows)


def _type_table(result: Mapping[str, Any]) -> _Table:
    rows = [
        [name, str(found["n"]), f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"]
        for name, found in result["types"].items()
    ]
    return _Table("by cell type", ["type", "cells", "accuracy"], rows)


def _mistakes(result: Mapping[str, Any]) -> _Table:
    pairs = [pair for pair in result["confusion"] if pair["gold"] != pair["predicted"]][:_MOST_PAIRS]
    rows = [[pair["gold"], pair["predicted"], str(pair["count"])] for pair in pairs]
    return _Table("most frequent mistakes", ["gold", "answered", "cells"], rows)


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if result["malformed"]:
        counts = ", ".join(f"{reason} {count}" for reason, count in result["malformed"].items())
        notes.append(f"malformed answers (scored 0): {counts}")
    if result["outside_candidates"]:
        notes.append(f"answers that name a type not among the candidates: {result['outside_candidates']}")
    if found := result.get("calibration"):
        notes.append(
            f"calibration of the consensus: expected calibration error {found['ece']:.3f}, Brier score "
            f"{found['brier']:.3f} ({found['n']} cells)"
        )
    if test := result.get("comparison", {}).get("mcnemar"):
        notes.append(
            f"exact match, McNemar: only the other run {test['only_first']}, only this one {test['only_second']}, "
            f"p = {test['p_value']:.3g}"
        )
    if (found := result.get("ontology")) and found["unknown"]:
        names = ", ".join(f"{name} {count}" for name, count in found["unknown"].items())
        notes.append(f"names that the ontology has not: {names}")
    if (found := result.get("ontology")) and found["distance"]:
        notes.append(f"distance in the ontology: {_both('', found['distance'])} edges")
    if (found := result.get("judge")) and found["n_failed"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in found["failures"].items())
        notes.append(f"cells the judge gave no verdict on: {found['n_failed']}: {reasons}")
    if result["n_errors"]:
        notes.append(f"not scored, the machinery failed: {result['n_errors']} (run predict again)")
    if result["n_missing"]:
        notes.append(f"not scored, no prediction: {result['n_missing']} items of the data set")
    return notes


def render(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print an evaluation as tables.

    Parameters
    ----------
    result
        What :func:`recipe.cello1.evaluate.evaluate` returned.
    console
        Where to; the terminal by default.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A log has no width of its own, and tables are not to be squeezed into 80 columns there.
    console = console or (Console() if sys.stdout.isatty() else Console(width=140))
    for table in _tables(result):
        shown = Table(title=escape(table.title), title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(escape(column), justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for note in _notes(result):
        console.print(note, highlight=False, markup=False)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Write an evaluation as Markdown.

    Parameters
    ----------
    result
        What :func:`recipe.cello1.evaluate.evaluate` returned.

    Returns
    -------
    Tables and notes.
    """
    parts = ["# Evaluation", *(_run_lines(result))]
    for table in [*_tables(result), _type_table(result), _mistakes(result)]:
        if table.rows:
            parts.append(f"## {_cell(table.title[:1].upper() + table.title[1:])}\n\n" + _markdown(table))
    if notes := _notes(result):
        parts.append("\n".join(f"- {_cell(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def rules_markdown(result: Mapping[str, Any]) -> str:
    """Write only the table of the rules that combine several answers, and the notes, as Markdown.

    Parameters
    ----------
    result
        What :func:`recipe.cello1.evaluate.evaluate` returned.

    Returns
    -------
    Table and notes.

    Raises
    ------
    ValueError
        If no puzzle has several answers.
    """
    if not result.get("rules"):
        msg = "no puzzle has several answers, so that there is nothing to combine; predict with --samples"
        raise ValueError(msg)
    notes = "\n".join(f"- {_cell(note)}" for note in _notes(result))
    return _markdown(_rule_table(result["rules"])) + (f"\n\n{notes}" if notes else "")


def _markdown(table: _Table) -> str:
    return "\n".join(
        [
            "| " + " | ".join(map(_cell, table.columns)) + " |",
            "| " + " | ".join(["---"] + ["---:"] * (len(table.columns) - 1)) + " |",
            *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows),
        ]
    )


def _cell(text: str) -> str:
    """Escape what Markdown and the HTML in it would take for markup."""
    text = html.escape(" ".join(text.split()), quote=False)
    for mark in ("\\", "|", "*", "_", "`", "[", "]", "#"):
        text = text.replace(mark, "\\" + mark)
    return text


def _run_lines(result: Mapping[str, Any]) -> list[str]:
    run = result["run"]
    return ["\n".join(f"- {_cell(key)}: {_cell(str(value))}" for key, value in run.items())] if run else []


# -------------------------------------------------------------------------------------------------------------- HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dot: #2a6fdb; --soft: #2a6fdb55; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .7rem; border-radius: .3rem; }
.confusion td { padding: .1rem .3rem; text-align: center; font-size: 12px; border: 1px solid var(--line); }
.confusion th { font-weight: normal; font-size: 12px; }
.confusion thead th { writing-mode: vertical-rl; text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
figure { margin: 0; } figcaption { font-weight: 600; }
.right summary { color: #1a7f37; } .wrong summary { color: #b35900; } .malformed summary { color: #c22; }
"""


def to_html(result: Mapping[str, Any]) -> str:
    """Write an evaluation as one HTML page that needs nothing else: plots are inline SVG, there are no scripts.

    Parameters
    ----------
    result
        What :func:`recipe.cello1.evaluate.evaluate` returned.

    Returns
    -------
    The page.
    """
    esc = html.escape
    run = "".join(f"<li>{esc(str(key))}: {esc(str(value))}</li>" for key, value in result["run"].items())
    plots = [_accuracy_by_n(result), _lengths(result), _reliability(result)]
    notes = "".join(f"<li>{esc(note)}</li>" for note in _notes(result))
    body = [
        "<h1>Evaluation</h1>",
        f"<ul>{run}</ul>" if run else "",
        f"<ul>{notes}</ul>" if notes else "",
        '<div class="plots">' + "".join(plot for plot in plots if plot) + "</div>",
        *(_html_table(table) for table in _tables(result)),
        _confusion_picture(result),
        _html_table(_type_table(result)),
        _html_table(_mistakes(result)),
        "<h2>Examples</h2>" if result["examples"] else "",
        *(_example(example) for example in result["examples"]),
    ]
    # No address but its own may be loaded: a second lock beside the escaping.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width">\n<title>Evaluation</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(part for part in body if part)
            + "\n</body>\n</html>\n"
        )
        .encode("utf-8", "backslashreplace")
        .decode()
    )  # responses may hold lone surrogates


def _html_table(table: _Table) -> str:
    if not table.rows:
        return ""
    esc = html.escape
    head = "".join(f"<th>{esc(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    title = esc(table.title[:1].upper() + table.title[1:])
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _example(example: Mapping[str, Any]) -> str:
    esc = html.escape
    verdict = example["reason"] or f"cell accuracy {example['cell_accuracy']:.2f}"
    title = f"{example['kind']}: item {example['index']}, sample {example['sample']} ({verdict})"
    return (
        f'<details class="{esc(example["kind"])}"><summary>{esc(title)}</summary>'
        f"<p>gold: {esc(' | '.join(example['gold']))}</p>"
        f"<pre>{esc(example['question'])}</pre><pre>{esc(example['prediction'])}</pre></details>"
    )


class _Plot:
    """A small SVG plot with linear axes."""

    width, height, left, bottom, top = 330, 240, 42, 34, 10

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point, in pixels."""
        inner = self.width - self.left - 10, self.height - self.bottom - self.top
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return round(self.left + inner[0] * across, 1), round(self.top + inner[1] * (1 - up), 1)

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """Draw a line."""
        (x1, y1), (x2, y2) = self.at(*start), self.at(*end)
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" style="{style}"/>')

    def dot(self, x: float, y: float) -> None:
        """Draw a point."""
        cx, cy = self.at(x, y)
        self.parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" fill="var(--dot)"/>')

    def bar(self, low: float, high: float, y: float) -> None:
        """Draw a bar from the axis up."""
        (x1, y1), (x2, y2) = self.at(low, y), self.at(high, self.y[0])
        self.parts.append(
            f'<rect x="{x1}" y="{y1}" width="{max(0.5, x2 - x1 - 1):.1f}" height="{y2 - y1:.1f}" fill="var(--soft)"/>'
        )

    def tick(self, x: float | None, y: float | None, label: str) -> None:
        """Write a label on an axis."""
        if x is not None:
            px, py = self.at(x, self.y[0])
            self.parts.append(f'<text x="{px}" y="{py + 14}" text-anchor="middle">{html.escape(label)}</text>')
        if y is not None:
            px, py = self.at(self.x[0], y)
            self.parts.append(f'<text x="{px - 5}" y="{py + 4}" text-anchor="end">{html.escape(label)}</text>')
            self.line((self.x[0], y), (self.x[1], y), "stroke: var(--line)")

    def figure(self, title: str, below: str) -> str:
        """Return the plot with its title and the label of its lower axis."""
        middle = (self.width + self.left) / 2
        below = f'<text x="{middle}" y="{self.height - 3}" text-anchor="middle">{html.escape(below)}</text>'
        svg = (
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(self.parts)}{below}</svg>'
        )
        return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _accuracy_by_n(result: Mapping[str, Any]) -> str:
    groups = {int(n): metrics["cell_accuracy"] for n, metrics in result["slices"].get("n_cells", {}).items()}
    if not groups:
        return ""
    plot = _Plot((min(groups) - 0.5, max(groups) + 0.5), (0, 1))
    for y in (0, 0.25, 0.5, 0.75, 1):
        plot.tick(None, y, f"{y:g}")
    for n, found in groups.items():
        if len(groups) <= 20:
            plot.tick(n, None, str(n))
        if found["low"] is not None:
            plot.line((n, found["low"]), (n, found["high"]), "stroke: var(--dot); stroke-width: 2")
        plot.dot(n, found["mean"])
        plot.line((n - 0.3, 1 / n), (n + 0.3, 1 / n), "stroke: currentColor; stroke-dasharray: 3 3")
    return plot.figure("Cell accuracy by number of cells", "cells (dashed: chance)")


def _lengths(result: Mapping[str, Any]) -> str:
    found = result.get("lengths")
    if not found:
        return ""
    edges, counts = found["edges"], found["counts"]
    plot = _Plot((edges[0], edges[-1]), (0, max(counts)))
    for y in (0, max(counts)):
        plot.tick(None, y, str(y))
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        plot.bar(low, high, count)
    for x in (edges[0], (edges[0] + edges[-1]) / 2, edges[-1]):
        plot.tick(x, None, f"{x:.0f}")
    return plot.figure("Length of the answers", result["length_unit"])


def _reliability(result: Mapping[str, Any]) -> str:
    found = result.get("calibration")
    if not found:
        return ""
    plot = _Plot((0, 1), (0, 1))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        plot.tick(None, tick, f"{tick:g}")
        plot.tick(tick, None, f"{tick:g}")
    plot.line((0, 0), (1, 1), "stroke: currentColor; stroke-dasharray: 3 3")
    for row in found["bins"]:
        x = row["confidence"]
        plot.line((x, row["accuracy_low"]), (x, row["accuracy_high"]), "stroke: var(--dot); stroke-width: 2")
        plot.dot(x, row["accuracy"])
    return plot.figure(f"Accuracy against confidence of the consensus (ECE {found['ece']:.3f})", "confidence")


def _confusion_picture(result: Mapping[str, Any]) -> str:
    names = list(result["types"])
    if len(names) < 2:
        return ""
    title = "Confusion (rows: gold, columns: answered, cells)"
    if len(names) > _MOST_TYPES:
        wrong: Counter[str] = Counter()
        for pair in result["confusion"]:
            if pair["gold"] != pair["predicted"]:
                wrong.update({pair["gold"]: pair["count"], pair["predicted"]: pair["count"]})
        title += f": the {_MOST_TYPES} of {len(names)} types that are most often confused"
        names = sorted(sorted(names, key=lambda name: -wrong[name])[:_MOST_TYPES])
    esc = html.escape
    others = list(dict.fromkeys(p["predicted"] for p in result["confusion"] if p["predicted"] not in set(names)))
    columns = names + others[: _MOST_TYPES - len(names) + 1]
    counts = {(pair["gold"], pair["predicted"]): pair["count"] for pair in result["confusion"]}
    rows = []
    for gold in names:
        cells = []
        for name in columns:
            count = counts.get((gold, name), 0)
            share = count / result["types"][gold]["n"]
            color = "42, 111, 219" if gold == name else "200, 60, 40"
            style = f' style="background: rgba({color}, {share:.2f})"' if count else ""
            cells.append(f'<td{style} title="{esc(gold)} &rarr; {esc(name)}">{count or ""}</td>')
        rows.append(f"<tr><th>{esc(gold)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{esc(name)}</th>" for name in columns)
    return (
        f"<h2>{esc(title)}</h2>"
        f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
