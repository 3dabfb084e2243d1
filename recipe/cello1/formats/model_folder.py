"""Model folders in Hugging Face format: looked at before they are loaded, and written whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from recipe.cello1.formats.atomic import read_json, sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_POINTER = b"version https://git-lfs"
_WEIGHTS = (".safetensors", ".bin")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SAMPLES = 64  # places of a file of weights that are read
_SAMPLE_BYTES = 1 << 16


def is_hub_name(model: str) -> bool:
    """Tell names on the Hugging Face hub from paths, by their form alone."""
    return _HUB_NAME.fullmatch(model) is not None


def check_model_path(model: str) -> None:
    """Check that what looks like the path of a model folder is one."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            msg = f"model: {model} holds no config.json; give the folder of a model in Hugging Face format"
            raise FileNotFoundError(msg)
        check_names(path)
    elif not is_hub_name(model):
        msg = f"model: {model} does not exist; give a model folder, or a name on the Hugging Face hub (owner/name)"
        raise FileNotFoundError(msg)


def check_names(folder: Path) -> None:
    """Check that a model is made of its folder alone: of other files that its own may name nothing is loaded."""
    for file in sorted(folder.glob("*.json")):
        if not file.name.endswith((".index.json", "tokenizer_config.json")):
            continue
        found = read_json_object(file)
        weights = found.get("weight_map", {})
        names = [*weights.values()] if isinstance(weights, dict) else []
        # What a tokenizer was made from stands there in many models, and is read where there is such a file.
        names += [name for key, name in found.items() if key.endswith("_file") and (folder / str(name)).exists()]
        for name in (name for name in names if isinstance(name, str)):
            if not Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder)):
                raise ValueError(
                    f"model: {file} names {name!r:.200}, outside of its folder; remove that, or copy it in"
                )
    if (folder / "adapter_config.json").is_file():
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"model: {folder} has an adapter_config.json, for which {base!r:.200} would be loaded instead; give the "
            "base model here, and the adapter as lora"
        )


def refuse_pointer(file: Path) -> None:
    """Refuse what stands for a file that Git LFS has not fetched."""
    with open(file, "rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{file} is a pointer of Git LFS; fetch the file itself: git lfs pull")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model."""
    refuse_pointer(file)
    try:
        if isinstance(found := read_json(file), dict):
            return found
    except ValueError as error:
        raise ValueError(f"{error}; copy it again") from None
    raise ValueError(f"{file} must hold a JSON object, got {type(found).__name__}; copy it again")


def load_pickled(file: Path, remedy: str, *, trusted: bool = False, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read a file of torch: tensors, plain values and states of random generators, and nothing that runs."""
    import numpy as np
    import torch
    import torch.distributed.tensor  # (DTensor, as verl writes weights, is a tensor only then)

    rebuild = np.empty(0).__reduce__()[0]
    harmless = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    harmless.append(type(np.dtype(np.uint32)))
    logger = logging.getLogger("torch.distributed.device_mesh")  # of groups that nobody needs here
    level, mmap = logger.level, mmap and zipfile.is_zipfile(file)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # of protocols that torch does not write
            return torch.load(file, map_location="cpu", weights_only=not trusted, mmap=mmap)
    except UnpicklingError:
        raise ValueError(f"{file} holds more than tensors, and could run code; {remedy}") from None
    except (OSError, MemoryError):  # not the file's fault
        raise
    except Exception as error:  # a stranger's file makes the unpickler raise anything
        said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        raise ValueError(f"{file} cannot be read ({said:.300}); copy it again, if torch has written it") from None
    finally:
        logger.setLevel(level)


def model_fingerprint(model: str | Path) -> str:
    """Tell models apart without reading all their weights."""
    folder = Path(model)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (*_WEIGHTS, ".json", ".jinja")):
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


def save_folder(target: str | Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    name = uuid.uuid4().hex
    new, old = (target.with_name(f".{target.name}.{name}-{kind}.part") for kind in ("new", "old"))
    try:
        new.mkdir()
        write(new)
        for path in new.rglob(
            "*"
        ):  # weights are written for their owner alone; here they have the mode of any new file
            if path.is_file():
                path.chmod(new.stat().st_mode & 0o666)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_model(
    target: str | Path, model: Any, tokenizer: PreTrainedTokenizerBase, weights: Mapping[str, Any] | None = None
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder, atomically."""
    from transformers.utils import logging as hf_logging

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder, save_jinja_files=False)

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar for writing one file
    try:
        save_folder(target, write)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
