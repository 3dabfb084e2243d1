# Copyright 2025 Individual Contributor: the cello1 authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""CPU platform: trains and rolls out on the host's own cores, without an accelerator.

Select it with ``VERL_PLATFORM=cpu``. It is never chosen by auto-detection ahead of an accelerator: a machine with a GPU
keeps its GPU platform. Collectives run over gloo, FSDP2 shards host memory, and one logical "GPU" of Ray stands for one
training process, so that verl's placement logic works unchanged.
"""

import os
import resource
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from ...utils import ipc_tag, loopback_store


def _resident_bytes() -> int:
    """Return the resident set size of this process in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes(device: Any = None) -> int:
    """Return the largest resident set size this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _CpuDeviceModule(ModuleType):
    """``torch.cpu`` with the part of the ``torch.cuda`` interface that verl calls on every device.

    ``torch.cpu`` has no memory, naming or RNG functions. Memory figures are those of the process (resident set size),
    which is what "device memory" means where the device is the host.
    """

    def __init__(self):
        super().__init__("verl_cpu_device", doc=self.__doc__)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)
    memory_allocated = memory_reserved = staticmethod(lambda device=None: _resident_bytes())
    max_memory_allocated = max_memory_reserved = staticmethod(_peak_resident_bytes)
    reset_peak_memory_stats = staticmethod(lambda device=None: None)
    empty_cache = ipc_collect = staticmethod(lambda: None)

    @staticmethod
    def set_device(device: Any) -> None:
        """Accept any index: every rank computes on the one host."""

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "CPU"

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Return free and total memory of the host in bytes."""
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


_device_module = _CpuDeviceModule()


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Platform backend for hosts without an accelerator."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        # EngineRegistry.get_engine_cls asks for the vendor right before it looks an engine up. That is the moment to
        # register ours: verl.workers.engine is loaded by then, while loading it with the plugin would cost every
        # verl process, down to the storage actors, some ten seconds.
        from ...workers.engine.fsdp import cpu_impl

        cpu_impl.register_engines()
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Every host has a CPU, so answering True would win over a GPU that registers later: opt in by VERL_PLATFORM.
        return False

    def current_device(self) -> str:
        # An index would be read as "cuda:<index>" by Tensor.to(); the device type is the one valid name for the host.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        # Ray hands out its logical GPUs through this variable, and verl's workers read their index from it.
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        # A logical resource: `ray_init.num_gpus` says how many training processes the host shall carry.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        # No device handles to pass on: weights reach the rollout through shared memory.
        return False

    def cudart(self) -> Any:
        return None


ipc_tag.apply()
loopback_store.apply()
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from ...utils import distributed_cpu

    distributed_cpu.apply()
