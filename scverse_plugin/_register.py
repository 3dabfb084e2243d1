"""Adds ``cello1_annotate`` to ``scanpy.tl``, which has no hook for this."""

from __future__ import annotations

from types import ModuleType
from typing import Any

_NAME = "cello1_annotate"


def register(module: ModuleType | Any | None = None) -> None:
    """Add the function to ``scanpy.tl``; a second call changes nothing."""
    from scverse_plugin.tl import annotate

    if module is None:
        import scanpy

        module = scanpy.tl
    there = getattr(module, _NAME, None)
    if there is not None and there is not annotate:
        owner = f"{getattr(there, '__module__', '')}.{getattr(there, '__qualname__', there)}"
        raise ImportError(f"scanpy.tl.{_NAME} is {owner} already; use scverse_plugin.tl.annotate")
    setattr(module, _NAME, annotate)
