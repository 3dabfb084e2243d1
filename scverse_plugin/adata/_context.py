"""Donor metadata in ``obs`` to the context sentences of a puzzle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from recipe.cello1.task.answer import text_fault
from recipe.cello1.task.context import (
    CONTEXT_FIELDS,
    FIELD_RULES,
    TISSUE_KIND,
    FieldRule,
    build_context,
    names_type,
    rules_from_table,
)
from recipe.cello1.task.text import on_one_line
from scverse_plugin.adata._groups import obs_names

AUTO = "auto"  # made from columns


class ContextWriter:
    """Writes the context of the cells of one donor."""

    def __init__(
        self,
        adata: AnnData,
        context: str | Mapping[str, str] | None,
        keys: Sequence[str] | Mapping[str, Any] | None,
        samples: Sequence[str] | None,
        types: Sequence[str] = (),
    ) -> None:
        self._types = {name.lower() for name in types}
        self._kinds = _texts_of(adata.obs[TISSUE_KIND]) if TISSUE_KIND in adata.obs.columns else None
        self._texts: dict[str, str] | None = None
        self._rules: Mapping[str, FieldRule] = FIELD_RULES
        self.keys: tuple[str, ...] = ()
        self.differing: dict[str, None] = {}
        self.given = dict(context) if isinstance(context, Mapping) else context
        if not isinstance(context, str) or context != AUTO:
            if keys is not None:
                msg = "context and context_keys exclude each other; give the text, or the columns to make it from"
                raise ValueError(msg)
            self._texts = _texts("" if context is None else context, samples)
            return
        if keys is None:
            self.keys = tuple(name for name in CONTEXT_FIELDS if name in adata.obs.columns)
        else:
            self._read_keys(keys, adata)
        self._columns = {name: _texts_of(adata.obs[name]) for name in self.keys}

    def _read_keys(self, keys: Any, adata: AnnData) -> None:
        if isinstance(keys, str):
            raise ValueError(f"context_keys must be a list of obs columns, got the str {keys!r}; write [{keys!r}]")
        if isinstance(keys, Mapping):
            try:
                self._rules = rules_from_table(keys)
            except ValueError as error:
                raise ValueError(f"context_keys: {error}") from None
        self.keys = tuple(dict.fromkeys(map(str, keys)))
        for name in self.keys:
            if name not in adata.obs.columns:
                raise ValueError(f"context_keys: adata.obs has no column {name!r}; it has {obs_names(adata)}")
            if name not in CONTEXT_FIELDS and name not in self._rules:
                raise ValueError(
                    f"context_keys: no sentence is known for the column {name!r}; give it: "
                    f"context_keys={{{name!r}: 'The patient ... {{value}}.'}}"
                )

    def __call__(self, sample: str, cells: Sequence[int]) -> str:
        """Write the sentences."""
        if self._texts is not None:
            return self._texts.get(sample, self._texts.get("", ""))
        if not self._columns:
            return ""
        values: dict[str, str] = {}
        for name, column in self._columns.items():
            found = list(dict.fromkeys(column[list(cells)]))
            if len(found) == 1:
                values[name] = found[0]
            else:
                self.differing[name] = None
        kind = None if self._kinds is None else self._kinds[cells[0]]
        if names_type(values.get("tissue"), kind, self._types):
            values.pop("tissue", None)
        extra = [name for name in self.keys if name not in CONTEXT_FIELDS]
        return build_context(values, extra, self._rules)


def _texts_of(column: pd.Series) -> np.ndarray:
    """Write each different value of a column once, however many puzzles ask for it."""
    try:
        codes, values = pd.factorize(column)
    except TypeError:  # lists, for example, cannot be counted
        codes, values = np.arange(len(column)), column
    return np.array([*map(on_one_line, values), ""], dtype=object)[codes]  # the last one is for the code -1, no value


def _texts(context: str | Mapping[str, str], samples: Sequence[str] | None) -> dict[str, str]:
    if isinstance(context, Mapping):
        found = {str(sample): text for sample, text in context.items()}
        if samples is None:
            raise ValueError("context maps samples to texts, which needs sample_key")
        if lacking := [sample for sample in samples if sample not in found]:
            raise ValueError(f"context has no text for the samples {lacking}; give one for each sample ('' for none)")
    else:
        found = {"": context}
    for text in found.values():
        if text != "" and (fault := text_fault(text)):
            raise ValueError(f"context {fault}: {text!r}; give the sentences on one line")
    return found
