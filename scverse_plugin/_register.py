"""Adds ``cello1_annotate`` to ``scanpy.tl``, which has no hook for this."""

from __future__ import annotations

from types import ModuleType
from typing import Any

NAME = "cello1_annotate"


def register(module: ModuleType | Any | None = None) -> None:
    """Add the function to ``scanpy.tl``; a second call changes nothing."""
    from scverse_plugin.tl import annotate

    if module is None:
        import scanpy

        module = scanpy.tl
    there = getattr(module, NAME, None)
    if there is not None and there is not annotate:
        owner = f"{getattr(there, '__module__', '')}.{getattr(there, '__qualname__', there)}"
        msg = f"scanpy.tl.{NAME} is {owner} already; use scverse_plugin.tl.annotate"
        raise ImportError(msg)
    setattr(module, NAME, annotate)
