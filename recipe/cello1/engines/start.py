"""Which engines there are, and how one or several are started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from recipe.cello1.engines.protocol import EngineBase
from recipe.cello1.engines.ray import RayEngines

# Module and class of each engine. They are imported only when started: each needs its own packages.
ENGINES = {
    "vllm": ("recipe.cello1.engines.vllm", "VllmEngine"),
    "openai": ("recipe.cello1.engines.openai", "OpenAIEngine"),
    "transformers": ("recipe.cello1.engines.transformers", "TransformersEngine"),
}


def start_engine(name: str, model: str | Path, **options: Any) -> EngineBase:
    """Start an engine.

    Parameters
    ----------
    name
        A key of ``ENGINES``.
    model
        Folder of the model, or its name on the Hugging Face hub or server.
    **options
        Options of the engine, see its class.

    Returns
    -------
    The engine; close it after use (``with start_engine(...) as engine:``).

    Raises
    ------
    ValueError
        If there is no such engine, or it has no such option.
    FileNotFoundError
        If ``model`` is a path and nothing is there.
    EngineError
        If the engine cannot be started, its packages are missing for example.
    """
    return engine_class(name, options)(str(model), **options)


def engine_class(name: str, options: Iterable[str]) -> Any:
    """Find the class of an engine, and check that it has these options.

    Parameters
    ----------
    name
        A key of ``ENGINES``.
    options
        Names of options.

    Returns
    -------
    The class; nothing is loaded or started.

    Raises
    ------
    ValueError
        If there is no such engine, or it has no such option.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    module, cls = ENGINES[name]
    engine = getattr(import_module(module), cls)
    known = signature(engine).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in known):  # vLLM has options of its own
        names = [each.name for each in known if each.kind is each.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(names)):
            raise ValueError(
                f"engine_options: the engine {name!r} has no {', '.join(unknown)}; it has {', '.join(names)}"
            )
    return engine


def start_engines(name: str, model: str | Path, number: int = 1, **options: Any) -> EngineBase:
    """Start one engine, or several of the same kind side by side as Ray actors.

    Parameters
    ----------
    name, model, **options
        As for :func:`start_engine`.
    number
        How many.

    Returns
    -------
    An engine that stands for all of them; close it after use.

    Raises
    ------
    ValueError
        If there is no such engine, or ``number`` is not positive.
    FileNotFoundError
        If ``model`` is a path and nothing is there.
    EngineError
        If an engine cannot be started.
    """
    if number < 1:
        raise ValueError(f"number of engines must be at least 1, got {number}")
    if number == 1:
        return start_engine(name, model, **options)
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    # The actors have a working directory of their own.
    place = os.path.abspath(model) if os.path.exists(model) else str(model)
    if options.get("lora"):
        options["lora"] = os.path.abspath(options["lora"])
    return RayEngines(name, str(model), number, partial(start_engine, name, place, **options), **options)
