"""Check the inputs of a training run before a model is loaded.

``python -m recipe.cello1 preflight --model MODEL --train TRAIN --val VAL --run OUTPUT --config NAME -- OVERRIDES``

Prints, each with a NUL after it, the two RL parquet files to train on: TRAIN and VAL themselves, or, where they are
puzzle JSON, their conversions in OUTPUT/data; then the hashes of both. Anything unusable ends with one line that says
what and why, before Ray is up.

OUTPUT/run.json holds what the run is: the composed configuration, hashes of the data, a fingerprint of the model. Once
there is a checkpoint or a model, another one is refused. What may change are the settings in ``FREE``, which do not
change what is computed. The number of steps may not: schedules of the learning rate depend on it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from recipe.cello1.formats.atomic import sha256
from recipe.cello1.formats.chat_template import prompt_ids, render_chat
from recipe.cello1.formats.model_folder import check_names, is_hub_name, model_fingerprint
from recipe.cello1.formats.provenance import check_same_run, write_run
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.formats.rl_parquet import (
    CHECKED,
    check_rl_parquet,
    iter_parquet,
    mark_checked,
    n_rows,
    write_rl_parquet,
)
from recipe.cello1.formats.rl_rows import row_question
from recipe.cello1.launch.batch_sizes import check_batches, check_lengths, check_rows, get
from recipe.cello1.launch.model_files import ModelFacts, read_model, refuse_own_code
from recipe.cello1.launch.resources import ask_cluster, check_cpus, check_disk, check_host_memory, check_memory
from recipe.cello1.rl.export import STEP_PREFIX, TRACKER, latest_step
from recipe.cello1.task.prompt import chat, check_layout

if TYPE_CHECKING:
    from omegaconf import DictConfig

_CONFIG = Path(__file__).parents[1] / "config"
RUN = "run.json"
# What the launchers set from their variables.
_VARIABLES = {
    "actor_rollout_ref.model.path": "MODEL",
    "data.train_files": "TRAIN_DATA",
    "data.val_files": "VAL_DATA",
    "hydra.run.dir": "OUTPUT",
    "trainer.default_local_dir": "OUTPUT",
}
# What may change between two starts of one run: paths (what they lead to is hashed), logging, saving, processes.
FREE = (
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.rollout.agent.num_workers",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "data.dataloader_num_workers",
    "data.filter_overlong_prompts_workers",
    "data.train_files",
    "data.val_files",
    "ray_kwargs",
    "reward.num_workers",
    "trainer.experiment_name",
    "trainer.log_val_generations",
    "trainer.logger",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep",
    "trainer.project_name",
    "trainer.rollout_data_dir",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.validation_data_dir",
)
_WEIGHTS = ("*.safetensors", "*.bin")
_N_RENDERED = 32  # prompts of each file
_TIMEOUT_S = 5


def check_model(model: str) -> Path | None:
    """Check that a model can be loaded from where it is said to be; return its folder, if it is here already."""
    folder = Path(model)
    if folder.is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            missing.append("*.safetensors")
        if missing:
            msg = f"MODEL={model} is not a complete Hugging Face model: it has no {', '.join(missing)}"
            raise FileNotFoundError(msg)
        check_names(folder)
        return folder
    if not is_hub_name(model):
        msg = f"MODEL={model} does not exist; give a folder in Hugging Face format, or a Hub id such as owner/name"
        raise FileNotFoundError(msg)
    from httpx import HTTPError
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(cached := try_to_load_from_cache(model, "config.json"), str):
        folder = Path(cached).parent  # of which the rest may be still to fetch
        return folder if (folder / "tokenizer_config.json").is_file() and any(folder.glob("*.safetensors")) else None
    try:
        found = file_exists(model, "config.json")
        reason = "the Hub has no such model"
    except (HfHubHTTPError, HTTPError, OSError) as error:
        found, reason = False, f"the Hub cannot be asked ({type(error).__name__})"
    if not found:
        msg = f"MODEL={model} is neither a folder nor in the local cache, and {reason}; correct the path or the id"
        raise FileNotFoundError(msg)
    return None


def check_prompts(model: str, file: Path, config: DictConfig) -> None:
    """Render prompts of a data set as the model will get them, and check that some of them are short enough."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"MODEL={model}: its tokenizer cannot be loaded: {' '.join(str(error).split())}") from None
    if template := get(config, "actor_rollout_ref.model.custom_chat_template"):
        tokenizer.chat_template = template
    lengths = []
    for row in islice(iter_parquet(file), 0, None, n_rows(file) // _N_RENDERED + 1):
        messages = row["prompt"]
        if (layout := config.data.prompt_layout) is not None:
            question, variant = row_question(row)
            messages = chat(question, check_layout(layout), variant)
        lengths.append(len(prompt_ids(tokenizer, render_chat(tokenizer, messages))))
    if min(lengths) > (limit := config.data.max_prompt_length):
        found = f"{min(lengths)} to {max(lengths)} tokens"
        raise ValueError(f"{file}: the prompts have {found} and data.max_prompt_length={limit}; raise it")


def check_wandb(config: DictConfig) -> None:
    """Check that Weights & Biases can be reached where the training is to log to it."""
    if "wandb" not in config.trainer.logger or os.environ.get("WANDB_MODE", "online") != "online":
        return
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    address = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(
            f"trainer.logger has wandb, and {address.hostname} cannot be reached ({error}); set WANDB_MODE=offline, or "
            "unset WANDB_API_KEY"
        ) from None


def check_platform() -> None:
    """Check that the platform asked for by ``VERL_PLATFORM`` is there."""
    wanted = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if not wanted:
        return
    from verl.plugin.platform import PlatformRegistry

    for plugin in entry_points(group="verl.plugins"):
        try:
            plugin.load()
        except Exception as error:  # a plugin is foreign code: whatever it raises is why training cannot start
            msg = f"the verl plugin {plugin.name} ({plugin.value}) cannot be loaded: {type(error).__name__}: {error}"
            raise ValueError(msg) from error
    if PlatformRegistry.get(wanted) is None:
        raise ValueError(
            f"VERL_PLATFORM={wanted}: no installed verl plugin registers it, only "
            f"{', '.join(PlatformRegistry.registered_names())} are; install the plugin, or unset VERL_PLATFORM"
        )
    if wanted == "cpu" and not entry_points(group="vllm.general_plugins", name="cello1_cpu"):
        raise ValueError(
            "VERL_PLATFORM=cpu: the installation lacks the vLLM plugin cello1_cpu, without which the first weight sync "
            "fails; install the repository again: python -m pip install --no-deps --editable ."
        )


def rl_data(path: str, split: str, out: str | Path) -> Path:
    """Give the RL parquet file of a data set, after checking every row of it."""
    if Path(path).suffix not in (".json", ".jsonl"):
        check_rl_parquet(path)
        return Path(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; correct the path")
    target = Path(out) / f"{split}.parquet"
    found = load_puzzles(path, require_gold=True)
    write_rl_parquet(target, found.puzzles, split, found.layout, found.variant)
    mark_checked(target)
    return target


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides of what the launcher sets itself: they would go past the checks of this module."""
    for override in overrides:
        if variable := _VARIABLES.get(override.lstrip("+~").partition("=")[0]):
            raise ValueError(f"{override} cannot be an override; set the variable {variable} instead")


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a training's configuration as verl will, without loading verl."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # pkg://verl.trainer.config, as the files say, would import verl, and that takes seconds.
    verl = importlib.util.find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        msg = "verl is not installed; install the set of this machine: source recipe/cello1/launch/setup_env.sh train"
        raise ValueError(msg)
    upstream = next(
        path for place in verl.submodule_search_locations if (path := Path(place) / "trainer" / "config").is_dir()
    )
    try:
        with hydra.initialize_config_dir(str(_CONFIG), version_base=None):
            return hydra.compose(name, overrides=[f'hydra.searchpath=["file://{upstream}"]', *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"the overrides cannot be applied: {' '.join(str(error).split())}") from None


def check_machine(config: DictConfig, facts: ModelFacts | None, output: Path) -> None:
    """Check that there is what a training takes; a cluster is asked what it has."""
    on_gpus = config.trainer.device == "cuda"
    if os.environ.get("RAY_ADDRESS"):
        check_cpus(config, ask_cluster())
    elif on_gpus:
        import torch

        wanted, found = config.trainer.n_gpus_per_node, torch.cuda.device_count()
        if found < wanted:
            raise ValueError(
                f"trainer.n_gpus_per_node={wanted}, and this machine has {found} GPUs; choose another HARDWARE, or set "
                "trainer.n_gpus_per_node"
            )
        check_cpus(config)
        if facts is not None:
            size = min(torch.cuda.get_device_properties(i).total_memory for i in range(wanted))
            check_memory(config, facts.n_parameters, size, psutil.virtual_memory().total)
    else:
        check_cpus(config)
        if facts is not None:
            check_host_memory(config, facts.n_parameters, psutil.virtual_memory().total)
    if facts is not None:
        check_disk(config, facts.n_parameters, output)


def run_identity(name: str, composed: DictConfig, model: str, train: str | Path, val: str | Path) -> dict[str, Any]:
    """Say what a run is."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(composed, resolve=False)
    for key in FREE:
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.get(parent) or {}
        place.pop(last, None)
    hashes = {"model": model_fingerprint(model) or model, "train": sha256(train), "val": sha256(val)}
    return {"name": name, "config": config, "sha256": hashes}


def check_run(output: str | Path, identity: dict[str, Any]) -> None:
    """Check that a run may go on in its folder, and write down what it is."""
    output = Path(output)
    # A start that came to nothing, with a mistyped setting for example, binds nobody.
    if (output / "model").exists() or any(output.glob(f"*/{TRACKER}")):
        check_same_run(output / RUN, identity, output)
    write_run(output / RUN, identity)


def check_resumed(output: Path, config: DictConfig) -> None:
    """Check that a training will go on from tensors alone: verl unpickles whatever its checkpoint holds."""
    if (mode := config.trainer.resume_mode) == "disable":
        return
    found = [file.parent / f"{STEP_PREFIX}{latest_step(file.parent)}" for file in output.glob(f"*/{TRACKER}")]
    if mode == "resume_path" and (chosen := get(config, "trainer.resume_from_path")):
        found = [output / str(chosen)]
    if found:
        from recipe.cello1.rl.sharded import check_shards

        for checkpoint in found:
            check_shards(checkpoint)


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder in Hugging Face format, or Hub id")
    parser.add_argument("--train", required=True, help="training data: RL parquet, or puzzle JSON/JSONL")
    parser.add_argument("--val", required=True, help="validation data, likewise")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run; converted data go to RUN/data")
    parser.add_argument("--config", required=True, help="name of the training's configuration, cello1_grpo for example")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="go on from a checkpoint of RUN even if it holds more than tensors, and could run code",
    )
    parser.set_defaults(rest=[])
    parser.epilog = "After -- come Hydra overrides of the training."
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_overrides(args.rest)
    folder = check_model(args.model)
    facts = None if folder is None else read_model(folder)
    train = rl_data(args.train, "train", args.run / "data")
    val = rl_data(args.val, "val", args.run / "data")
    config = compose(args.config, args.rest)
    check_rows(config, n_rows(train))
    check_batches(config)
    check_lengths(config, facts.config.get("max_position_embeddings") if facts else None)
    tokenizer = get(config, "actor_rollout_ref.model.tokenizer_path") or args.model
    for model in {args.model, tokenizer}:
        refuse_own_code(model)
    for file in (train, val):
        check_prompts(tokenizer, file, config)
    identity = run_identity(args.config, config, args.model, train, val)
    check_platform()
    check_wandb(config)
    check_machine(config, facts, args.run)
    check_run(args.run, identity)
    if not args.trust_checkpoint:
        check_resumed(args.run, config)
    found = (str(train), str(val), os.environ.get(CHECKED, ""), "")
    sys.stdout.buffer.write(os.fsencode("\0".join(found)))  # names as they are, unlike what a terminal is shown
