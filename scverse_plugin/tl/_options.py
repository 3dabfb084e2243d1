"""The options of ``tl.annotate`` in one place, checked as far as that goes without the data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from anndata import AnnData

from recipe.cello1.engines.protocol import Engine, Sampling
from recipe.cello1.task.prompt import EVIDENCE, Evidence, Layout, check_layout
from scverse_plugin.adata import _store
from scverse_plugin.adata._context import AUTO
from scverse_plugin.adata._groups import CELL_CHOICES
from scverse_plugin.adata._types import CellTypes
from scverse_plugin.method._ask import ON_ERROR
from scverse_plugin.method._calibrate import check_calibration
from scverse_plugin.method._engines import check_engine, check_start, opened
from scverse_plugin.method._readout import SUPPORTS

Price = float | tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """What the parameters of ``tl.annotate`` say; it documents them, and has their defaults."""

    cell_types: CellTypes | None
    groupby: str | None
    groups: Iterable[str] | None
    tissue: str | None
    organism: str | None
    evidence: Evidence
    refine: str | None
    sample_key: str | None
    reference: AnnData | None
    context: str | Mapping[str, str] | None
    context_keys: Sequence[str] | Mapping[str, Any] | None
    layer: str | None
    use_raw: bool | None
    gene_symbols: str | None
    mask_var: str | np.ndarray | None
    n_top_genes: int
    rank_by: Literal["expression", "specificity"]
    exclude_genes: Sequence[str]
    cells_per_group: int
    cell_choice: Literal["random", "representative"]
    n_votes: int
    puzzle_size: int | None
    n_candidates: int
    shuffle_candidates: bool
    decoys: Iterable[str]
    one_to_one: bool | Literal["auto"]
    support: Literal["auto", "votes", "readout"]
    min_support: float
    max_false: float | None
    back_off: bool
    calibration: Mapping[str, Any] | None
    unassigned: str
    model: str | Path | Sequence[str | Path] | None
    engine: str | Engine | Sequence[str | Engine]
    base_url: str | None
    engine_options: Mapping[str, Any] | None
    prompt_layout: Layout
    constrained: bool
    temperature: float
    top_p: float
    max_tokens: int
    reasoning_budget: int | None
    max_concurrency: int | None
    max_puzzles: int | None
    price_per_million_tokens: Price | None
    cache: str | Path | None
    on_error: Literal["raise", "skip"]
    store_reasoning: bool
    dry_run: bool
    rng: int | np.random.Generator
    progress: bool
    key_added: str
    copy: bool
    within: np.ndarray | None = None  # no parameter: the only cells that are labelled

    def __post_init__(self) -> None:
        _store.check_key(self.key_added)
        try:
            check_layout(self.prompt_layout)
        except ValueError as error:
            raise ValueError(f"prompt_layout: {error}") from None
        for name in ("groupby", "sample_key", "layer", "gene_symbols", "tissue", "organism", "refine"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be one name, a str, got {value!r}")
        if not isinstance(self.engine_options or {}, Mapping):
            raise ValueError(f"engine_options must be a dict ({{'max_model_len': 8192}}), got {self.engine_options!r}")
        self._check_numbers()
        for name, allowed in (
            ("evidence", tuple(EVIDENCE)),
            ("cell_choice", CELL_CHOICES),
            ("on_error", ON_ERROR),
            ("support", SUPPORTS),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.one_to_one not in (True, False, AUTO):
            raise ValueError(f"one_to_one must be True, False or 'auto', got {self.one_to_one!r}")
        if self.calibration is not None:
            check_calibration(self.calibration)
        if self.several:
            self.each()  # checks each of them
        else:
            engine, model = self.one_engine, self.one_model
            check_engine(engine, model=model, base_url=self.base_url, options=self.engine_options)
            if self.support == "readout" and self.engine == "openai":
                msg = "support='readout' needs probabilities, which a server does not give; use support='votes'"
                raise ValueError(msg)
        self.sampling()

    def _check_numbers(self) -> None:
        optional = ("puzzle_size", "max_concurrency", "max_puzzles")
        for name in ("cells_per_group", "n_votes", "n_candidates", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not _is_number(self.min_support) or not 0 <= self.min_support <= 1:
            raise ValueError(f"min_support must be a number between 0 and 1, got {self.min_support!r}")
        if self.max_false is not None and (not _is_number(self.max_false) or not 0 < self.max_false < 1):
            msg = f"max_false must be a share between 0 and 1 (0.05 for one label in 20), got {self.max_false!r}"
            raise ValueError(msg)
        if self.price_per_million_tokens is not None:
            prices = self.prices()
            if len(prices) != 2 or not all(_is_number(price) and 0 <= price < np.inf for price in prices):
                raise ValueError(
                    "price_per_million_tokens must be a number, or two (of the prompt, of the answer), "
                    f"got {self.price_per_million_tokens!r}"
                )
        whole = isinstance(self.rng, int | np.integer) and not isinstance(self.rng, bool)
        if not isinstance(self.rng, np.random.Generator) and not (whole and self.rng >= 0):
            msg = f"rng is {self.rng!r}; pass a seed (0 or more) or a numpy Generator, so that the run can be repeated"
            raise ValueError(msg)

    @property
    def one_engine(self) -> str | Engine:
        """The engine, of one of :meth:`each`."""
        return cast("str | Engine", self.engine)

    @property
    def one_model(self) -> str | Path | None:
        """The model, of one of :meth:`each`."""
        return cast("str | Path | None", self.model)

    def opened(self) -> AbstractContextManager[Engine]:
        """Start the engine, of one of :meth:`each`."""
        return opened(
            self.one_engine,
            self.one_model,
            base_url=self.base_url,
            constrained=self.constrained,
            max_concurrency=self.max_concurrency,
            options=self.engine_options,
        )

    def check_start(self) -> Any:
        """Find out whether the engine, of one of :meth:`each`, can be started; returns it or its class."""
        return check_start(self.one_engine, self.one_model, base_url=self.base_url, options=self.engine_options)

    @property
    def name(self) -> str:
        """What the model is called, of one of :meth:`each`."""
        return name_of(self.one_model, self.one_engine)

    @property
    def several(self) -> bool:
        """Whether a list of models is asked."""
        return any(isinstance(given, list | tuple) for given in (self.model, self.engine))

    def each(self) -> list[Options]:
        """Return the options of each model; a journal that is named becomes one for each."""
        if not self.several:
            return [self]
        models, engines = (list(x) if isinstance(x, list | tuple) else [x] for x in (self.model, self.engine))
        n = max(len(models), len(engines))
        if not models or not engines or {len(models), len(engines)} - {1, n}:
            raise ValueError(
                "model and engine must be lists of the same length, or one of them a single value, "
                f"got {len(models)} models and {len(engines)} engines"
            )
        pairs = list(zip(models * (n // len(models)), engines * (n // len(engines)), strict=True))
        if repeated := next((pair for i, pair in enumerate(pairs) if pair in pairs[:i]), None):
            raise ValueError(f"model: {name_of(*repeated)!r} is listed twice; list each model once")
        server = "openai" in engines  # the address is that of these
        return [
            replace(
                self,
                model=model,
                engine=engine,
                base_url=None if server and engine != "openai" else self.base_url,
                cache=_own(self.cache, name_of(model, engine), i),
            )
            for i, (model, engine) in enumerate(pairs)
        ]

    def prices(self) -> tuple[Any, ...]:
        """Return the prices of a million tokens of prompt and of answer."""
        given = self.price_per_million_tokens
        return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given, given)

    def sampling(self) -> Sampling:
        """Return how is sampled."""
        return Sampling(self.temperature, self.top_p, self.max_tokens, reasoning_budget=self.reasoning_budget)


def name_of(model: str | Path | None, engine: str | Engine) -> str:
    """Name a model."""
    return str(model if model is not None or isinstance(engine, str) else getattr(engine, "model", "engine"))


def safe_name(model: str) -> str:
    """Make the name of a model part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name)[:40] or "model"


def _own(cache: str | Path | None, name: str, number: int) -> str | Path | None:
    if cache is None or cache == AUTO:
        return cache
    path = Path(cache)
    return path.with_name(f"{path.stem}-{number + 1}-{safe_name(name)}{path.suffix}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
