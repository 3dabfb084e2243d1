"""Compiled functions: numba with the options that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function when it is first called, without the interpreter lock, and keep the result on disk."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no place for it: a read-only installation without a home
        return numba.njit(nogil=True)(function)
