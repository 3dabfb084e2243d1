"""The orders in which puzzles of several sizes may come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIZE_ORDERS = ("ascending", "descending", "mixed")


def check_order(order: str) -> str:
    """Return ``order`` if it is one of ``SIZE_ORDERS``."""
    if order not in SIZE_ORDERS:
        raise ValueError(f"order must be one of {', '.join(SIZE_ORDERS)}, got {order!r}")
    return order


def order_by_size(sizes: Sequence[int], order: str, rng: np.random.Generator) -> list[int]:
    """Order puzzles by their number of cells; those of one size come in random order."""
    check_order(order)
    # mixed: every stretch holds the same mix of sizes as the whole; otherwise the reward of a step says more about how
    # many small, easy puzzles it got than about the model. The k-th of n of a size stands at (2k + 1) / 2n of the way.
    by_size: dict[int, list[int]] = {}
    for position in rng.permutation(len(sizes)).tolist():
        by_size.setdefault(int(sizes[position]), []).append(position)
    if order == "mixed":
        places = [
            ((2 * k + 1) / (2 * len(by_size[size])), size, position)
            for size in sorted(by_size)
            for k, position in enumerate(by_size[size])
        ]
        return [position for _, _, position in sorted(places)]
    return [position for size in sorted(by_size, reverse=order == "descending") for position in by_size[size]]
