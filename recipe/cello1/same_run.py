"""Whether an output folder belongs to the run that is about to go on in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.cello1.files import atomic_write, dumps, sha256

_SAMPLES = 64  # places of a file of weights that are read
_SAMPLE_BYTES = 1 << 16
_WEIGHTS = (".safetensors", ".bin")


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


def model_fingerprint(model: str | Path) -> str:
    """Tell models apart without reading all their weights.

    Parameters
    ----------
    model
        Folder, or name on the Hugging Face hub.

    Returns
    -------
    Hexadecimal SHA-256 over the files of the folder, whose weights are read in 64 places each; a name as it is.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (*_WEIGHTS, ".json")):
        content = _sampled(file) if file.suffix in _WEIGHTS else sha256(file)
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as weights:
        for number in range(_SAMPLES):
            weights.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
