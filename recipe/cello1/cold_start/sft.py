"""Fine-tune a model on puzzles with traces: the cold start, with TRL and PEFT.

``python -m recipe.cello1 sft model=MODEL train=DATA output=DIR [--config NAME] [key=value ...]``

Settings come from ``config/cello1_sft.yaml`` (the published ones), then from the files named with ``--config`` (a
path, or a name in ``config/sft``), then from the command line (``trainer.learning_rate=1e-4``, ``lora=null``). On
several GPUs start it with ``accelerate launch -m recipe.cello1.cold_start.sft ...``.

Files in the output folder: ``checkpoints``, ``log.jsonl`` (one line for each logging step), ``settings.json``, and at
the end ``model``: the trained model, adapters merged into the base, of the checkpoint with the best evaluation loss
(the last one where there is no evaluation).

Only what the model itself has to write and the end of turn after it are trained on. Prompt and completion go to TRL as
tokens, so that a prompt has the tokens here that it has in RL and prediction: formats/chat_template.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.cello1.cold_start.sft_data import ByLength, load_examples, split_evaluation, training_row
from recipe.cello1.formats.atomic import append_jsonl, held, read_items, sha256, write_items
from recipe.cello1.formats.chat_template import end_of_turn
from recipe.cello1.formats.model_folder import check_model_path, load_pickled, model_fingerprint, save_model
from recipe.cello1.formats.provenance import check_same_run, write_run
from recipe.cello1.formats.yaml_file import read_config
from recipe.cello1.task.prompt import check_layout
from recipe.cello1.task.puzzle import Puzzle

if TYPE_CHECKING:
    import torch

CONFIG = Path(__file__).parents[1] / "config"
_PATHS = ("model", "train", "output")
# What may change between two starts of one run.
_FREE = _PATHS  # what they lead to is hashed
_FREE_TRAINER = (
    "report_to",
    "logging_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "per_device_eval_batch_size",
    "save_steps",
    "eval_steps",
)
_CHECKPOINTS = "checkpoints"
_STATE = "trainer_state.json"
_SETTINGS = "settings.json"
_LOG = "log.jsonl"


# -------------------------------------------------------------------------------------------------------- settings


def load_settings(overrides: Sequence[str] = (), configs: Sequence[str] = ()) -> dict[str, Any]:
    """Read the settings.

    Parameters
    ----------
    overrides
        ``key=value``, dots for nested keys.
    configs
        Files to lay over the published settings: a path, or a name in ``config/sft``.

    Returns
    -------
    Plain nested dict.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a key is unknown, a required one is missing, or a value is unusable.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    base = read_config(CONFIG / "cello1_sft.yaml", "settings")
    merged = base
    for name in configs:
        path = Path(name) if Path(name).suffix in (".yaml", ".yml") else CONFIG / "sft" / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in (CONFIG / "sft").glob("*.yaml")))
            raise FileNotFoundError(f"config={name}: {path} does not exist; give a path, or one of {known}")
        merged = OmegaConf.merge(merged, read_config(path, "config"))
    paths, others = {}, []
    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark:
            raise ValueError(f"{text!r} is not of the form key=value")
        if key in _PATHS:  # as they are: read as YAML, which the rest is, " #" would begin a comment
            paths[key] = value
        else:
            others.append(text)
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(others))
        settings = {**OmegaConf.to_container(merged, resolve=True), **paths}
    except OmegaConfBaseException as error:
        raise ValueError(f"the settings cannot be read: {error}") from None
    _check_settings(settings, list(base.keys()))
    return settings


def _check_settings(settings: Mapping[str, Any], known: Sequence[Any]) -> None:
    if unknown := sorted(str(key) for key in settings if key not in known):
        raise ValueError(f"unknown settings {unknown}; known are {known}, and those of trl.SFTConfig under trainer")
    for key in _PATHS:
        if settings[key] in ("???", None, ""):
            raise ValueError(f"{key} is not set; add {key}=...")
    check_layout(settings["prompt_layout"])
    fraction = settings["eval_fraction"]
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction must be at least 0 and less than 1, got {fraction!r}")
    if settings["overlong"] not in ("error", "drop"):
        raise ValueError(f"overlong must be error or drop, got {settings['overlong']!r}")
    if settings["optimizer"] not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be adamw or muon, got {settings['optimizer']!r}")
    if settings["optimizer"] == "muon":
        if settings["adam_lr"] is None or not settings["adam_lr"] > 0:
            raise ValueError(f"adam_lr must be positive with optimizer=muon, got {settings['adam_lr']!r}")
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError("optimizer=muon needs whole matrices, and FSDP shards them; use optimizer=adamw")
    for key in ("max_length", "seed"):
        if isinstance(settings[key], bool) or not isinstance(settings[key], int) or settings[key] < 0:
            raise ValueError(f"{key} must be a non-negative number, got {settings[key]!r}")


# ---------------------------------------------------------------------------------------------------------- resume


def _latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the latest checkpoint to go on from, and remove later ones, which a kill left incomplete."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            found.append((int(number), path))
    for step, path in sorted(found, reverse=True):
        if _is_whole(path, step):
            for file in path.iterdir():
                if file.suffix in (".bin", ".pt", ".pth") and file.name != "training_args.bin":  # which nobody reads
                    load_pickled(
                        file, "no training wrote that; remove the checkpoint, or take another output", mmap=True
                    )
            return path
        if not path.resolve().is_relative_to(Path(folder).parent.resolve()):
            raise ValueError(f"output: {path} is incomplete, and lies elsewhere ({path.resolve()}); remove it yourself")
        shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path, step: int) -> bool:
    """Whether the state, which the trainer writes last, is there and complete, and training can go on from it."""
    try:
        state = json.loads((checkpoint / _STATE).read_bytes())
        ended = step == state.get("max_steps") and float(state.get("epoch") or 0) % 1
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
        return False
    return state.get("global_step") == step and not ended


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change between two starts of one run: settings, the data's hash, the number of processes."""
    fixed = {key: value for key, value in settings.items() if key not in _FREE}
    fixed["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in _FREE_TRAINER}
    fixed["sha256"] = {
        "model": model_fingerprint(settings["model"]) or settings["model"],
        "train": sha256(settings["train"]),
    }
    # With another number of processes an update would be over another number of puzzles.
    fixed["num_processes"] = int(os.environ.get("WORLD_SIZE", 1))
    return fixed


# -------------------------------------------------------------------------------------------------------- training


def train(settings: Mapping[str, Any]) -> Path:
    """Train, or go on training, and write the model.

    Parameters
    ----------
    settings
        What :func:`load_settings` returned.

    Returns
    -------
    Folder of the trained model in Hugging Face format.

    Raises
    ------
    FileNotFoundError
        If model or data do not exist.
    ValueError
        If data or settings are unusable, or the output folder belongs to a run with other settings.
    """
    # One of its processes is enough to keep other runs out: they would remove each other's checkpoints.
    alone = held(settings["output"], "output") if int(os.environ.get("RANK", 0)) == 0 else nullcontext()
    with alone:
        return _train(settings)


def _train(settings: Mapping[str, Any]) -> Path:
    output = Path(settings["output"])
    target = output / "model"
    if not Path(settings["train"]).is_file():
        msg = f"train={settings['train']} does not exist; give CellPuzzles JSON with traces, or parquet of such items"
        raise FileNotFoundError(msg)
    check_model_path(settings["model"])
    fixed = _fixed(settings)
    # A start that came to nothing, for want of memory for example, binds nobody.
    if target.is_dir() or any((output / _CHECKPOINTS).glob("checkpoint-*")):
        check_same_run(output / _SETTINGS, fixed, output)
    if target.is_dir():
        return target

    puzzles = load_examples(
        settings["train"],
        settings["prompt_layout"],
        settings["variant"],
        require_reasoning=settings["require_reasoning"],
    )
    trainer = _make_trainer(settings, puzzles)
    write_run(output / _SETTINGS, fixed)
    # The first process clears away what a kill left, before the others look.
    with trainer.accelerator.main_process_first():
        checkpoint = _latest_checkpoint(output / _CHECKPOINTS)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()
    # Where the weights are sharded, all processes have to take part in gathering them; the first one gets them.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if settings["lora"]:
            if weights is not None:  # PEFT cannot merge what is sharded
                model = _unsharded(settings, weights)
            model, weights = model.merge_and_unload(), None
        model.config.use_cache = True
        stored = _stored_dtype(settings)
        if weights is not None:
            weights = {name: weight.to(stored) for name, weight in weights.items()}
        save_model(target, model.to(stored), trainer.processing_class, weights)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process group that is left behind may keep a process from ending
    return target


def _unsharded(settings: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    """Return the base model with its adapters, holding the weights."""
    from peft import get_peft_model

    base = _load(settings)
    model = get_peft_model(base, _lora(settings["lora"]))
    model.load_state_dict(weights)
    return model


def _load(settings: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=_dtype(settings), trust_remote_code=False, weights_only=True
    )


def _make_trainer(settings: Mapping[str, Any], puzzles: Sequence[Puzzle]) -> Any:
    """Build the TRL trainer for puzzles."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer, PrinterCallback, set_seed
    from transformers import logging as hf_logging
    from trl import SFTConfig

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)

    own = settings["trainer"] or {}
    known = set(SFTConfig.__dataclass_fields__)
    taken = {"output_dir", "seed", "data_seed", "max_steps", "max_length", "completion_only_loss", "packing"}
    if bad := sorted(key for key in own if key not in known or key in taken):
        raise ValueError(f"trainer: {bad} cannot be set there; it takes the other fields of trl.SFTConfig")
    config = _config(settings, own)
    _shard_without_gpus()
    set_seed(settings["seed"])  # the trainer's own: adapters are initialised and dropout is drawn from it
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], trust_remote_code=False)
    train_data, eval_data = (Dataset.from_list(rows) for rows in _rows(puzzles, tokenizer, settings))
    trainer = _trainer_of_completions()(
        model=_load(settings),
        args=config,
        processing_class=tokenizer,
        train_dataset=train_data,
        eval_dataset=None if config.eval_strategy == "no" else eval_data,
        peft_config=_lora(settings["lora"]),
        optimizer_cls_and_kwargs=_optimizer(settings, config),
        callbacks=[_progress(Path(settings["output"]))],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trainer_of_completions() -> Any:
    """Return TRL's trainer, computing logits from the first token that is learnt on: prompts are most of a puzzle."""
    from transformers import Trainer
    from trl import SFTTrainer

    class CompletionTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if self.args.use_liger_kernel:  # makes no logits
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"]
            learnt = (labels != -100).any(dim=0).int()
            kept = labels.shape[1] - int(learnt.argmax()) + 1  # its logits are those of the token before
            inputs = inputs | {"labels": labels[:, -kept:], "logits_to_keep": kept, "use_cache": False}
            # Not TRL's own: it takes the entropy of every logit, and needs all of them.
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.args.train_sampling_strategy != "group_by_length":
                return super()._get_train_sampler(train_dataset)
            # The trainer's own draws from the process's state, and a resumed run would take other batches.
            lengths = [len(row) for row in self.train_dataset["input_ids"]]
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return ByLength(lengths, size, self.args.data_seed)

    return CompletionTrainer


def _optimizer(settings: Mapping[str, Any], config: Any) -> Any:
    """Return the optimizer and its options as the trainer takes them, or ``None`` for its own."""
    if settings["optimizer"] == "adamw":
        return None
    from recipe.cello1.cold_start.muon import MuonAdamW

    own = {"lr": config.learning_rate, "adam_lr": settings["adam_lr"], "weight_decay": config.weight_decay}
    return lambda: MuonAdamW, {**own, "betas": (config.adam_beta1, config.adam_beta2)}


def _config(settings: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """Return the trainer's settings: those of the user, and what follows from ours."""
    import torch
    from trl import SFTConfig

    evaluate = settings["eval_fraction"] > 0 and own.get("eval_strategy", "no") != "no"
    # Evaluation and saving must go together, or the best checkpoint may be one that was not saved.
    best = evaluate and own.get("eval_strategy") == own.get("save_strategy", "steps")
    return SFTConfig(
        **{
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "report_to": "wandb" if os.environ.get("WANDB_API_KEY") else "none",  # log.jsonl is written anyway
            "load_best_model_at_end": best,
            "metric_for_best_model": "eval_loss" if best else None,
            "greater_is_better": False if best else None,
            **own,
            "eval_strategy": own.get("eval_strategy", "no") if evaluate else "no",
            "output_dir": str(Path(settings["output"]) / _CHECKPOINTS),
            "seed": settings["seed"],
            "data_seed": settings["seed"],
            "max_steps": settings["max_steps"],
            "max_length": None,  # nothing is cut: _fit
            "gradient_accumulation_steps": _accumulation(own),
            "completion_only_loss": True,
        }
    )


def _rows(puzzles: Sequence[Puzzle], tokenizer: Any, settings: Mapping[str, Any]) -> list[list[dict[str, list[int]]]]:
    """Return the rows to train on and those to evaluate on, and make the end of turn what the tokenizer ends with."""
    tokenizer.eos_token = end = end_of_turn(tokenizer)
    rows = [training_row(p, tokenizer, end, settings["prompt_layout"], settings["variant"]) for p in puzzles]
    split = split_evaluation(len(rows), settings["eval_fraction"], settings["seed"])
    return [_fit([rows[i] for i in positions], positions, settings) for positions in split]


def _dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """Return the number format of the weights in training: in bfloat16 most of a small step would be rounded away."""
    import torch

    return getattr(torch, settings["dtype"] or ("bfloat16" if settings["lora"] else "float32"))


def _stored_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    """Return the number format of the trained model: that of the base model, unless one was asked for."""
    import torch
    from transformers import AutoConfig

    if settings["dtype"]:
        return getattr(torch, settings["dtype"])
    return AutoConfig.from_pretrained(settings["model"], trust_remote_code=False).dtype or torch.float32


def _accumulation(own: Mapping[str, Any]) -> int:
    """Return how many batches each process adds up, so that an update is over as many puzzles whatever their number."""
    total, processes = int(own.get("gradient_accumulation_steps", 1)), int(os.environ.get("WORLD_SIZE", 1))
    if total % processes:
        raise ValueError(
            f"trainer.gradient_accumulation_steps={total} counts the batches of all processes together, and cannot be "
            f"shared by {processes}; make it a multiple of that, or use another number of processes (NUM_GPUS)"
        )
    return total // processes


def _use_one_gpu() -> None:
    """Hide all GPUs but one from a process that is alone: the trainer would take them all, with a batch for each."""
    import torch

    if "WORLD_SIZE" not in os.environ and torch.cuda.device_count() > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def _shard_without_gpus() -> None:
    """Let accelerate shard a model over processes without GPUs: by itself it takes up FSDP on accelerators only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _fit(rows: list[dict[str, list[int]]], positions: Sequence[int], settings: Mapping[str, Any]) -> list[Any]:
    """Return the rows that are not too long, or refuse them all."""
    limit = settings["max_length"]
    lengths = [len(row["input_ids"]) for row in rows]
    long = [i for i, length in enumerate(lengths) if length > limit]
    if not long:
        return rows
    found = f"{len(long)} of {len(lengths)} items are longer than max_length={limit} tokens"
    if settings["overlong"] == "error":
        raise ValueError(
            f"{found} (item {positions[long[0]]} has {lengths[long[0]]}, the longest {max(lengths)}); "
            "raise max_length, or set overlong=drop to leave them out"
        )
    if len(long) == len(lengths):
        raise ValueError(f"{found}: none is left; raise max_length")
    print(f"left out: {found}", file=sys.stderr)
    return [row for row, length in zip(rows, lengths, strict=True) if length <= limit]


def _lora(settings: Mapping[str, Any] | None) -> Any:
    """Return PEFT's configuration, or ``None`` to train all weights."""
    if not settings:
        return None
    from peft import LoraConfig

    if unknown := sorted(key for key in settings if key not in LoraConfig.__dataclass_fields__):
        raise ValueError(f"lora: {unknown} are not settings of peft.LoraConfig")
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def _progress(output: Path) -> Any:
    """Return a callback that shows a progress bar and writes the log."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.is_world_process_zero:
                return
            # After a kill the log may be ahead of the checkpoint.
            log = output / _LOG
            if log.is_file():
                lines = read_items(log, drop_partial_tail=True)
                write_items(log, [line for line in lines if line["step"] <= state.global_step])
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="SFT", unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is not None:
                self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.bar is not None and logs:
                append_jsonl(output / _LOG, {"step": state.global_step, **logs})
                if "loss" in logs:
                    self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is not None:
                self.bar.close()

    return Progress()


# ------------------------------------------------------------------------------------------------------------ main


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--config", action="append", default=[], metavar="NAME", help="settings to lay over the published ones"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="model=, train= and output= are required")
    return parser


AFTER_INTERRUPT = "; run the same command again to resume from the last checkpoint"


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    _use_one_gpu()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_PROJECT", "cello1")  # as in config/cello1_base.yaml
    settings = load_settings(args.settings, args.config)
    done = (Path(settings["output"]) / "model").is_dir()
    target = train(settings)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{'already trained' if done else 'trained model'}: {target}", file=sys.stderr)
