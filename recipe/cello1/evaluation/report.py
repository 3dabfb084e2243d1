"""An evaluation for people: its tables and notes, on the terminal and as Markdown.

They show what ``evaluate`` returns; :mod:`recipe.cello1.evaluation.html_page` makes a page of them.
Whatever comes from the model or the data is escaped: a response is shown, never obeyed.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipe.cello1.evaluation.voting_rules import RULED

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
_MEANINGS = {"ontology": "what the types mean, by ontology", "judge": "what the types mean, by a language model"}
_MOST_PAIRS = 15  # confusions listed in text

# ------------------------------------------------------------------------------------------------------------ tables


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1f}" if name == "length" else f"{value:.3f}"


def _interval(name: str, found: Mapping[str, Any]) -> str:
    return f"[{_number(name, found['low'])}, {_number(name, found['high'])}]"


def with_interval(name: str, found: Mapping[str, Any]) -> str:
    """Write an estimate."""
    return f"{_number(name, found['mean'])} {_interval(name, found)}"


def _heading(name: str, result: Mapping[str, Any]) -> str:
    return METRICS[name] + (f" ({result['length_unit']})" if name == "length" else "")


class Table:
    """A table in no particular format; the first column holds text, the others numbers."""

    def __init__(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.title = title
        self.columns = list(columns)
        self.rows = [list(row) for row in rows]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Lay an evaluation out as tables."""
    level = f"{result['level']:.0%} interval"
    found = [
        Table(
            f"{result['n']} puzzles, {result['n_answers']} answers",
            ["metric", "mean", level],
            [
                [_heading(name, result), _number(name, metric["mean"]), _interval(name, metric)]
                for name, metric in result["metrics"].items()
            ],
        )
    ]
    if rules := result.get("rules"):
        found.append(_rule_table(rules))
    found += [_relation_table(result[key], title) for key, title in _MEANINGS.items() if result.get(key)]
    if comparison := result.get("comparison"):
        found.append(_comparison_table(comparison))
    for key, groups in result["slices"].items():
        if len(groups) > 1:
            rows = [
                [value, str(metrics["cell_accuracy"]["n"]), *(with_interval(name, metrics[name]) for name in _SLICED)]
                for value, metrics in groups.items()
            ]
            found.append(Table(f"by {key}", [key, "puzzles", *(METRICS[name] for name in _SLICED)], rows))
    return found


def _rule_table(rules: Mapping[str, Any]) -> Table:
    rows = []
    for rule, metrics in rules.items():
        behind = metrics.get("behind")
        rows.append([rule, *(with_interval(name, metrics[name]) for name in RULED), _change(behind) if behind else ""])
    columns = ["rule", *(METRICS[name] for name in RULED), "consensus minus rule (cell accuracy)"]
    return Table("several answers to each puzzle, combined", columns, rows)


def _change(found: Mapping[str, Any]) -> str:
    if found["low"] is None:  # the same on every puzzle
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _relation_table(found: Mapping[str, Any], title: str) -> Table:
    by = found.get("version") or found.get("model")
    rows = [[name, with_interval("", metric)] for name, metric in found["relations"].items()]
    return Table(f"{title} ({by})", ["answer is", "share of cells"], rows)


def _comparison_table(comparison: Mapping[str, Any]) -> Table:
    rows = []
    for name, found in comparison["metrics"].items():
        mean = _number(name, found["mean"])
        rows.append([_heading(name, comparison), mean if mean.startswith("-") else f"+{mean}", _interval(name, found)])
    title = f"change against {comparison.get('with', 'the other run')}, {comparison['n']} puzzles in both"
    return Table(title, ["metric", "difference", f"{comparison['level']:.0%} interval"], rows)


def details(result: Mapping[str, Any]) -> list[Table]:
    """Lay the longer tables of an evaluation out."""
    return [_type_table(result), _mistakes(result)]


def _type_table(result: Mapping[str, Any]) -> Table:
    rows = [
        [name, str(found["n"]), f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"]
        for name, found in result["types"].items()
    ]
    return Table("by cell type", ["type", "cells", "accuracy"], rows)


def _mistakes(result: Mapping[str, Any]) -> Table:
    pairs = [pair for pair in result["confusion"] if pair["gold"] != pair["predicted"]][:_MOST_PAIRS]
    rows = [[pair["gold"], pair["predicted"], str(pair["count"])] for pair in pairs]
    return Table("most frequent mistakes", ["gold", "answered", "cells"], rows)


def notes(result: Mapping[str, Any]) -> list[str]:
    """Say what the tables of an evaluation do not show."""
    said = []
    if result["illegal"]:
        counts = ", ".join(f"{reason} {count}" for reason, count in result["illegal"].items())
        said.append(f"answers that are not legal (count as 0): {counts}")
    if result["outside_candidates"]:
        said.append(f"answers that name a type not among the candidates: {result['outside_candidates']}")
    if found := result.get("calibration"):
        said.append(
            f"calibration of the consensus: expected calibration error {found['ece']:.3f}, Brier score "
            f"{found['brier']:.3f} ({found['n']} cells)"
        )
    if test := result.get("comparison", {}).get("mcnemar"):
        said.append(
            f"exact match, McNemar: only the other run {test['only_first']}, only this one {test['only_second']}, "
            f"p = {test['p_value']:.3g}"
        )
    if (found := result.get("ontology")) and found["unknown"]:
        names = ", ".join(f"{name} {count}" for name, count in found["unknown"].items())
        said.append(f"names that the ontology has not: {names}")
    if (found := result.get("ontology")) and found["distance"]:
        said.append(f"distance in the ontology: {with_interval('', found['distance'])} edges")
    if (found := result.get("judge")) and found["n_failed"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in found["failures"].items())
        said.append(f"cells the judge gave no verdict on: {found['n_failed']}: {reasons}")
    if result["n_errors"]:
        said.append(f"not scored, the machinery failed: {result['n_errors']} (run predict again)")
    if result["n_missing"]:
        said.append(f"not scored, no prediction: {result['n_missing']} items of the data set")
    return said


def terminal() -> Console:
    """Return the console for tables: as wide as the terminal, or as they need in a log, which has no width."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def print_table(console: Console, table: Table) -> None:
    """Print a table."""
    from rich import table as rich_table
    from rich.markup import escape

    shown = rich_table.Table(title=escape(table.title), title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="right" if i else "left")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def render(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print an evaluation as tables."""
    console = console or terminal()
    for table in tables(result):
        print_table(console, table)
    for note in notes(result):
        console.print(note, highlight=False, markup=False)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Write an evaluation as Markdown."""
    parts = ["# Evaluation", *(_run_lines(result))]
    for table in [*tables(result), *details(result)]:
        if table.rows:
            parts.append(f"## {_cell(table.title[:1].upper() + table.title[1:])}\n\n" + _markdown(table))
    parts += _note_lines(result)
    return "\n\n".join(parts) + "\n"


def rules_markdown(result: Mapping[str, Any]) -> str:
    """Write only the table of the rules that combine several answers, and the notes, as Markdown."""
    if not result.get("rules"):
        msg = "no puzzle has several answers, so that there is nothing to combine; predict with --samples"
        raise ValueError(msg)
    return "\n\n".join([_markdown(_rule_table(result["rules"])), *_note_lines(result)])


def _markdown(table: Table) -> str:
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


def _note_lines(result: Mapping[str, Any]) -> list[str]:
    said = notes(result)
    return ["\n".join(f"- {_cell(note)}" for note in said)] if said else []


def _run_lines(result: Mapping[str, Any]) -> list[str]:
    run = result["run"]
    return ["\n".join(f"- {_cell(key)}: {_cell(str(value))}" for key, value in run.items())] if run else []
