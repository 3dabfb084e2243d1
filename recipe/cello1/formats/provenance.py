"""Whether an output folder belongs to the run that is about to go on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import atomic_write, dumps


def check_same_run(file: Path, wanted: Mapping[str, Any], output: str | Path) -> None:
    """Refuse to go on with other settings than those a run was started with."""
    if not file.is_file():
        return
    now, was = _flatten(json.loads(dumps(wanted))), _flatten(json.loads(file.read_bytes()))
    if keys := sorted(key for key in {*now, *was} if now.get(key) != was.get(key)):
        changed = ", ".join(f"{key} ({was.get(key)!r}, now {now.get(key)!r})" for key in keys)
        msg = (
            f"output={output} belongs to a run with other settings: {changed}; set them back, or choose another output"
        )
        raise ValueError(msg)


def write_run(file: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run."""
    atomic_write(file, dumps(settings, indent=1) + "\n")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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
