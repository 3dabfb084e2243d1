"""A limit on what reading somebody's file may take."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
