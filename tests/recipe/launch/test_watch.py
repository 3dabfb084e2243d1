import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from recipe.cello1.launch import watch as module
from recipe.cello1.launch.watch import failure_reason, watch
from recipe.cello1.rl.run_metrics import read_metrics
from tests.helpers.cli import command

pytestmark = pytest.mark.slow

main = command("watch")

STEPS = """
    import json, os
    print("Total training steps: 3")
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
        for step in (1, 2, 3):
            file.write(json.dumps({"step": step, "data": {"critic/score/mean": step / 10}}) + "\\n")
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_output_goes_to_the_log_and_metrics_are_joined(tmp_path, capfd):
    assert watch(python(STEPS), tmp_path / "log", tmp_path / "metrics") == 0
    assert "Total training steps: 3" in (tmp_path / "log").read_text()
    assert read_metrics(tmp_path / "metrics") == [{"step": k, "critic/score/mean": k / 10} for k in (1, 2, 3)]
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err and "reward=0.30" in err


def test_each_attempt_keeps_its_metrics_and_the_later_one_counts(tmp_path):
    for attempt, steps in enumerate([{1: 0.1, 2: 0.2}, {2: 0.7, 3: 0.8}]):
        lines = [json.dumps({"step": step, "data": {"x": value}}) for step, value in steps.items()]
        (tmp_path / f"attempt-{attempt:03d}.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "da')
    assert read_metrics(tmp_path) == [{"step": 1, "x": 0.1}, {"step": 2, "x": 0.7}, {"step": 3, "x": 0.8}]


def test_failure_ends_with_the_exit_code_and_the_reason(tmp_path, capfd):
    code = main(["--log", str(tmp_path / "log"), "--metrics", str(tmp_path / "m"), "--", *python("{}['lost key']")])
    assert code == 1
    assert "KeyError: 'lost key'" in capfd.readouterr().err


def test_reason_is_of_this_attempt_only(tmp_path, capfd):
    (tmp_path / "log").write_text("ValueError: of an earlier attempt\n")
    assert watch(python("import sys; sys.exit(3)"), tmp_path / "log", tmp_path / "m") == 3
    assert "earlier attempt" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "it said nothing"),
        ("plain\nlast line\n", "no line of the log says why; the last one is: last line"),
        (
            "(EngineCore_DP0 pid=9) ERROR 11-28 17:00:00 [core.py:866] ValueError: To serve one request with the "
            "model's max seq len (131072), 7.00 GiB are needed\n"
            "(vLLMHttpServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.\n"
            "\x1b[36m(TaskRunner pid=1)\x1b[0m ray.exceptions.ActorDiedError: The actor died unexpectedly\n"
            "ray.exceptions.RayTaskError(ActorDiedError): ray::TaskRunner.run()\nBrokenPipeError: [Errno 32]\n",
            "ValueError: To serve one request with the model's max seq len (131072), 7.00 GiB are needed",
        ),
        (
            "OSError: [Errno 28] No space left on device: '/out'\nTraceback:\nRuntimeError: in vain [repeated 3x "
            "across cluster]\n",
            "OSError: [Errno 28] No space left on device: '/out'",
        ),
        (
            "ray.exceptions.OutOfMemoryError: 1 worker was killed\nKeyError: 'x'",
            "ray.exceptions.OutOfMemoryError: 1 worker was killed",
        ),
        (
            "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0\nAssertionError: later\n",
            "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
        ),
        (
            "(AgentLoopWorkerTQ pid=3) ERROR:x:Error in _run_prompt for uid=1\n(AgentLoopWorkerTQ pid=3) Traceback\n"
            "(AgentLoopWorkerTQ pid=3) ray.exceptions.RayTaskError(ValueError): ray::compute\n"
            "(AgentLoopWorkerTQ pid=3) ValueError: gold is empty\nValueError: another\n"
            'RuntimeError: 3 requests failed; the log has their errors after "Error in _run_prompt"\n',
            'RuntimeError: 3 requests failed; the log has their errors after "Error in _run_prompt": '
            "ValueError: gold is empty",
        ),
        ("an info line about out of memory\nKeyError: 'x'\n", "KeyError: 'x'"),
        ("ray.exceptions.ActorDiedError: The actor died\n", "ray.exceptions.ActorDiedError: The actor died"),
        ("ValueError: a: b\nand so on", "ValueError: a: b"),
        (
            "mismatched input '='\n\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.\n",
            "mismatched input '='",
        ),
        ("\x1b[36m(TaskRunner pid=1)\x1b[0m torch.OutOfMemoryError: no room\n", "torch.OutOfMemoryError: no room"),
        (
            "ray.exceptions.RayTaskError(ValueError): \x1b[36mray::run()\x1b[39m\nValueError: the cause\n",
            "ValueError: the cause",
        ),
    ],
)
def test_reason(log, reason):
    assert failure_reason(log) == reason


def test_a_run_has_a_folder_and_names_of_its_own_and_binds_loopback(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    code = """
        import os, pathlib, tempfile
        pathlib.Path(tempfile.gettempdir(), "left").touch()
        names = ["TMPDIR", "RAY_TMPDIR", "VERL_IPC_TAG", "GLOO_SOCKET_IFNAME", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
        print(*[os.environ[name] for name in names])
        """
    found = []
    for attempt in range(2):
        assert watch(python(code), tmp_path / f"log{attempt}", tmp_path / "m") == 0
        found.append((tmp_path / f"log{attempt}").read_text().split())
        folder, ray, tag, gloo, cluster = found[-1]
        assert (ray, tag, gloo, cluster) == (folder, Path(folder).name, "eth7", "0")
        assert not Path(folder).exists(), "it goes with the run"
        assert len(f"{folder}/ray/session_2026-11-28_17-20-34_100123_1234567/sockets/plasma_store") <= 107
    assert found[0][0] != found[1][0]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert watch(python("import os; print('VERL_IPC_TAG' in os.environ)"), tmp_path / "log", tmp_path / "m") == 0
    assert (tmp_path / "log").read_text() == "False\n"


def test_semaphores_of_processes_that_are_killed_go_with_them(tmp_path):
    code = """
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path(f"/dev/shm/sem.loky-{child.pid}-abc").touch()
        print(child.pid, flush=True)
        time.sleep(2)
        """
    assert watch(python(code), tmp_path / "log", tmp_path / "m") == 0
    pid = (tmp_path / "log").read_text().strip()
    assert pid and not list(Path("/dev/shm").glob(f"sem.*{pid}*"))


def test_what_is_no_number_any_more_is_said_once(tmp_path, capfd):
    code = """
        import os
        with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
            for step in (1, 2, 3):
                file.write('{"step": %d, "data": {"actor/grad_norm": %s}}\\n' % (step, "0.5" if step < 2 else "NaN"))
        """
    assert watch(python(code), tmp_path / "log", tmp_path / "m") == 0
    err = capfd.readouterr().err
    assert err.count("warning: actor/grad_norm: NaN since step 2; lower the learning rate") == 1


def test_death_by_signal_is_reported_as_a_shell_does(tmp_path):
    code = watch(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "log", tmp_path / "m")
    assert code == 128 + signal.SIGKILL


def test_command_is_stopped_with_its_starter(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GRACE_S", 5)
    parents = iter([1, 1, 1])
    pid = tmp_path / "pid"
    code = watch(
        python(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"),
        tmp_path / "log",
        tmp_path / "m",
        parent=lambda: next(parents, 2),
    )
    assert code == 130
    assert not pid.exists() or not alive(int(pid.read_text()))


@pytest.mark.parametrize("titled", [False, True])
@pytest.mark.parametrize(("ending", "grace_s"), [("time.sleep(3)", 60), ("time.sleep(600)", 1)])
def test_the_end_is_that_of_all_processes(tmp_path, monkeypatch, ending, grace_s, titled):
    """One in a session of its own, as Ray's workers are: waited for, and killed where it does not end."""
    monkeypatch.setattr(module, "_GRACE_S", grace_s)
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); {ending}"
    if titled:  # as vLLM's, whose title takes the place of their variables
        pytest.importorskip("setproctitle")
        child = f"import setproctitle; setproctitle.setproctitle('x' * 100000); {child}"
    command = f"""
        import os, subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
        while not os.path.exists({str(pid)!r}): time.sleep(0.05)
        time.sleep(1.5)
    """
    assert watch(python(command), tmp_path / "log", tmp_path / "m") == 0
    assert not alive(int(pid.read_text()))


def test_a_command_that_does_not_want_to_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GRACE_S", 1)
    parents = iter([1] * 4)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert watch(python(stubborn), tmp_path / "log", tmp_path / "m", parent=lambda: next(parents, 2)) == 130


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_command_does_not_outlive_a_killed_watch(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-m", "recipe.cello1", "watch", "--log", str(tmp_path / "log"), "--metrics"]
    process = subprocess.Popen([*command, str(tmp_path / "m"), "--", *python(child)], stderr=subprocess.DEVNULL)
    wait_for(lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    wait_for(lambda: not alive(int(pid.read_text())))


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_the_metrics_file_can_be_named_in_the_command(tmp_path):
    command = [sys.executable, "-c", "import sys; open(sys.argv[1][5:], 'w').close()", "path=@METRICS@"]
    assert watch(command, tmp_path / "log", tmp_path / "metrics") == 0
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["attempt-000.jsonl"]
