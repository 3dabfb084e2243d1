"""Turn the last checkpoint of a training run into a Hugging Face model.

``python -m recipe.cello1 export CHECKPOINTS --out MODEL``, or ``export ACTOR BASE OUT`` as the published conversion

CHECKPOINTS is the run's ``trainer.default_local_dir`` (the launchers': ``OUTPUT/grpo``), or one checkpoint below it
(``global_step_N/actor``). The sharded weights of any world size are merged by ``verl.model_merger``, adapters into the
base; the result is loaded and its logits are compared with those of the sharded weights; a model card says where it
comes from. Checkpoints of the published code hold the sharded weights alone: configuration and tokenizer are then those
of the base model. A checkpoint that holds more than tensors could run code: it is refused, unless you trust its maker.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recipe.cello1.formats.model_folder import check_model_path, save_folder
from recipe.cello1.formats.yaml_file import read_config
from recipe.cello1.rl.model_card import model_card
from recipe.cello1.rl.run_metrics import read_metrics
from recipe.cello1.task.text import shown

_SHARDS = "model_world_size_*.pt"
STEP_PREFIX = "global_step_"
FSDP_CONFIG = "fsdp_config.json"  # which the published code did not write yet
TRACKER = "latest_checkpointed_iteration.txt"  # written by verl once a checkpoint is complete
ADAPTER = "lora_adapter"  # where verl's merger puts adapters
# The model is compared with the weights rounded as it has them, so that a right one hardly differs: of the norm of its
# logits. A lost adapter or the weights of before the training, even after small steps, differ by more.
MAX_DIFFERENCE = 0.003


def latest_step(run: str | Path) -> int:
    """Find the step of the last complete checkpoint."""
    tracker = Path(run) / TRACKER
    if not tracker.is_file():
        msg = f"{run} has no {TRACKER}: no checkpoint was completed there; train first, or correct the path"
        raise FileNotFoundError(msg)
    said = tracker.read_text(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,15}", said):
        raise ValueError(
            f"{tracker} must hold the number of a step, got {shown(said)}; give one checkpoint below {run}"
        )
    return int(said)


def find_actor(run: str | Path, step: int | None = None) -> tuple[Path, int]:
    """Find the folder with the weights of a checkpoint and its step, by default the last; a checkpoint may be named."""
    run = Path(run)
    for folder in (run, run / "actor"):
        if (folder / FSDP_CONFIG).is_file() or any(folder.glob(_SHARDS)):
            name = folder.resolve().parent.name
            return folder, int(name[len(STEP_PREFIX) :]) if re.fullmatch(STEP_PREFIX + "[0-9]{1,15}", name) else 0
    step = latest_step(run) if step is None else step
    actor = run / f"{STEP_PREFIX}{step}" / "actor"
    if not actor.is_dir():
        numbers = (path.name[len(STEP_PREFIX) :] for path in run.glob(f"{STEP_PREFIX}*"))
        steps = sorted(int(number) for number in numbers if number.isdecimal())
        raise FileNotFoundError(f"{run} has no checkpoint of step {step}; it has {steps}")
    return actor, step


def export(
    run: str | Path,
    out: str | Path,
    step: int | None = None,
    *,
    base: str | None = None,
    keep_adapter: bool = False,
    trust_checkpoint: bool = False,
    config: str | Path | None = None,
    metrics: str | Path | None = None,
) -> Path:
    """Merge the sharded weights of a checkpoint; ``base`` is what was trained, where a checkpoint does not say."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out: {out} exists; remove it or choose another folder")
    actor, step = find_actor(run, step)
    if base is not None:
        check_model_path(base)
    elif any(actor.glob(_SHARDS)) and not (actor / FSDP_CONFIG).is_file():
        raise FileNotFoundError(
            f"{actor} has no {FSDP_CONFIG} (checkpoints of the published code have none); set base to the model that "
            "was trained"
        )

    if not trust_checkpoint:
        from recipe.cello1.rl.sharded import load_shard

        for file in actor.glob(_SHARDS):
            load_shard(file, mmap=True)

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as completed:
            source = actor if base is None else _complete(actor, base, Path(completed))
            _merge(source, folder, actor, trust_checkpoint)
        difference = _finish(folder, actor, keep_adapter, trust_checkpoint)
        if not difference < MAX_DIFFERENCE:  # also if it is not a number
            msg = f"the logits of the exported model differ from those of {actor} by {difference:.3f} of their norm"
            raise RuntimeError(msg)
        card = model_card(_read_config(config), read_metrics(metrics) if metrics else [], step, difference)
        (folder / "README.md").write_text(card, encoding="utf-8")

    save_folder(out, write)
    return out


def _complete(actor: Path, base: str, folder: Path) -> Path:
    """Make a checkpoint without configuration one that verl's merger reads: links to its shards, and what it lacks."""
    from transformers import AutoConfig, AutoTokenizer

    from recipe.cello1.rl.sharded import find_world_size

    for file in actor.glob(_SHARDS):
        (folder / file.name).symlink_to(file.resolve())
    (folder / FSDP_CONFIG).write_text(json.dumps({"FSDP_version": 1, "world_size": find_world_size(actor)}))
    for kind in (AutoConfig, AutoTokenizer):
        kind.from_pretrained(base, trust_remote_code=False).save_pretrained(folder / "huggingface")
    return folder


def _merge(source: Path, folder: Path, actor: Path, trusted: bool) -> None:
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(source)]
    command += ["--target_dir", str(folder)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": str(int(not trusted))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"verl.model_merger failed on {actor}: {last}")


def _finish(model: Path, actor: Path, keep_adapter: bool, trusted: bool = False) -> float:
    """Merge the adapter, if there is one, and compare the logits."""
    from recipe.cello1.rl.sharded import compare_logits, load_shards, merge_adapters, round_weights

    adapter, scaling = model / ADAPTER, None
    if adapter.is_dir():
        settings = json.loads((adapter / "adapter_config.json").read_text())
        scaling = settings["lora_alpha"] / settings["r"]
        if not keep_adapter:
            _merge_adapter(model, adapter)
    weights = load_shards(actor, trusted=trusted)
    round_weights(weights)
    if scaling is None:
        return compare_logits(model, weights)
    weights = merge_adapters(weights, scaling)
    if keep_adapter:
        return compare_logits(model, weights, adapter)
    round_weights(weights)
    return compare_logits(model, weights)


def _merge_adapter(model: Path, adapter: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False, weights_only=True)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(model)
    shutil.rmtree(adapter)


def _read_config(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from omegaconf import OmegaConf

    return OmegaConf.to_container(read_config(path, "config"), resolve=False)


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="trainer.default_local_dir of the run, or one checkpoint (global_step_N/actor)")
    parser.add_argument("base_out", nargs="*", metavar=("BASE", "OUT"), help="--base and --out, as published")
    parser.add_argument("--out", help="folder of the model; must not exist")
    parser.add_argument("--base", help="model that was trained, for checkpoints of the published code")
    parser.add_argument("--step", type=int, help="step to export (default: the last complete one)")
    parser.add_argument("--keep-adapter", action="store_true", help="leave LoRA adapters beside the base model")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read it even if it holds more than tensors, and could run code"
    )
    parser.add_argument(
        "--config", help="composed configuration of the run (HYDRA_DIR/.hydra/config.yaml), for the card"
    )
    parser.add_argument("--metrics", help="metrics folder of the run, for the card")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    given = [*args.base_out] or [args.base, args.out]
    if len(given) != 2 or given[1] is None or (args.base_out and (args.base or args.out)):
        msg = "give the model's folder: `export RUN --out OUT`, or `export ACTOR BASE OUT` for published checkpoints"
        raise ValueError(msg)
    options = {name: getattr(args, name) for name in ("keep_adapter", "trust_checkpoint", "config", "metrics")}
    print(export(args.run, given[1], args.step, base=given[0], **options))
