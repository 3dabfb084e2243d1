"""Whether a model folder is what it seems: whole, with an embedding for every token, and with numbers in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_POINTER = b"version https://git-lfs"
_INDEX = "model.safetensors.index.json"
_SAMPLE = 1 << 16  # bytes of each tensor that are looked at
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}  # of NaN and infinity


@dataclass(frozen=True)
class ModelFacts:
    """What preflight has to know of a model."""

    n_parameters: int
    config: Mapping[str, Any]


def read_model(folder: Path) -> ModelFacts:
    """Look at all files of a model folder; raise with the name of what is wrong."""
    config = _json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX).is_file():
        wanted = sorted(set(_json(folder / _INDEX).get("weight_map", {}).values()))
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(wanted)} files of weights, {missing[0]} first; copy them again"
            )
        files = [folder / name for name in wanted]
    n_parameters, rows = 0, 0
    for file in files:
        for name, tensor in _tensors(file).items():
            n_parameters += int(np.prod(tensor["shape"]))
            if name.endswith(("embed_tokens.weight", "wte.weight")):
                rows = tensor["shape"][0]
    if rows and rows < (tokens := _n_tokens(folder)):
        raise ValueError(
            f"{folder}: the tokenizer has {tokens} tokens and the model {rows} embeddings; "
            "call model.resize_token_embeddings and save it again"
        )
    return ModelFacts(n_parameters, config.get("text_config", config))


def refuse_own_code(model: str) -> None:
    """Refuse a model that brings code: a part of verl (its reward loop) reads the tokenizer of any model trustingly."""
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    parts = {
        "config.json": PretrainedConfig.get_config_dict(model)[0],
        "tokenizer_config.json": get_tokenizer_config(model),
    }
    if named := [name for name, part in parts.items() if part.get("auto_map")]:
        raise ValueError(
            f"MODEL={model} brings code of its own (auto_map in {' and '.join(named)}), which verl would run; if "
            "transformers knows the model without it, remove the entry from a copy"
        )


def _json(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    if content.startswith(_POINTER):
        raise ValueError(f"{file} is a pointer of Git LFS; fetch the file itself: git lfs pull")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from None


def _n_tokens(folder: Path) -> int:
    """Return one more than the highest id of a token."""
    if not (folder / "tokenizer.json").is_file():
        return 0
    content = _json(folder / "tokenizer.json")
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([*ids, *(token["id"] for token in content.get("added_tokens", []))], default=-1) + 1


def _tensors(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file, and the begin of each tensor."""
    with open(file, "rb") as opened:
        start = opened.read(len(_POINTER))
        if start.startswith(_POINTER):
            raise ValueError(f"{file} is a pointer of Git LFS; fetch the file itself: git lfs pull")
        size, length = file.stat().st_size, int.from_bytes(start[:8], "little")
        opened.seek(8)
        try:
            if length > size:
                raise ValueError
            tensors = {name: entry for name, entry in json.loads(opened.read(length)).items() if name != "__metadata__"}
            end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not a safetensors file, or it is cut off; copy it again") from None
        if end != size:
            raise ValueError(f"{file} has {size:,} of {end:,} bytes; copy it again")
        for name, entry in tensors.items():
            if (known := _EXPONENTS.get(entry["dtype"])) is None:
                continue
            kind, exponent = known
            first, last = entry["data_offsets"]
            opened.seek(8 + length + first)
            bits = np.frombuffer(opened.read(min(last - first, _SAMPLE)), dtype=kind)
            if ((bits & exponent) == exponent).any():
                raise ValueError(f"{file}: {name} holds NaN or infinity; take an earlier checkpoint")
    return tensors
