"""What decides the puzzles made from a file: everything that is not where it lies or how fast it is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from recipe.cello1.data.context_table import ContextTable
from recipe.cello1.data.expression.reader import GeneLists
from recipe.cello1.task.gene_names import RANKS, compile_patterns
from recipe.cello1.task.prompt import VARIANTS, Variant


@dataclass(frozen=True, slots=True)
class PuzzleSettings(GeneLists):
    """What puzzles are wanted. The defaults are those of the published data."""

    # Seed of everything drawn
    seed: int = 1
    # Task variant, a key of ``recipe.cello1.task.prompt.VARIANTS``
    variant: Variant = "batch"
    # Numbers of cells in a puzzle; ``(1,)`` for the single-cell variants
    sizes: tuple[int, ...] = tuple(range(8, 16))
    # Puzzles of each size and file; 0 for as many as there are cells
    per_size: int = 40
    # Cells of a file that are drawn from; 0 for all
    max_cells: int = 20_000
    # Cells that express fewer genes are not used
    min_genes: int = 1
    # Value of ``suspension_type`` of the cells to use, or ``"any"``
    suspension: str = "cell"
    # Whether to use cells that other data sets have, too: those whose ``is_primary_data`` is False, and those that an
    # input before has
    keep_duplicates: bool = False
    # Columns of ``obs``. The batch column is used where a file has it
    type_column: str = "cell_type"
    donor_column: str = "donor_id"
    batch_column: str = "batch"
    # Regular expressions for types to leave out
    exclude_types: tuple[str, ...] = ()
    # Table of context fields
    context: ContextTable = field(default_factory=ContextTable)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.rank_by not in RANKS:
            raise ValueError(f"rank_by must be one of {', '.join(RANKS)}, got {self.rank_by!r}")
        limits = {"seed": 0, "per_size": 0, "max_cells": 0, "n_top": 1, "min_genes": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.min_genes > self.n_top:
            raise ValueError(f"min_genes={self.min_genes} must not be larger than n_top={self.n_top}")
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes must be different positive numbers, got {list(self.sizes)}")
        if self.single and self.sizes != (1,):
            raise ValueError(f"puzzles of a single cell have the size 1, got sizes {list(self.sizes)}")
        if self.layer is not None and self.use_raw:
            raise ValueError(f"layer={self.layer!r} and use_raw=True exclude each other; choose one")
        compile_patterns(self.exclude_genes)
        self.excluded_types(())

    @property
    def single(self) -> bool:
        """Whether each puzzle has one cell."""
        return self.variant.startswith("single")

    @property
    def open_ended(self) -> bool:
        """Whether no candidates are given."""
        return self.variant.endswith("open")

    def excluded_types(self, names: Iterable[str]) -> list[str]:
        """Find the types that are to be left out."""
        patterns = []
        for pattern in self.exclude_types:
            try:
                patterns.append(re.compile(pattern, re.IGNORECASE))
            except re.error as error:
                msg = f"exclude_types: {pattern!r} is not a regular expression ({error}); '|' is written as '\\|'"
                raise ValueError(msg) from None
        return [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
        return {**found, "context": self.context.source or "shipped table"}

    def rng(self, *words: str) -> np.random.Generator:
        """Make a random generator for one purpose."""
        digest = hashlib.sha256("\0".join([str(self.seed), *words]).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype="<u4").tolist())
