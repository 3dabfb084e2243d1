"""The table that says which metadata columns become context sentences, and how: the shipped one and a user's YAML.

::

    fields:                       # a column, and what its values become; forms: task.context.FieldRule
      treatment: "The patient received {value}."
    datasets:                     # which columns the files of a folder have; "*" stands for every folder
      my_study: [treatment, ever_smoker]

A folder is the one that a file lies in, as in the published pipeline. Entries win over the shipped ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.cello1.formats.yaml_file import read_yaml
from recipe.cello1.task.context import DATASET_FIELDS, FIELD_RULES, FieldRule, build_context, rules_from_table

EVERY_FOLDER = "*"


@dataclass(frozen=True, slots=True)
class ContextTable:
    """Columns and their sentences."""

    # How each column is written
    rules: Mapping[str, FieldRule] = field(default_factory=lambda: dict(FIELD_RULES))
    # Columns of the files in a folder, by the folder's name
    datasets: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(DATASET_FIELDS))
    # What the user's file says, empty without one: it decides the bytes of the output, so the manifest has it
    source: str = ""

    def extra(self, folder: str) -> tuple[str, ...]:
        """Return the extra columns of the files in a folder, in the order of their sentences."""
        return tuple(dict.fromkeys((*self.datasets.get(folder, ()), *self.datasets.get(EVERY_FOLDER, ()))))

    def sentences(self, values: Mapping[str, Any], folder: str) -> str:
        """Write the context of a cell."""
        return build_context(values, self.extra(folder), self.rules)


def load_context_table(path: str | Path | None) -> ContextTable:
    """Read a user's table on top of the shipped one."""
    if path is None:
        return ContextTable()
    table = read_yaml(path, "context table")
    if not isinstance(table, Mapping) or not set(table) <= {"fields", "datasets"}:
        found = sorted(map(str, table)) if isinstance(table, Mapping) else type(table).__name__
        raise ValueError(f"{path} must have the keys 'fields' and 'datasets' (or one of them), found {found}")
    try:
        rules = rules_from_table(table.get("fields") or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    datasets = dict(DATASET_FIELDS)
    own = table.get("datasets") or {}
    if not isinstance(own, Mapping):
        msg = f"{path}: 'datasets' must give a list of columns for each folder ('*' for every one), got {own!r}"
        raise ValueError(msg)
    for folder, columns in own.items():
        if isinstance(columns, str) or not isinstance(columns, Sequence):
            raise ValueError(f"{path}: datasets: {folder!r} must list column names, got {columns!r}")
        datasets[str(folder)] = tuple(map(str, columns))
        if unknown := [name for name in datasets[str(folder)] if name not in rules]:
            msg = f"{path}: datasets: {folder!r} names the columns {unknown}, which have no entry under fields"
            raise ValueError(msg)
    return ContextTable(rules, datasets, Path(path).read_text(encoding="utf-8"))
