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

ROOT = Path(__file__).parents[2]
# Before a command: it runs with what verl, Ray and vLLM need on a machine without a GPU.
IN_CPU_ENVIRONMENT = ("bash", "-c", 'source "$0" && exec "$@"', str(ROOT / "recipe" / "cello1" / "cpu_env.sh"))
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
