"""Whether an output folder belongs to the run that is about to go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.cello1.files import atomic_write, dumps


def check_same_run(file: Path, wanted: Mapping[str, Any], output: str | Path) -> None:
    """Refuse to go on with other settings than those a run was started with.

    Parameters
    ----------
    file
        What :func:`write_run` wrote; without it every setting is right.
    wanted
        Settings of this start, nested.
    output
        The folder of the run, for the message.

    Raises
    ------
    ValueError
        If a setting differs, naming each with what it was and what it is now.
    """
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
    """Write the settings of a run.

    Parameters
    ----------
    file
        The file.
    settings
        The settings, nested.
    """
    atomic_write(file, dumps(settings, indent=1) + "\n")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
