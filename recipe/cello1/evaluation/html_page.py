"""An evaluation as one HTML page that needs nothing else: figures, tables, plots and examples; no scripts."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.cello1.evaluation.report import details, interval, label, notes, number, tables
from recipe.cello1.evaluation.results import Evaluation
from recipe.cello1.formats.pages import render_page

_HEADLINES = ("partial_accuracy", "exact_match", "strict_accuracy", "legal")
_MOST_TYPES = 40  # types in the confusion picture


def to_html(result: Evaluation) -> str:
    """Write an evaluation as one HTML page."""
    shown = {label(name): result.measured.metrics[name] for name in _HEADLINES}
    shown |= {
        f"{label(name)}: {label('partial_accuracy')}": measured.metrics["partial_accuracy"]
        for name, measured in result.baselines.items()
    }
    headlines = [
        {"label": name, "value": number("", found.mean), "note": interval("", found)} for name, found in shown.items()
    ]
    if result.chance is not None:
        headlines.append({"label": "chance", "value": number("", result.chance), "note": "a random legal answer"})
    if found := result.calibration:
        note = f"of the {label(found.of)}: {found.n_bins} bins, {found.n} cells"
        headlines.append({"label": "expected calibration error", "value": number("", found.ece), "note": note})
    return render_page(
        Path(__file__).with_name("evaluation.html.j2"),
        title="Evaluation",
        headlines=headlines,
        run=[f"{key}: {value}" for key, value in result.run.items()],
        notes=notes(result),
        tables=tables(result),
        plots=list(filter(None, (_accuracy_by_n(result), _lengths(result), _reliability(result)))),
        confusion=_confusion(result),
        details=details(result),
        examples=result.examples,
    )


def _draw(title: str, below: str, paint: Callable[[Any], None], seen: str = "") -> dict[str, Any]:
    """Draw a small plot as SVG in the colours of the page; nothing in its texts is taken for markup."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cello1", "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        paint(axes)
        axes.set_xlabel(below)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=without)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", file.getvalue()[file.getvalue().index("<svg") :])
    return {"title": title, "seen": f"{title}: {seen}", "svg": Markup(svg.replace("#000000", "currentColor"))}


def _accuracy_by_n(result: Evaluation) -> dict[str, Any]:
    groups = {int(n): metrics["partial_accuracy"] for n, metrics in result.measured.slices["n_cells"].items()}

    def paint(axes: Any) -> None:
        for n, found in groups.items():
            axes.plot([n, n], [found.low, found.high], color="C0", linewidth=2)
            axes.plot([n - 0.3, n + 0.3], [1 / n, 1 / n], color="black", linestyle="--", linewidth=1)
        axes.plot(list(groups), [found.mean for found in groups.values()], "o", color="C0")
        axes.set_ylim(0, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)

    seen = ", ".join(f"{found.mean:.2f} at {n} (chance {1 / n:.2f})" for n, found in groups.items())
    return _draw("Partial accuracy by number of cells", "cells (dashed: chance)", paint, seen)


def _lengths(result: Evaluation) -> dict[str, Any]:
    def paint(axes: Any) -> None:
        axes.stairs(counts, edges, fill=True, color="C0", alpha=0.5)

    counts, edges = result.lengths["counts"], result.lengths["edges"]
    top = max(range(len(counts)), key=counts.__getitem__)
    seen = f"from {edges[0]:.0f} to {edges[-1]:.0f}, most from {edges[top]:.0f} to {edges[top + 1]:.0f}"
    return _draw("Length of the answers", result.length_unit, paint, f"{seen} {result.length_unit}")


def _reliability(result: Evaluation) -> dict[str, Any] | None:
    if not (found := result.calibration):
        return None

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
        for row in found.bins:
            x = row["confidence"]
            axes.plot([x, x], [row["accuracy_low"], row["accuracy_high"]], color="C0", linewidth=2)
            axes.plot([x], [row["accuracy"]], "o", color="C0")

    seen = ", ".join(f"{row['accuracy']:.2f} at confidence {row['confidence']:.2f}" for row in found.bins)
    title = f"Accuracy against confidence of the {label(found.of)} (ECE {found.ece:.3f})"
    return _draw(title, "confidence", paint, seen)


def _confusion(result: Evaluation) -> dict[str, Any]:
    names = list(result.measured.types)
    title = "Confusion (rows: gold, columns: answered, cells)"
    if len(names) > _MOST_TYPES:
        wrong: Counter[str] = Counter()
        for pair in result.confusion:
            if pair.gold != pair.predicted:
                wrong.update({pair.gold: pair.count, pair.predicted: pair.count})
        title += f": the {_MOST_TYPES} of {len(names)} types that are most often confused"
        names = sorted(sorted(names, key=lambda name: -wrong[name])[:_MOST_TYPES])
    others = list(dict.fromkeys(pair.predicted for pair in result.confusion if pair.predicted not in set(names)))
    columns = names + others[: _MOST_TYPES - len(names) + 1]
    counts = {(pair.gold, pair.predicted): pair.count for pair in result.confusion}
    rows = [(gold, [counts.get((gold, c), 0) for c in columns], result.measured.types[gold].n) for gold in names]
    return {"title": title, "columns": columns, "rows": rows if len(names) > 1 else []}
