"""Processes that tests start: their environment, a free port, a vLLM server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recipe import cello1

ROOT = Path(cello1.__file__).parents[2]
# Before a command: it runs with what verl, Ray and vLLM need on a machine without a GPU.
IN_CPU_ENVIRONMENT = ("bash", "-c", 'source "$0" && exec "$@"', str(ROOT / "recipe/cello1/launch/cpu_env.sh"))
# A prompt cut in two makes vLLM turn a seeded request's random generator back, which CPU generators refuse.
_SERVER_FLAGS = ("--enforce-eager", "--dtype", "float32", "--no-enable-chunked-prefill")
_SERVER_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def environment() -> dict[str, str]:
    """The variables of this process, with the repository on the import path."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths}


def launch(script: str, output: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a launcher of the recipe to its end, in the environment of these tests."""
    return subprocess.run(
        ["bash", str(ROOT / "recipe" / "cello1" / script), *arguments],
        env=launcher_environment(output, **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def launcher_environment(output: Path, **variables: str) -> dict[str, str]:
    """The variables of a launcher: those given, and none that this process happens to have."""
    foreign = ("MODEL", "TRAIN_DATA", "VAL_DATA", "HARDWARE", "NNODES", "NUM_GPUS", "SMOKE", "SEED")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    # The tests' own interpreter is the environment to train in, whether or not it was activated.
    venv = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {**kept, **venv, "OUTPUT": str(output), **variables}


def processes_of(folder: Path) -> dict[int, str]:
    """The processes that have a folder in their command line or their variables, as all those of a training run do."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if str(folder).encode() in command + (process / "environ").read_bytes():
                found[int(process.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_scenario(code: str, folder: Path) -> Any:
    """Run a script with a folder as its argument; returns what it has left in `found.json` there."""
    script = folder / "scenario.py"
    script.write_text(code)
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=environment(), timeout=900)
    return json.loads((folder / "found.json").read_text())


@contextmanager
def served(command: Sequence[str], log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run a `vllm serve` line with a `--port` of this machine; gives the address of the API, and the process."""
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    run = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:], *_SERVER_FLAGS]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            run, stdout=output, stderr=output, env={**_SERVER_ENVIRONMENT, **environment()}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(1)
        yield f"{url}/v1", server
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(60)
        kill_group(server)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process with those it has started: a server's engine would outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
