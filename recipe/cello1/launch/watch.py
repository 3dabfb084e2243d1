"""Run a training command with its output in a log file and its progress on the terminal.

``python -m recipe.cello1 watch --log train.log --metrics metrics/ -- python -m verl.trainer.main_ppo ...``

verl prints thousands of lines and, resumed, starts its metrics file anew. Here the lines go to ``--log`` (appended),
each attempt gets a metrics file of its own, which ``rl.run_metrics`` joins, and a failure ends with the
one line that says why. The command is stopped together with this process, and the end is reported when all processes
that it started are gone: no Ray cluster is left behind, and its memory is free for what comes next.

Unless ``RAY_ADDRESS`` names a cluster, the run meets no other: it has a temporary folder of its own, which goes with
it, its sockets have names of their own, and what listens for connections does so on this machine alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from recipe.cello1.formats.machine import ON_THIS_MACHINE, RAY_ON_THIS_MACHINE

METRICS_VARIABLE = "VERL_FILE_LOGGER_PATH"  # where verl's "file" logger writes one JSON line a step
METRICS_MARK = "@METRICS@"  # stands for that file in the command, for workers that do not inherit the environment
_TOTAL_STEPS = re.compile(rb"Total training steps: (\d+)")
# What Ray, vLLM and terminals put before a line or after it.
_DECORATION = re.compile(
    r"\x1b\[[\d;]*m|^(?:\([\w:.-]+ (?:rank=\d+ )?pid=\d+[^)]*\) *)+|"
    r"(?:ERROR|WARNING|INFO) \d\d-\d\d \d\d:\d\d:\d\d \[[^]]*\] *|\s*\[repeated \d+x across cluster\].*$"
)
_ERROR = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Died)(?:\(\w+\))?): ?(.*)")
# Errors that come of another error, or of stopping.
_FOLLOWS = re.compile(
    r"RayTaskError|RayActorError|ActorDiedError|ActorUnavailableError|WorkerCrashedError|OwnerDiedError|EngineDeadError|"
    r"BrokenPipeError|ConnectionResetError|CancelledError|KeyboardInterrupt|Engine core init|Worker failed with error|"
    r"Worker proc.* died"
)
# Causes after which errors of many other kinds come.
_FATAL = re.compile(r"No space left on device|(?i:out ?of ?memory)|`nan`|\bNaN\b")
_REQUEST = "Error in _run_prompt"  # verl, before the traceback of a request that failed
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1"  # after what Hydra refuses
_PR_SET_PDEATHSIG = 1  # prctl(2)
_POLL_S = 0.5
_LONGEST_TEMP = 24  # characters
_GRACE_S = 30  # Ray needs some seconds to take its processes down; then they are killed
# What the bar shows: verl's metric, label.
_SHOWN = (("critic/score/mean", "reward"), ("training/reward/partial_accuracy", "cells"), ("timing_s/step", "s/step"))


def failure_reason(log: str) -> str:
    """Find the line of a log that says why the run failed."""
    lines = [line for text in log.splitlines() if (line := _plain(text))]
    for line in lines:
        if _FATAL.search(line) and (_ERROR.match(line) or "No space left" in line):
            return line
    if causes := [line for line in lines if _is_cause(line)]:
        requests = [i for i, line in enumerate(lines) if line.startswith(_REQUEST) or f":{_REQUEST}" in line]
        if requests and _REQUEST in causes[-1]:  # from replay_buffer.py
            return f"{causes[-1]}: {next(filter(_is_cause, lines[requests[0] + 1 :]))}"
        return causes[-1]
    if errors := [line for line in lines if _ERROR.match(line)]:
        return errors[-1]
    refused = [i for i, line in enumerate(lines) if line.startswith(_HYDRA_HINT)]
    if refused and refused[-1]:
        return lines[refused[-1] - 1]
    return f"no line of the log says why; the last one is: {lines[-1]}" if lines else "it said nothing"


def _plain(line: str) -> str:
    while (bare := _DECORATION.sub("", line).strip()) != line:
        line = bare
    return line


def _is_cause(line: str) -> bool:
    return bool(_ERROR.match(line)) and not _FOLLOWS.search(line)


def own_environment(folder: str) -> dict[str, str]:
    """Make the variables that keep a run on this machine and apart from others; what is set already stays."""
    ours = {
        "RAY_TMPDIR": folder,
        **RAY_ON_THIS_MACHINE,
        **ON_THIS_MACHINE,
        "VERL_IPC_TAG": Path(folder).name,  # read by verl/utils/ipc_tag.py
    }
    return {**ours, **os.environ, "TMPDIR": folder}


@contextmanager
def _environment(attempt: Path) -> Iterator[dict[str, str]]:
    if os.environ.get("RAY_ADDRESS"):
        yield {**os.environ, METRICS_VARIABLE: str(attempt)}
        return
    # Ray's sockets have long names of their own, and the path of a socket may have 107 characters.
    parent = tempfile.gettempdir()
    parent = "/tmp" if len(parent) > _LONGEST_TEMP and os.access("/tmp", os.W_OK) else parent
    folder = tempfile.mkdtemp(prefix="cello1-", dir=parent)
    try:
        yield {**own_environment(folder), METRICS_VARIABLE: str(attempt)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for left in Path("/tmp").glob(f"rl-colocate-zmq-*{Path(folder).name}*"):  # verl's, at a fixed place
            left.unlink(missing_ok=True)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Processes:
    """All that a command has started, also what has left its group and its parents."""

    def __init__(self, command: subprocess.Popen, attempt: Path):
        self._command = command
        self._mark = str(attempt)
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        """See what is below the command now."""
        with suppress(psutil.Error):
            self._seen.update(psutil.Process(self._command.pid).children(recursive=True))

    def left(self) -> list[psutil.Process]:
        """Return those that are more than a zombie."""
        found = set(self._seen)
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # gone, or not ours to look into
                if process.environ().get(METRICS_VARIABLE) == self._mark:
                    found.add(process)
        return [process for process in found if _is_running(process)]

    def stop(self) -> None:
        """Take them all down."""
        with suppress(ProcessLookupError):
            os.killpg(self._command.pid, signal.SIGTERM)
        if not self._gone():
            with suppress(ProcessLookupError):
                os.killpg(self._command.pid, signal.SIGKILL)
            for process in self.left():
                with suppress(psutil.Error):
                    process.kill()
            self._gone()
        for process in self._seen:  # a process that is killed leaves its semaphores, named after it
            for semaphore in Path("/dev/shm").glob(f"sem.*-{process.pid}-*"):
                semaphore.unlink(missing_ok=True)

    def _gone(self) -> bool:
        deadline = time.monotonic() + _GRACE_S
        while self._command.poll() is None or self.left():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def _is_running(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _interrupted(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Bar:
    """A progress bar fed by the metrics file and, for its length, by the log."""

    def __init__(self, description: str):
        self._bar = tqdm(desc=description, unit="step", dynamic_ncols=True)
        self._offset = 0
        self._log_offset = 0
        self._nan = ""

    def update(self, metrics: Path, log: Path) -> None:
        """Read what has come since the last call."""
        if self._bar.total is None:
            with open(log, "rb") as file:
                file.seek(self._log_offset)
                if match := _TOTAL_STEPS.search(file.read()):
                    self._bar.total = int(match.group(1))
                    self._bar.refresh()
        if not metrics.exists():
            return
        with open(metrics, "rb") as file:
            file.seek(self._offset)
            for line in file.read().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                entry = json.loads(line)
                self._warn(entry)
                shown = {label: f"{entry['data'][key]:.2f}" for key, label in _SHOWN if key in entry["data"]}
                if shown:
                    self._bar.set_postfix(shown, refresh=False)
                    self._bar.n = entry["step"]
                    self._bar.refresh()

    def _warn(self, entry: dict[str, Any]) -> None:
        """Say, once, that something is no number any more: training goes on, in vain."""
        numbers = {key: value for key, value in entry["data"].items() if isinstance(value, float)}
        if not self._nan and (bad := [key for key, value in numbers.items() if math.isnan(value)]):
            self._nan = f"warning: {', '.join(bad[:3])}: NaN since step {entry['step']}; lower the learning rate"
            self._bar.write(self._nan, file=sys.stderr)

    def skip(self, log: Path) -> None:
        """Ignore what the log holds already."""
        self._log_offset = log.stat().st_size

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        self._bar.close()


def watch(
    command: Sequence[str],
    log: str | Path,
    metrics: str | Path,
    description: str = "training",
    parent: Callable[[], int] = os.getppid,
) -> int:
    """Run a command to its end."""
    log, metrics = Path(log), Path(metrics)
    log.parent.mkdir(parents=True, exist_ok=True)
    metrics.mkdir(parents=True, exist_ok=True)
    attempt = metrics.absolute() / f"attempt-{len(list(metrics.glob('attempt-*.jsonl'))):03d}.jsonl"
    with _environment(attempt) as environment:
        code, start = _run(command, log, attempt, description, environment, parent)
    if code:
        with open(log, "rb") as file:
            file.seek(start)
            reason = failure_reason(file.read().decode(errors="replace"))
        if code == -signal.SIGKILL:
            reason = f"it was killed by a user or, out of memory, by the system; {reason}"
        print(f"error: {description} failed (exit code {code}): {reason}\n  log: {log}", file=sys.stderr)
    # A shell reports death by signal k as 128 + k; sys.exit would fold the negative code into something meaningless.
    return code if code >= 0 else 128 - code


def _run(
    command: Sequence[str],
    log: Path,
    attempt: Path,
    description: str,
    environment: dict[str, str],
    parent: Callable[[], int],
) -> tuple[int, int]:
    """Run a command until it and all that it started have ended; give its code and where its log begins."""
    started_by = parent()
    bar = _Bar(description)
    with open(log, "ab") as sink:
        bar.skip(log)
        start = log.stat().st_size
        process = subprocess.Popen(
            [argument.replace(METRICS_MARK, str(attempt)) for argument in command],
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    processes = _Processes(process, attempt)
    previous = signal.signal(signal.SIGTERM, _interrupted)
    code = 130
    try:
        while process.poll() is None and parent() == started_by:
            time.sleep(_POLL_S)
            processes.look()
            bar.update(attempt, log)
        if process.poll() is not None:
            code = process.returncode
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
        processes.stop()
        bar.update(attempt, log)
        bar.close()
    return code, start


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True, help="file that the output is appended to")
    parser.add_argument("--metrics", required=True, help="folder for verl's metrics, one file an attempt")
    parser.add_argument("--description", default="training", help="label of the progress bar")
    parser.set_defaults(rest=[])
    parser.epilog = "After -- comes the command to run."
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return watch(args.rest, args.log, args.metrics, args.description)
