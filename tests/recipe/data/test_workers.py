"""Processes and clusters: killed, lost, interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe.cello1.data import workers
from recipe.cello1.data.extract import process_file
from tests.helpers.prepare_runs import FEW, ROOT, content, manifest, run


@pytest.mark.integration
def test_a_ray_cluster_gives_the_same_bytes(folder, made, tmp_path):
    pytest.importorskip("ray")
    assert run(folder, "--out", tmp_path, "--raw", *FEW, "--ray-address", "local") == 0
    assert content(tmp_path) == content(made)


def test_a_ray_cluster_that_is_not_there(folder, tmp_path, capsys, monkeypatch):
    ray = pytest.importorskip("ray")

    def refuse(**options):
        assert options["address"] == "ray://nowhere:1"
        raise ConnectionError("no")

    monkeypatch.setattr(ray, "init", refuse)
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "ray://nowhere:1") == 1
    assert "no Ray cluster can be reached there" in capsys.readouterr().err


@pytest.mark.parametrize("kills", ["together", "always"])
def test_the_file_that_kills_a_worker_is_found_out(folder, tmp_path, capsys, monkeypatch, kills):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        """Does the work here and now; a process is "killed" by one of the files."""

        def __init__(self, workers, **options):
            self.workers, self.broken = workers, False

        def submit(self, function, job):
            future = Future()
            self.broken |= job.name == "lung/file1" and (kills == "always" or self.workers > 1)
            if self.broken:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(process_file(job))
            return future

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    status = run(folder, "--out", tmp_path, *FEW[:-1], "2")
    captured = capsys.readouterr()
    entries = {entry["name"]: entry for entry in manifest(tmp_path)["inputs"]}
    assert len(entries) == 3
    assert "lung/file1" in captured.err and "each of these is tried again alone" in captured.err
    bad = [name for name, entry in entries.items() if entry["status"] == "bad"]
    if kills == "always":
        assert (status, bad) == (1, ["lung/file1"])
        assert "the process that worked on it alone was killed" in entries["lung/file1"]["reason"]
        assert "bad   lung/file1" in captured.out
    else:
        assert (status, bad) == (0, [])


class FakeRay:
    """Does the work here and now; what comes of one of the files may be given."""

    def __init__(self, error: str = "", *arguments):
        self.exceptions = pytest.importorskip("ray").exceptions
        self.error = getattr(self.exceptions, error)(*arguments) if error else None
        self.jobs = {}

    def is_initialized(self) -> bool:
        return True

    def remote(self, function):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self.submit))

    def submit(self, job) -> str:
        self.jobs[job.name] = job
        return job.name

    def wait(self, waiting, num_returns):
        return waiting[:num_returns], waiting[num_returns:]

    def get(self, name):
        if self.error and name == "lung/file1":
            raise self.error
        with contextlib.chdir("/"):  # where the cluster was started
            return process_file(self.jobs[name])


@pytest.mark.parametrize("error", [("WorkerCrashedError",), ("OutOfMemoryError", "too much")])
def test_a_file_that_kills_its_process_on_ray_is_bad(folder, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setitem(sys.modules, "ray", FakeRay(*error))
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "auto") == 1
    entries = {entry["name"]: entry for entry in manifest(tmp_path)["inputs"]}
    assert [name for name, entry in entries.items() if entry["status"] == "bad"] == ["lung/file1"]
    assert "was killed, usually because memory ran out" in entries["lung/file1"]["reason"]
    assert "more memory" in entries["lung/file1"]["remedy"]
    assert "3 files: 2 used, 1 bad" in capsys.readouterr().out
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "auto", "--skip-bad") == 0


def test_a_ray_cluster_that_is_lost(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay("RaySystemError", "gone"))
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "auto", "--skip-bad") == 1
    assert "the Ray cluster lost the task" in capsys.readouterr().err


def test_relative_paths_hold_on_a_cluster_too(folder, made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.chdir(folder.parent)
    arguments = [os.path.relpath(folder), "--out", os.path.relpath(tmp_path), "--raw", *FEW, "--ray-address", "auto"]
    assert run(*arguments) == 0
    assert content(tmp_path) == content(made)


@pytest.mark.integration
def test_a_file_that_kills_its_process_on_a_real_cluster_is_bad(folder, tmp_path, monkeypatch):
    pytest.importorskip("ray")

    def killed(job, progress=None):
        if job.name == "lung/file1":
            os.kill(os.getpid(), signal.SIGKILL)
        return process_file(job, progress)

    monkeypatch.setattr(workers, "process_file", killed)
    assert run(folder, "--out", tmp_path, *FEW, "--ray-address", "local", "--skip-bad") == 0
    assert [entry["status"] for entry in manifest(tmp_path)["inputs"]] == ["used", "used", "bad"]


def test_progress_is_shown_unless_quiet(folder, tmp_path, capsys):
    few = [argument for argument in FEW if argument != "--quiet"]
    assert run(folder, "--out", tmp_path, *few) == 0
    shown = capsys.readouterr().err
    assert "files: 100%" in shown
    assert "cells:" in shown
    assert run(folder, "--out", tmp_path, *few, "--quiet", "--fresh") == 0
    assert "files:" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- ends of the parent


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, those of its workers' ends excepted."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(what, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(found)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found below /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_workers_end_with_their_parent(number):
    code = (
        "import multiprocessing, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from recipe.cello1.data.workers import _start_worker\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=(None,))\n"
        "    pool.submit(time.time).result()\n"
        "    print(1, flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"1\n"
        left = children_of(parent.pid)
        assert left
        parent.send_signal(number)
        parent.wait()
        assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found below /proc")
def test_an_interrupt_prints_one_line(folder, tmp_path):
    arguments = [sys.executable, "-m", "recipe.cello1", "prepare", folder, "--out", tmp_path, *FEW[:-1], "2"]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert wait_until(lambda: len(children_of(process.pid)) >= 3)  # the workers and the resource tracker
        time.sleep(0.5)  # at its imports
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines() == [
        "cello1 prepare: interrupted; files that were read are kept: run the same command again to resume"
    ]
