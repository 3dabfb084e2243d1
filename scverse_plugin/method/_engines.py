"""Which engine answers, and how it is started: the network is never used for a model that runs in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipe.cello1.engines.openai import public_address as public_address
from recipe.cello1.engines.protocol import Engine
from recipe.cello1.engines.start import ENGINES, engine_class, start_engine
from recipe.cello1.formats.model_folder import check_model_path, is_hub_name
from recipe.cello1.formats.provenance import package_versions

_LIMIT = {"vllm": "max_num_seqs", "openai": "concurrency", "transformers": "batch_size"}
_PROTOCOL = ("name", "model", "fingerprint", "constraint", "generate", "close")


@contextmanager
def opened(
    engine: str | Engine,
    model: str | Path | None,
    *,
    base_url: str | None = None,
    constrained: bool = True,
    max_concurrency: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Engine]:
    """Start an engine, and close it at the end; an engine that was passed ready-made is left open."""
    if not isinstance(engine, str):
        check_engine(engine, model=model, base_url=base_url, options=options)
        yield engine
        return
    check_engine(engine, model=model, base_url=base_url, options=options)
    found: dict[str, Any] = dict(options or {}) | {"constrained": constrained}
    if max_concurrency is not None:
        found[_LIMIT[engine]] = max_concurrency
    if engine == "openai":
        # Which types a free answer names is looked at all the same.
        found["constrained"] = constrained and "prefer"
        started = start_engine(engine, str(model), base_url=base_url, **found)
    else:
        started = start_engine(engine, local_model(str(model)), **found)
    try:
        yield started
    finally:
        started.close()


def check_start(
    engine: str | Engine, model: str | Path | None, *, base_url: str | None, options: Mapping[str, Any] | None
) -> Any:
    """Find out whether an engine can be started, as far as that goes without loading a model; returns its class."""
    if not isinstance(engine, str):
        return engine
    cls = engine_class(engine, options or {})
    if engine != "openai" and find_spec(engine) is not None:
        check_model_path(local_model(str(model)))
    else:  # starts at once, or says that its package is missing
        with opened(engine, model, base_url=base_url, options=options):
            pass
    return cls


def check_engine(
    engine: object, *, model: str | Path | None, base_url: str | None, options: Mapping[str, Any] | None
) -> None:
    """Check the parameters that choose the engine, before any work is done."""
    if not isinstance(engine, str):
        if lacking := [name for name in _PROTOCOL if not hasattr(engine, name)]:
            raise ValueError(
                f"engine: {type(engine).__name__} has no {', '.join(lacking)}; give one of {', '.join(ENGINES)}, "
                "or an object like recipe.cello1.engines.protocol.Engine"
            )
        if model is not None or base_url is not None or options:
            msg = "model, base_url and engine_options go with the name of an engine; the engine object has its own"
            raise ValueError(msg)
        return
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)} or an engine object, got {engine!r}")
    if model is None or not str(model):
        raise ValueError(
            "model is missing; give the name that the server lists"
            if engine == "openai"
            else "model is missing; give the folder of a trained model, outputs/embedded/model for example"
        )
    if options and (twice := sorted({"model", "base_url"} & set(options))):
        raise ValueError(f"engine_options: {', '.join(twice)} is a parameter of its own; give it as such")
    if base_url is not None and engine != "openai":
        raise ValueError(f"base_url={base_url!r} goes with engine='openai', got engine={engine!r}")


def local_model(model: str) -> str:
    """Find a model on this machine; nothing is downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    named = is_hub_name(model)
    if named and (folder := _downloaded(model)):
        return folder
    remedy = (
        f"download it first: hf download {model}"
        if named
        else ("give the folder of a trained model, or, for one on a server, engine='openai' and base_url")
    )
    raise FileNotFoundError(f"model: there is no folder {model}; {remedy}")


def _downloaded(name: str) -> str:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        return ""
    try:
        return snapshot_download(name, local_files_only=True)
    except LocalEntryNotFoundError:
        return ""


def engine_version(engine: Engine) -> str:
    """Return the version of the package that an engine runs on; for a server, that of its client."""
    return package_versions((engine.name,))[engine.name] if engine.name in ENGINES else ""
