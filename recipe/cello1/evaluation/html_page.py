"""An evaluation as one HTML page that needs nothing else: tables, plots as inline SVG, and examples; no scripts."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from typing import Any

from recipe.cello1.evaluation.report import Table, details, notes, tables

_MOST_TYPES = 40  # types in the confusion picture

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
.right summary { color: #1a7f37; } .wrong summary { color: #b35900; } .illegal summary { color: #c22; }
"""


def to_html(result: Mapping[str, Any]) -> str:
    """Write an evaluation as one HTML page that needs nothing else: plots are inline SVG, there are no scripts."""
    esc = html.escape
    run = "".join(f"<li>{esc(str(key))}: {esc(str(value))}</li>" for key, value in result["run"].items())
    plots = [_accuracy_by_n(result), _lengths(result), _reliability(result)]
    said = "".join(f"<li>{esc(note)}</li>" for note in notes(result))
    body = [
        "<h1>Evaluation</h1>",
        f"<ul>{run}</ul>" if run else "",
        f"<ul>{said}</ul>" if said else "",
        '<div class="plots">' + "".join(plot for plot in plots if plot) + "</div>",
        *(_html_table(table) for table in tables(result)),
        _confusion_picture(result),
        *(_html_table(table) for table in details(result)),
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


def _html_table(table: Table) -> str:
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
