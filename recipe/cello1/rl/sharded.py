"""Read the sharded weights of a verl checkpoint without verl, to check what was made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from recipe.cello1.formats.model_folder import load_pickled

_SHARDS = "model_world_size_*_rank_*.pt"
N_TOKENS = 64  # of the text that models are compared on


def find_world_size(actor: str | Path) -> int:
    """Learn from the names of its files of how many ranks a checkpoint is."""
    found = {re.sub(r".*world_size_(\d+)_rank.*", r"\1", path.name) for path in Path(actor).glob(_SHARDS)}
    if len(found) != 1 or not (size := next(iter(found))).isdigit():
        msg = f"{actor} must hold {_SHARDS} of one world size, found {sorted(found) or 'none'}; give one checkpoint"
        raise ValueError(msg)
    return int(size)


def load_shard(file: Path, *, trusted: bool = False, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the file of one rank: tensors, and nothing that runs, unless it is trusted."""
    remedy = "set trust_checkpoint (launchers: TRUST_CHECKPOINT=1) if you trust its maker"
    return load_pickled(file, remedy, trusted=trusted, mmap=mmap)


def check_shards(checkpoint: Path) -> None:
    """Refuse a checkpoint with a file that could run code when verl goes on from it: verl trusts them all."""
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*/*.pt")]):
        load_shard(file, mmap=True)


def load_shards(actor: str | Path, *, trusted: bool = False) -> dict[str, torch.Tensor]:
    """Put the weights of all ranks together; of groups of ranks that hold the same (hybrid sharding), the first."""
    from torch.distributed.tensor import DTensor

    world_size = find_world_size(actor)
    weights: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    rank, n_shards = 0, world_size
    while rank < n_shards:
        shard = load_shard(Path(actor) / f"model_world_size_{world_size}_rank_{rank}.pt", trusted=trusted)
        for name in list(shard):
            weight = shard.pop(name)
            placement = weight.placements[-1] if isinstance(weight, DTensor) else None
            n_shards = weight.device_mesh.shape[-1] if isinstance(weight, DTensor) else n_shards
            local = (weight._local_tensor if isinstance(weight, DTensor) else weight).float()
            if placement is not None and placement.is_shard():
                parts.setdefault(name, []).append(local)
                if rank == n_shards - 1:
                    weights[name] = torch.cat(parts.pop(name), dim=placement.dim)
            else:  # the same on every rank
                weights[name] = local
        rank += 1
    return weights


def round_weights(weights: MutableMapping[str, torch.Tensor]) -> None:
    """Round weights as verl's merger does when it writes them, in place, one by one: there may be no room for two."""
    for name in weights:
        weights[name] = weights[name].to(torch.bfloat16)


def merge_adapters(weights: MutableMapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """Add LoRA adapters to the weights they belong to."""
    merged = {}
    adapters = {name: weights.pop(name).float() for name in list(weights) if ".lora_" in name}
    for name in list(weights):
        weight = weights.pop(name).float()
        clean = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        stem = name.removesuffix(".base_layer.weight")
        if (down := adapters.get(f"{stem}.lora_A.default.weight")) is not None and stem != name:
            weight = weight + scaling * adapters[f"{stem}.lora_B.default.weight"] @ down
        merged[clean] = weight
    return merged


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """Run a model on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, N_TOKENS), generator=generator)
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits[0].float()


def compare_logits(model: str | Path, weights: Mapping[str, torch.Tensor], adapter: str | Path | None = None) -> float:
    """Compare a model folder with weights that it should hold."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False, weights_only=True
    )
    if adapter is None:
        found = logits(loaded)
    else:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(loaded, adapter)
        found = logits(adapted)
        loaded = adapted.unload()
    result = loaded.load_state_dict(dict(weights), strict=False)
    tied = set(getattr(loaded, "_tied_weights_keys", None) or ()) if loaded.config.tie_word_embeddings else set()
    if result.unexpected_keys or set(result.missing_keys) - tied:
        raise ValueError(
            f"{model} and the checkpoint do not have the same weights: missing {result.missing_keys[:3]}, "
            f"unexpected {result.unexpected_keys[:3]}"
        )
    wanted = logits(loaded)
    return float((found - wanted).norm() / wanted.norm())
