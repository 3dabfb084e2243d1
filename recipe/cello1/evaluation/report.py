"""An evaluation for people: its tables and notes, on the terminal and as Markdown.

:mod:`recipe.cello1.evaluation.html_page` makes a page of them. Whatever comes from the model or the data is escaped: a
response is shown, never obeyed.
"""

from __future__ import annotations

import html
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from recipe.cello1.evaluation.intervals import Estimate
from recipe.cello1.evaluation.results import Comparison, Evaluation, Meanings, Metrics, Way
from recipe.cello1.evaluation.voting_rules import CONSENSUS, RULED

if TYPE_CHECKING:
    from rich.console import Console

LABELS = {
    "partial_accuracy": "partial accuracy",
    "exact_match": "exact match",
    "format_validity": "format validity",
    "uniqueness": "uniqueness",
    "strict_accuracy": "strict accuracy",
    "legal": "legal answers",
    "length": "length",
    "naive_bayes_matched": "naive Bayes, matched",
    "naive_bayes": "naive Bayes, cell by cell",
    "one_sample": "one sample",
    "best_of_all": "best of all (needs the gold)",
    "weighted_consensus": "weighted consensus",
    "unweighted_consensus": "unweighted consensus",
    "no_answer": "no answer",
}
_SLICED = ("partial_accuracy", "exact_match", "strict_accuracy", "legal")
_MOST_PAIRS = 15  # confusions listed in text


class ReportTable(NamedTuple):
    """A table in no particular format."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)  # columns that hold words, not numbers


def label(name: str, unit: str = "") -> str:
    """Name a metric, rule or baseline in words."""
    return LABELS.get(name, name) + (f" ({unit})" if name == "length" and unit else "")


def number(name: str, value: float, sign: str = "") -> str:
    """Write a value."""
    return "?" if math.isnan(value) else f"{value:{sign}.1f}" if name == "length" else f"{value:{sign}.3f}"


def interval(name: str, found: Estimate, sign: str = "") -> str:
    """Write the interval of an estimate."""
    return f"[{number(name, found.low, sign)}, {number(name, found.high, sign)}]"


def with_interval(name: str, found: Estimate | None) -> str:
    """Write an estimate."""
    return f"{number(name, found.mean)} {interval(name, found)}" if found else ""


def change(name: str, found: Estimate | None) -> str:
    """Write a difference; one that is the same on every puzzle has no interval."""
    if found is None:
        return ""
    mean = number(name, found.mean, "+")
    return mean if math.isnan(found.low) else f"{mean} {interval(name, found, '+')}"


def metric_table(
    title: str, runs: Mapping[str, Metrics], differences: Mapping[str, Comparison], unit: str
) -> ReportTable:
    """Set the metrics of several runs side by side; baselines have no length."""
    columns = ["metric", *runs, *differences]
    rows = []
    for name in next(iter(runs.values())):
        shown = [with_interval(name, run[name]) if name != "length" or run[name].mean else "" for run in runs.values()]
        more = [change(name, found.metrics[name]) if name != "length" else "" for found in differences.values()]
        rows.append([label(name, unit), *shown, *more])
    return ReportTable(title, columns, rows)


def tables(result: Evaluation) -> list[ReportTable]:
    """Lay an evaluation out as tables."""
    found = [
        metric_table(
            f"{result.n} puzzles, {result.n_answers} answers; means with {result.level:.0%} intervals",
            {"answers": result.measured.metrics}
            | {label(name): measured.metrics for name, measured in result.baselines.items()},
            {f"answers minus {label(name)}": change for name, change in result.over_baselines.items()},
            result.length_unit,
        )
    ]
    for key, groups in result.measured.slices.items():
        if len(groups) > 1:
            found.append(_slice_table(result, key, groups))
    if result.rules:
        title = "several answers to each puzzle, combined"
        found.append(ways_table(title, result.rules, CONSENSUS, result.length_unit))
    meanings = {"by ontology": result.ontology, "by a language model": result.judge}
    found += [_meaning_table(said, by) for by, said in meanings.items() if said]
    if result.comparison:
        found.append(_comparison_table(result.comparison, result.level))
    return found


def _slice_table(result: Evaluation, key: str, groups: Mapping[str, Metrics]) -> ReportTable:
    rows = []
    for value, metrics in groups.items():
        row = [value, str(metrics["exact_match"].n), *(with_interval(name, metrics[name]) for name in _SLICED)]
        rest = [measured.slices[key][value]["partial_accuracy"] for measured in result.baselines.values()]
        rows.append([*row, *(with_interval("", found) for found in rest)])
    columns = [key, "puzzles", *map(label, _SLICED), *(f"{label(name)}: partial accuracy" for name in result.baselines)]
    return ReportTable(f"by {key}", columns, rows)


def ways_table(title: str, ways: Mapping[str, Way], best: str, unit: str) -> ReportTable:
    """Set several ways of answering the same puzzles side by side; baselines take no tokens."""
    rows = []
    for name, way in ways.items():
        *shown, length = (way.metrics[metric] for metric in RULED)
        cost = number("length", length.mean) if length.mean else ""
        ece = number("", way.calibration.ece) if way.calibration else ""
        rows.append([label(name), *(with_interval("", metric) for metric in shown), cost, ece, change("", way.behind)])
    last = f"{label(best)} minus this (partial accuracy)"
    return ReportTable(title, ["way", *map(label, RULED[:-1]), f"{unit} a puzzle", "ECE", last], rows)


def _meaning_table(found: Meanings, by: str) -> ReportTable:
    rows = [[label(name), with_interval("", metric)] for name, metric in found.relations.items()]
    return ReportTable(f"what the types mean, {by} ({found.by})", ["answer is", "share of cells"], rows)


def _comparison_table(found: Comparison, level: float) -> ReportTable:
    rows = [
        [label(name, found.length_unit), number(name, metric.mean, "+"), interval(name, metric)]
        for name, metric in found.metrics.items()
    ]
    title = f"change against {found.other or 'the other run'}, {found.n} puzzles in both"
    return ReportTable(title, ["metric", "difference", f"{level:.0%} interval"], rows)


def details(result: Evaluation) -> list[ReportTable]:
    """Lay the longer tables of an evaluation out."""
    types = [
        [name, str(found.n), with_interval("", found)]
        + [with_interval("", measured.types.get(name)) for measured in result.baselines.values()]
        for name, found in result.measured.types.items()
    ]
    pairs = [pair for pair in result.confusion if pair.gold != pair.predicted][:_MOST_PAIRS]
    mistakes = [[pair.gold, pair.predicted, str(pair.count)] for pair in pairs]
    return [
        ReportTable("by cell type", ["type", "cells", "accuracy", *map(label, result.baselines)], types),
        ReportTable("most frequent mistakes", ["gold", "answered", "cells"], mistakes, left=(0, 1)),
    ]


def notes(result: Evaluation) -> list[str]:
    """Say what the tables of an evaluation do not show."""
    said = []
    if result.chance is not None:
        said.append(f"a random legal answer has a partial accuracy of {result.chance:.3f}")
    if result.illegal:
        said.append(f"answers that are not legal: {_counts(result.illegal)}")
    if result.outside_candidates:
        said.append(f"answers that name a type not among the candidates: {result.outside_candidates}")
    if found := result.calibration:
        said.append(
            f"calibration of the {label(found.of)}: expected calibration error {found.ece:.3f} ({found.n_bins} bins), "
            f"Brier score {found.brier:.3f} ({found.n} cells)"
        )
    if result.cost:
        spent = [(result.cost.tokens, "generated tokens"), (result.cost.prompt_tokens, "tokens of prompts")]
        spent.append((result.cost.scored or None, "scored beginnings"))
        said.append("a puzzle takes " + ", ".join(f"{mean:.1f} {what}" for mean, what in spent if mean is not None))
    if result.comparison and (test := result.comparison.mcnemar):
        said.append(
            f"exact match, McNemar: only the other run {test['only_first']}, only this one {test['only_second']}, "
            f"p = {test['p_value']:.3g}"
        )
    if result.ontology and result.ontology.unknown:
        said.append(f"names that the ontology lacks: {_counts(result.ontology.unknown)}")
    if result.ontology and result.ontology.distance:
        said.append(f"distance in the ontology: {with_interval('', result.ontology.distance)} edges")
    if result.judge and result.judge.n_failed:
        reasons = _counts(result.judge.failures or {})
        said.append(f"cells the judge gave no verdict on: {result.judge.n_failed}: {reasons}")
    if result.n_errors:
        said.append(f"not scored, the machinery failed: {result.n_errors} (run predict again)")
    if result.missing:
        said.append(f"not scored, no prediction: {len(result.missing)} items of the data set")
    return said


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items())


def terminal() -> Console:
    """Return the console for tables: as wide as the terminal, or as they need in a log, which has no width."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


def print_table(console: Console, table: ReportTable) -> None:
    """Print a table."""
    from rich import table as rich_table
    from rich.markup import escape

    shown = rich_table.Table(title=escape(table.title), title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="left" if i in table.left else "right")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def render(result: Evaluation, console: Console | None = None) -> None:
    """Print an evaluation as tables."""
    console = console or terminal()
    for table in tables(result):
        print_table(console, table)
    for note in notes(result):
        console.print(note, highlight=False, markup=False)


def to_markdown(result: Evaluation) -> str:
    """Write an evaluation as Markdown."""
    parts = ["# Evaluation", _bullets(f"{key}: {value}" for key, value in result.run.items())]
    for table in [*tables(result), *details(result)]:
        if table.rows:
            parts.append(f"## {_cell(table.title[:1].upper() + table.title[1:])}\n\n" + markdown(table))
    return "\n\n".join(filter(None, [*parts, _bullets(notes(result))])) + "\n"


def markdown(table: ReportTable) -> str:
    """Write a table as Markdown."""
    ruler = ["---" if i in table.left else "---:" for i in range(len(table.columns))]
    lines = [[*map(_cell, table.columns)], ruler, *([*map(_cell, row)] for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Escape what Markdown and the HTML in it would take for markup."""
    text = html.escape(" ".join(text.split()), quote=False)
    for mark in ("\\", "|", "*", "_", "`", "#"):
        text = text.replace(mark, "\\" + mark)
    return re.sub(r"\](?=[\[(:])", r"\\]", text)  # brackets are plain text but before these, and so intervals stay


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_cell(line)}" for line in lines)
