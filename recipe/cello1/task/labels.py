"""A column as codes and values: the one coding of types, donors, batches, groups and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipe.cello1.task.text import clean_value


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """A column of text as codes."""

    # int32, one for each row; -1 where the value is missing or says nothing
    codes: np.ndarray
    # The values, in order
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: np.ndarray) -> Labels:
        """Return some of the rows."""
        return Labels(self.codes[rows], self.categories)

    def value(self, row: int) -> str:
        """Return the value of a row, empty if missing."""
        code = self.codes[row]
        return self.categories[code] if code >= 0 else ""


def make_labels(
    values: Any, clean: Callable[[Any], str] = clean_value, order: Callable[[Iterable[str]], Sequence[str]] = sorted
) -> Labels:
    """Code a column by the form that ``clean`` gives its values; those that say nothing count as missing."""
    values = getattr(values, "cat", values)  # a pandas Series of categories
    if hasattr(values, "codes") and hasattr(values, "categories"):
        codes, names = np.asarray(values.codes, dtype=np.int64), _plain(np.asarray(values.categories))
    else:
        array = np.asarray(values) if hasattr(values, "dtype") else None
        if array is not None and array.dtype.kind in "biuf":
            distinct, codes = np.unique(array, return_inverse=True)
            names = _plain(distinct)
        else:
            entries = list(values) if array is None else array.tolist()
            first: dict[Any, int] = {}
            codes = np.fromiter((first.setdefault(entry, len(first)) for entry in entries), np.int64, len(entries))
            names = list(first)
    cleaned = [clean(name.decode(errors="backslashreplace") if isinstance(name, bytes) else name) for name in names]
    ordered = tuple(order({name for name in cleaned if name}))
    position = {name: i for i, name in enumerate(ordered)}
    # The entry after the last serves the code -1.
    lookup = np.array([*(position.get(name, -1) for name in cleaned), -1], dtype=np.int32)
    return Labels(lookup[codes], ordered)


def _plain(values: np.ndarray) -> list[Any]:
    """Return values that are written as they were given: as a Python float, a float32 would have a double's digits."""
    return list(map(str, values)) if values.dtype.kind == "f" else values.tolist()
