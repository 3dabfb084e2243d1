"""Whether a machine has what a training takes: processors, memory of GPUs and host, disk.

The arithmetic is that of verl with FSDP2: 4 bytes a parameter for weights in fp32, 8 for the states of Adam; a
checkpoint holds both. While responses are sampled, what is not offloaded lies beside vLLM's share of a GPU.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.cello1.launch.batch_sizes import get

if TYPE_CHECKING:
    from omegaconf import DictConfig

GB = 10**9
_LARGE = GB  # below, nothing is said of disk


def check_cpus(config: DictConfig, cluster: dict[str, float] | None = None) -> None:
    """Check that Ray has the logical processors that verl claims; with fewer it would wait for ever."""
    n_gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    units = get(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units") or 8
    wanted = units + 2 + 3 * n_gpus
    found = get(config, "ray_kwargs.ray_init.num_cpus") or len(os.sched_getaffinity(0))
    found, where = (found, "Ray") if cluster is None else (int(cluster.get("CPU", 0)), "the cluster of RAY_ADDRESS")
    if found < wanted:
        more = f"set ray_kwargs.ray_init.num_cpus={wanted}" if cluster is None else "give `ray start` --num-cpus"
        raise ValueError(
            f"verl's processes claim {wanted} logical CPUs ({units} storage units, 2, and 3 for each of {n_gpus} "
            f"GPUs), and {where} has {found}; {more} (they are only counted), or lower "
            "transfer_queue.backend.SimpleStorage.num_data_storage_units"
        )
    if cluster is not None and cluster.get("GPU", 0) < n_gpus:
        raise ValueError(
            f"trainer.nnodes x trainer.n_gpus_per_node = {n_gpus} GPUs, and the cluster of RAY_ADDRESS has "
            f"{cluster.get('GPU', 0):.0f}; start the other nodes, or lower them"
        )


def trained_bytes(config: DictConfig, n_parameters: int) -> dict[str, tuple[float, float]]:
    """Give, for each model that a training holds, the bytes that stay on the GPUs and those that wait in RAM."""
    adapters = bool(get(config, "actor_rollout_ref.model.lora_rank"))
    actor = "actor_rollout_ref.actor.fsdp_config"
    models = {"actor": (actor, n_parameters * _width(config, actor), 0 if adapters else n_parameters * 8)}
    if not adapters and (
        get(config, "actor_rollout_ref.actor.use_kl_loss") or get(config, "algorithm.use_kl_in_reward")
    ):
        ref = "actor_rollout_ref.ref.fsdp_config"
        models["reference"] = (ref, n_parameters * _width(config, ref), 0)
    if get(config, "algorithm.adv_estimator") == "gae":
        width = _width(config, "critic.fsdp")
        models["critic"] = ("critic.fsdp", n_parameters * width, n_parameters * 2 * width)
    found: dict[str, tuple[float, float]] = {}
    for name, (key, weights, states) in models.items():
        waiting = weights * bool(get(config, f"{key}.param_offload"))
        waiting += states * bool(get(config, f"{key}.optimizer_offload"))
        found[name] = (weights + states - waiting, waiting)
    return found


def _width(config: DictConfig, key: str) -> int:
    return 2 if str(get(config, f"{key}.model_dtype")) in ("bf16", "bfloat16", "fp16", "float16") else 4


def check_memory(config: DictConfig, n_parameters: int, gpu_bytes: int, host_bytes: int) -> None:
    """Check that models fit beside vLLM on each GPU, and what is offloaded into the memory of each node."""
    models = trained_bytes(config, n_parameters)
    nodes, each = config.trainer.nnodes, config.trainer.n_gpus_per_node
    share = float(get(config, "actor_rollout_ref.rollout.gpu_memory_utilization"))
    resident = sum(stay for stay, _ in models.values()) / (nodes * each)
    if resident + share * gpu_bytes > gpu_bytes:
        raise ValueError(
            f"a GPU would hold {resident / GB:.0f} GB of weights and optimizer states beside "
            f"{share * gpu_bytes / GB:.0f} GB for vLLM (gpu_memory_utilization={share}), and has "
            f"{gpu_bytes / GB:.0f} GB; take adapters (HARDWARE=1x80gb, 2x80gb or 1x140gb), offload, or use more GPUs"
        )
    _check_host(sum(wait for _, wait in models.values()) / nodes, "offloaded", host_bytes)


def check_host_memory(config: DictConfig, n_parameters: int, host_bytes: int) -> None:
    """Check that models fit into the memory of each node, where there are no GPUs."""
    _check_host(sum(map(sum, trained_bytes(config, n_parameters).values())) / config.trainer.nnodes, "all", host_bytes)


def _check_host(size: float, which: str, host_bytes: int) -> None:
    if size > host_bytes:
        remedy = {"offloaded": "turn param_offload or optimizer_offload off, or", "all": "take a smaller model, or"}[
            which
        ]
        raise ValueError(
            f"{size / GB:.0f} GB of {which} weights and optimizer states would wait in the memory of each node, "
            f"which has {host_bytes / GB:.0f} GB; {remedy}, or use more nodes"
        )


def check_disk(config: DictConfig, n_parameters: int, output: Path) -> None:
    """Say how much the checkpoints take, and refuse what the disk cannot hold."""
    each = {"actor": n_parameters * (4 if get(config, "actor_rollout_ref.model.lora_rank") else 12)}
    if get(config, "algorithm.adv_estimator") == "gae":
        each["critic"] = n_parameters * 3 * _width(config, "critic.fsdp")
    kept = {name: get(config, f"trainer.max_{name}_ckpt_to_keep") for name in each}
    there = len(list(output.glob("*/global_step_*")))
    total = sum(size * max(1, (kept[name] or 1) - there) for name, size in each.items())
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    size = sum(each.values()) / GB
    if total > free:
        msg = f"a checkpoint has {size:.0f} GB, {total / GB:.0f} GB are needed and {output} has {free / GB:.0f} GB free"
        raise ValueError(msg + "; choose another OUTPUT, or keep fewer: trainer.max_actor_ckpt_to_keep=1")
    if total > _LARGE:
        many = "all are kept" if not all(kept.values()) else f"{max(kept.values())} are kept"
        print(f"note: a checkpoint has {size:.0f} GB, {many}; {free / GB:.0f} GB are free", file=sys.stderr)


def ask_cluster() -> dict[str, Any]:
    """Ask the Ray cluster of ``RAY_ADDRESS`` what it has."""
    import ray

    host, _, port = os.environ["RAY_ADDRESS"].rpartition("/")[2].rpartition(":")
    try:
        if port.isdigit():  # Ray tries for more than a minute, in silence
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
        return ray.cluster_resources()
    except (OSError, RuntimeError, ValueError) as error:
        msg = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: {' '.join(str(error).split())}"
        raise ValueError(msg) from None
    finally:
        ray.shutdown()
