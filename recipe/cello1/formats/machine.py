"""What a process may take of its machine: memory for somebody's file, and sockets that nobody else reaches."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_INTERFACES = {"GLOO_SOCKET_IFNAME": _INTERFACE, "NCCL_SOCKET_IFNAME": _INTERFACE}
# Variables that keep the sockets of a training or an engine on this machine.
ON_THIS_MACHINE = {"VLLM_HOST_IP": "127.0.0.1", "VERL_LOOPBACK_STORE": "1", **_INTERFACES}
# Read when Ray is imported. Ray then binds loopback, and TransferQueue and vLLM after it.
RAY_ON_THIS_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def free_memory() -> int | None:
    """Return how many bytes this process may still take; ``None`` where the system does not say."""
    found = []
    for path, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)\s*$", 1),
    ):
        with suppress(OSError):
            if said := re.search(pattern, Path(path).read_text()):
                found.append(int(said[1]) * unit)
    return min(found, default=None)


@contextmanager
def limited_memory(more: int | None = None) -> Iterator[None]:
    """Let what takes too much more, by default four fifths of what is free, end in ``MemoryError``, not in a kill."""
    free = free_memory() if more is None else more / 0.8
    status = Path("/proc/self/status")  # Linux alone has it
    used = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if free is None or used is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [int(used[1]) * 1024 + int(0.8 * free), *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
