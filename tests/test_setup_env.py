"""The set-up script, with the installation itself left out: tests/run.sh has just been through that."""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.cello1.launch import environment

ROOT = Path(__file__).parents[1]
SCRIPT = Path("recipe/cello1/launch/setup_env.sh")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the script needs of the repository."""
    tree = tmp_path / "tree"
    (tree / "recipe" / "cello1" / "launch").mkdir(parents=True)
    launch = [SCRIPT.with_name(name) for name in (SCRIPT.name, "device.sh", "environment.py")]
    for name in ("setup.py", *launch, "recipe/cello1/REQUIRED_VERL.txt"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "requirements", tree / "requirements")
    return tree


@pytest.fixture
def env_dir(tmp_path) -> Path:
    """An empty environment, with this Python and without packages."""
    env_dir = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env_dir], check=True)
    return env_dir


def environ(**variables: str) -> dict[str, str]:
    """This process's variables with no environment active but what `variables` say."""
    unset = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHON", "CELLO1_SETUP", "CELLO1_PYTHON")
    kept = {key: value for key, value in os.environ.items() if key not in unset}
    return kept | {"CELLO1_DEVICE": "cpu"} | variables


def bash(command: str, tree: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a shell command in `tree`."""
    return subprocess.run(["bash", "-c", command], cwd=tree, env=environ(**variables), capture_output=True, text=True)


def put_in_place(tree: Path, env_dir: Path, name: str) -> None:
    """Leave the stamp of a finished set, as the script would."""
    made_from = [tree / file for file in ("setup.py", SCRIPT, "recipe/cello1/launch/environment.py")]
    made_from += sorted((tree / "requirements").glob("*.txt"))
    command = [env_dir / "bin" / "python", "-I", "-S", made_from[2], "fingerprint", *made_from]
    stamp = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (env_dir / f".cello1-{name}").write_text(stamp)


def test_in_place_it_does_nothing_and_says_nothing(tree, env_dir):
    put_in_place(tree, env_dir, "cpu")
    done = bash(f"source {SCRIPT} train && echo $PYTHON $CELLO1_DEVICE", tree, VIRTUAL_ENV=str(env_dir))
    assert (done.stdout.strip(), done.stderr, done.returncode) == (f"{env_dir}/bin/python cpu", "", 0)
    assert not (tree / "outputs").exists()


def test_sourced_it_activates_the_environment_of_the_tree(tree, env_dir):
    env_dir.rename(tree / ".venv")
    put_in_place(tree, tree / ".venv", "cpu")
    done = bash(f"source {SCRIPT} train && echo $VIRTUAL_ENV && command -v python", tree)
    assert done.stdout.split() == [f"{tree}/.venv", f"{tree}/.venv/bin/python"]


def test_sourced_it_leaves_options_traps_and_names_alone(tree, env_dir):
    put_in_place(tree, env_dir, "cpu")
    state = "{ set +o; shopt -p; trap; declare -F; compgen -v; }"
    ours = r"^(PYTHON|CELLO1_DEVICE|_|PIPESTATUS|BASH_LINENO|FUNCNAME)$"
    command = (
        f"set -eu; {state} >before; source {SCRIPT} train; {state} >after; "
        f"diff <(grep -vE '{ours}' before) <(grep -vE '{ours}' after) >&2"
    )
    done = bash(command, tree, VIRTUAL_ENV=str(env_dir))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.integration
@pytest.mark.parametrize("changed", ["setup.py", "requirements/cpu.txt"])
def test_a_change_of_the_requirements_asks_for_a_new_set_up(tree, env_dir, changed):
    put_in_place(tree, env_dir, "cpu")
    with (tree / changed).open("a") as file:
        file.write("# changed\n")
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = bash(f"bash {SCRIPT} train", tree, VIRTUAL_ENV=str(env_dir), **offline)
    assert done.returncode == 1
    assert "the sets cpu go into" in done.stderr and "installing uv" in done.stderr
    assert env_dir.is_dir(), "an environment that the script did not make is not removed"


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ("tests", {}, "there is no set 'tests'"),
        ("", {}, "no set was named"),
        ("train", {"CELLO1_DEVICE": "tpu"}, "CELLO1_DEVICE is 'tpu'"),
        ("train", {"CELLO1_PYTHON": "no-such-python"}, "Python 3.11 or 3.12 is needed"),
    ],
)
def test_bad_input_is_named_with_a_remedy(tree, words, variables, message):
    done = bash(f"bash {SCRIPT} {words}", tree, **variables)
    assert done.returncode == 1
    assert message in done.stderr
    assert "remedy: " in done.stderr
    assert done.stdout == ""


def test_a_failure_ends_the_script_that_sources_it(tree):
    done = bash(f"set -e; source {SCRIPT} nonsense; echo went on", tree)
    assert (done.returncode, done.stdout) == (1, "")


def test_the_sets_for_cpu_and_gpu_are_not_mixed(tree, env_dir):
    put_in_place(tree, env_dir, "gpu")
    done = bash(f"bash {SCRIPT} train", tree, VIRTUAL_ENV=str(env_dir))
    assert done.returncode == 1
    assert "holds the gpu set" in done.stderr


def test_of_two_at_once_the_second_waits_and_finds_it_in_place(tree, env_dir):
    env = environ(VIRTUAL_ENV=str(env_dir))
    with (tree / SCRIPT).open() as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        command = ["bash", str(SCRIPT), "train"]
        with subprocess.Popen(
            command, cwd=tree, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as run:
            assert "waiting" in run.stderr.readline()
            put_in_place(tree, env_dir, "cpu")
            fcntl.flock(first, fcntl.LOCK_UN)
            settings, more = run.communicate()
    assert (run.returncode, more) == (0, "")
    assert f"export PYTHON={env_dir}/bin/python" in settings


@pytest.mark.integration
def test_a_failed_installation_leaves_no_half_environment(tree):
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = bash(f"bash {SCRIPT} train", tree, CELLO1_PYTHON=sys.executable, **offline)
    assert done.returncode == 1
    assert not (tree / ".venv").exists()
    assert "No matching distribution found" in done.stderr
    assert "remedy: " in done.stderr
    assert (tree / "outputs" / "setup_env.log").is_file()


def test_what_a_killed_run_left_is_removed_first(tree):
    leftover = tree / ".venv" / "leftover"
    leftover.parent.mkdir()
    leftover.touch()
    (tree / ".venv" / ".cello1-unfinished").touch()
    bash(f"bash {SCRIPT} train", tree, CELLO1_PYTHON="no-such-python")
    assert not leftover.exists()


def test_copied_alone_it_installs_nothing_and_names_what_is_missing(tree, env_dir):
    (tree / "setup.py").write_text('setup(name="verl")')
    done = bash(f"bash {SCRIPT} train", tree, VIRTUAL_ENV=str(env_dir))
    assert done.returncode == 1
    assert f"lacks {', '.join(environment.TRAIN_PACKAGES)}" in done.stderr
    assert environment.required_verl()["PIP_INSTALL"] in done.stderr
    assert not (tree / "outputs").exists()


def test_copied_alone_it_takes_the_environment_that_has_verl(tree, env_dir):
    (tree / "setup.py").unlink()
    site = next((env_dir / "lib").glob("python3*")) / "site-packages"
    for name in environment.TRAIN_PACKAGES:
        (site / name).mkdir()
        (site / name / "__init__.py").touch()
    environment.name_vllm(str(site), "0.27.1")
    done = bash(f"source {SCRIPT} train; echo $PYTHON; echo $PYTHONPATH", tree, VIRTUAL_ENV=str(env_dir))
    assert done.stdout.split() == [f"{env_dir}/bin/python", str(tree)]
    assert "verl from a source tree is in use" in done.stderr


def fake_nvidia_smi(folder: Path, n_gpus: int) -> str:
    """Put an `nvidia-smi` that writes line by line first on PATH; its reader must not leave before the last."""
    folder.mkdir()
    script = folder / "nvidia-smi"
    code = f"for i in range({n_gpus}):\n    print(f'GPU {{i}}: NVIDIA H100', flush=True)\n    time.sleep(0.002)"
    script.write_text(f"#!{sys.executable} -S\nimport time\n{code}\n")
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("n_gpus", "device"), [(0, "cpu"), (1, "gpu"), (2, "gpu"), (8, "gpu")])
def test_every_gpu_that_is_listed_counts(tree, env_dir, tmp_path, n_gpus, device):
    put_in_place(tree, env_dir, device)
    path = fake_nvidia_smi(tmp_path / "bin", n_gpus)
    for _ in range(5):
        done = bash(f"source {SCRIPT} train && echo $CELLO1_DEVICE", tree, **found(env_dir, path, ""))
        assert (done.stdout.strip(), done.stderr) == (device, "")


def test_a_gpu_that_will_not_be_used_is_named(tree, env_dir, tmp_path):
    put_in_place(tree, env_dir, "cpu")
    path = fake_nvidia_smi(tmp_path / "bin", 8)
    done = bash(f"source {SCRIPT} train && echo $CELLO1_DEVICE", tree, **found(env_dir, path, "cpu"))
    assert done.stdout.strip() == "cpu"
    assert done.stderr == "set-up: nvidia-smi lists a GPU, but CELLO1_DEVICE=cpu: it will not be used\n"


LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
HIDDEN = "nvidia-smi lists a GPU, but CUDA_VISIBLE_DEVICES={} hides it: it will not be used"


@pytest.mark.parametrize(
    ("lines", "code", "visible", "device", "said"),
    [
        ([LISTED, "  MIG 3g.40gb     Device  0: (UUID: MIG-a)"], 0, None, "gpu", ""),
        ([LISTED + "\r"], 0, "3", "gpu", ""),
        (["Unable to determine the device handle for GPU0000:41:00.0: Unknown Error", LISTED], 15, None, "gpu", ""),
        ([MISMATCH, "NVML library version: 550.54"], 18, None, "cpu", f"nvidia-smi lists no GPU ({MISMATCH}): none"),
        (["No devices were found\x1b[2J"], 6, None, "cpu", "nvidia-smi lists no GPU (No devices were found?[2J): none"),
        ([LISTED], 0, "", "cpu", HIDDEN.format("")),
        ([LISTED], 0, "-1", "cpu", HIDDEN.format("-1")),
        ([LISTED], 0, "NoDevFiles", "cpu", HIDDEN.format("NoDevFiles")),
    ],
)
def test_what_nvidia_smi_says(tmp_path, lines, code, visible, device, said):
    (tmp_path / "nvidia-smi").write_text(
        f"#!/bin/sh\n{''.join(f'echo {shlex.quote(x)}; ' for x in lines)}exit {code}\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | (
        {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    )
    command = ["bash", "-euo", "pipefail", "-c", "source recipe/cello1/launch/device.sh; find_device; echo $device"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.stdout == f"{device}\n" and done.stderr.startswith(f"set-up: {said}" if said else "")
    assert done.stderr.count("\n") == bool(said)


def found(env_dir: Path, path: str, device: str) -> dict[str, str]:
    """Variables of a machine with an environment in place; `device` is what the user asks for."""
    return {"VIRTUAL_ENV": str(env_dir), "PATH": path, "CELLO1_DEVICE": device}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "error: Failed to download `torch==2.13.0+cpu`\n  cause: No space left on device (os error 28)",
            "disk is full",
        ),
        ("error: Request failed after 3 retries\n  cause: Failed to fetch: http://x/simple/zarr/", "cannot be reached"),
        ("error: Failed to download `rich==1`\n  cause: Hash mismatch for `rich==1`", "not the one that was tested"),
        (
            "error: No solution found\n  cause: Because there is no version of torch{os == 'x'}==2",
            "no build of torch for",
        ),
        ("error: No solution found\n  cause: Because torchdata was not found in the index", "lacks a package"),
        ("error: something else", "the sets cpu could not be installed"),
    ],
)
def test_a_failed_installation_is_told_by_its_cause(tree, env_dir, tmp_path, log, message):
    """uv is a stand-in that writes what uv writes in such a case, and pip one that has nothing to do."""
    site = next((env_dir / "lib").glob("python3*")) / "site-packages"
    (site / "pip.py").write_text("")
    (site / "uv.py").write_text(f"import sys\nsys.exit({log!r})\n")
    done = bash(f"bash {SCRIPT} train", tree, VIRTUAL_ENV=str(env_dir))
    assert done.returncode == 1
    assert message in done.stderr and log.splitlines()[-1].strip()[:40] in done.stderr
    assert ("adding http" in done.stderr) == ("torch for" in message), "only for the package with an index of its own"
    assert not (env_dir / ".cello1-cpu").exists()
