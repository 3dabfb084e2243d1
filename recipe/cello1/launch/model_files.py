"""Whether a model folder is what it seems: whole, with an embedding for every token, and with numbers in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.formats.model_folder import read_json_object, refuse_pointer

# What is loaded: the first that is there. An index names the files of weights.
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_LONGEST_HEADER = 100_000_000  # bytes, as the format says
_SAMPLE = 1 << 16  # bytes at the begin, in the middle and at the end of each tensor that are looked at
_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {  # of NaN and infinity
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F16": (np.dtype("<u2"), 0x7C00),
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F64": (np.dtype("<u8"), 0x7FF << 52),
}


@dataclass(frozen=True)
class ModelFacts:
    """What preflight has to know of a model."""

    n_parameters: int
    config: Mapping[str, Any]


def read_model(folder: Path) -> ModelFacts:
    """Look at all files of a model folder; raise with the name of what is wrong."""
    for file in folder.iterdir():
        if file.is_file():
            refuse_pointer(file)
    config = read_json_object(folder / "config.json")
    read_json_object(folder / "tokenizer_config.json")
    if "quantization_config" in config:
        raise ValueError(f"{folder} has quantised weights, which cannot be trained; take the model they were made of")
    n_parameters, rows, names = 0, 0, set[str]()
    for file, wanted in _weight_files(folder).items():
        tensors = _tensors(file) if file.suffix == ".safetensors" else {}
        if tensors and (missing := sorted(wanted - {*tensors})):
            raise ValueError(f"{file} lacks {missing[0]}, which the index says it has; copy both again")
        names |= {*tensors}
        for name, tensor in tensors.items():
            n_parameters += math.prod(tensor["shape"])
            if name.endswith(("embed_tokens.weight", "wte.weight")):
                rows = next(iter(tensor["shape"]), 0)
    if rows and config.get("vocab_size", rows) != rows:
        said = f"{folder}/config.json says vocab_size={config['vocab_size']}"
        raise ValueError(f"{said}, and the model has {rows} embeddings; copy both from one checkpoint")
    if rows and config.get("tie_word_embeddings") is False and not any(n.endswith("lm_head.weight") for n in names):
        said = f"{folder}/config.json says tie_word_embeddings=false"
        raise ValueError(f"{said}, and there is no lm_head.weight, which would be random; set it to true, or save both")
    if rows and rows < (tokens := _n_tokens(folder)):
        raise ValueError(
            f"{folder}: the tokenizer has {tokens} tokens and the model {rows} embeddings; "
            "call model.resize_token_embeddings and save it again"
        )
    return ModelFacts(n_parameters, config.get("text_config") or config)


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Give the files of weights with the tensors that an index says they have."""
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder} has none of {', '.join(_WEIGHTS)}; give a whole model, with its weights")
    if first.suffix != ".json":
        return {first: set()}
    places = read_json_object(first).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{first} has no weight_map of names of files; copy it again")
    names = sorted(set(places.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(names)} files of weights, {missing[0]} first; copy them again"
        )
    return {folder / name: {tensor for tensor, place in places.items() if place == name} for name in names}


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


def _n_tokens(folder: Path) -> int:
    """Return one more than the highest id of a token."""
    if not (folder / "tokenizer.json").is_file():
        return 0
    content = read_json_object(folder / "tokenizer.json")
    try:
        vocabulary = (content.get("model") or {}).get("vocab", {})
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return (
            max([*map(index, ids), *(index(token["id"]) for token in content.get("added_tokens", []))], default=-1) + 1
        )
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer's; copy it again") from None


def _tensors(file: Path) -> dict[str, Any]:
    """Read the header of a safetensors file, and some of each tensor."""
    with open(file, "rb") as opened:
        size, length = file.stat().st_size, int.from_bytes(opened.read(8), "little")
        try:
            if length > min(size, _LONGEST_HEADER):
                raise ValueError
            tensors = {name: entry for name, entry in json.loads(opened.read(length)).items() if name != "__metadata__"}
            places = sorted((*map(index, entry["data_offsets"]),) for entry in tensors.values())
            end = 8 + length + places[-1][1]
            # One after another, as the format says: of tensors that all lie on one place, each would be read.
            ends = [0, *(last for _, last in places)]
            if any(first != before or last < first for before, (first, last) in zip(ends, places, strict=False)) or any(
                not isinstance(entry["dtype"], str) or min(map(index, entry["shape"]), default=0) < 0
                for entry in tensors.values()
            ):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file} is not a safetensors file, or it is cut off; copy it again") from None
        if end != size:
            raise ValueError(f"{file} has {size:,} of {end:,} bytes; copy it again")
        for name, entry in tensors.items():
            if entry["dtype"].startswith("F8_"):
                raise ValueError(f"{file}: {name} is quantised, which cannot be trained; take the model it was made of")
            if entry["dtype"] not in _EXPONENTS:
                continue
            kind, exponent = _EXPONENTS[entry["dtype"]]
            first, last = entry["data_offsets"]
            for begin in {first, first + (last - first) // 16 * 8, max(first, last - _SAMPLE)}:
                opened.seek(8 + length + begin)
                n = min(last - begin, _SAMPLE) // kind.itemsize
                bits = np.frombuffer(opened.read(n * kind.itemsize), dtype=kind)
                if ((bits & exponent) == exponent).any():
                    raise ValueError(f"{file}: {name} holds NaN or infinity; take an earlier checkpoint")
    return tensors
