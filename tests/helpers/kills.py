"""Runs that are killed (SIGKILL) again and again: forks of a process that has imported everything, so each is cheap."""

from pathlib import Path
from typing import Any

from tests.helpers.processes import run_scenario

KILLS = 20
# Before a scenario; it leaves what it found in `found.json`.
_BEFORE = f"""
import json, os, signal, sys, time
from pathlib import Path

import numpy as np

from recipe.cello1.__main__ import main

folder = Path(sys.argv[1])


def fork(run):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            code = run()
        finally:
            os._exit(code)
    return child


def finish(run):
    start = time.monotonic()
    assert os.waitpid(fork(run), 0)[1] == 0
    return time.monotonic() - start


def at_once(run):
    children = [fork(run) for _ in range(2)]
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def kill_often(run, longest, look):
    rng, kills, found = np.random.default_rng(0), 0, []
    for _ in range({5 * KILLS}):
        child = fork(run)
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        found.append(look())
        # The machine may be slower now, or faster, than when `longest` was measured.
        if not killed:
            longest *= 0.7
        elif found[-2:-1] == found[-1:]:
            longest *= 1.2
        if kills == {KILLS}:
            return found
    raise AssertionError(f"killed {{kills}} times only")
"""


def kill_scenario(code: str, folder: Path) -> Any:
    """Run a scenario that kills."""
    return run_scenario(_BEFORE + code, folder)
