"""What a thing was made from: whether it is the same as before, with which packages, by which workers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import atomic_write, dumps, read_json


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare how a thing was made with how it would be made now: the one rule of "is it the same as before"."""
    before, after = _flatten(was), _flatten(json.loads(dumps(now)))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if key not in before or key not in after or before[key] != after[key]
    }


def check_same(was: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to add to a file what is made in another way."""
    for key in (changed.partition(".")[0] for changed in changes(was, now)):
        raise ValueError(
            f"{where}: made with {key} {was.get(key)!r}, this run has {now.get(key)!r}; "
            "choose another out, or remove it to start again"
        )


def check_same_run(file: Path, wanted: Mapping[str, Any], output: str | Path) -> None:
    """Refuse to go on in a folder with other settings than those that its file holds."""
    if file.is_file() and (found := changes(read_json(file), wanted)):
        changed = ", ".join(f"{key} ({was!r}, now {now!r})" for key, (was, now) in found.items())
        raise ValueError(
            f"output={output} belongs to a run with other settings: {changed}; set them back, or choose another output"
        )


def write_run(file: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run."""
    atomic_write(file, dumps(settings, indent=1) + "\n")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def digest(value: Any, digits: int = 64) -> str:
    """Hash plain values: equal ones have the same digest in every process."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()[:digits]


NOT_INSTALLED = "not installed"


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Look the versions of packages up."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


def worker_variables() -> dict[str, str]:
    """Make the variables by which a worker finds this package also where it is not installed."""
    here = str(Path(__file__).parents[3])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
