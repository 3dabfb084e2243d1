"""The launchers with a stand-in for Python that writes down what it is called with."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from recipe.cello1.task.text import visible
from tests.helpers.processes import ROOT

LAUNCHERS = ROOT / "recipe" / "cello1"
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\0' "$PWD" "${TMPDIR-}" "${RAY_TMPDIR-}" "${HOME-}" "${PYTHONSAFEPATH-}" "${HF_DATASETS_CACHE-}" \
  "${TORCHINDUCTOR_CACHE_DIR-}" >>"$CALLS"
printf '%s\0' "$@" $'\1' >>"$CALLS"
[[ -z ${SLEEP-} || "$*" != *" watch "* ]] || sleep 60
while (($#)); do
  case $1 in --train | --val | --config) printf '%s\0' "$2" ;; esac
  shift
done
"""
SEEN = ("cwd", "TMPDIR", "RAY_TMPDIR", "HOME", "PYTHONSAFEPATH", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture
def start(tmp_path):
    """Return a function that gives the command and the variables of a launcher."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def start(script: str = "run_grpo.sh", *arguments: str, **variables: str) -> dict:
        fixed = {"VIRTUAL_ENV": str(tmp_path / "env"), "CALLS": str(tmp_path / "calls"), "PATH": os.environ["PATH"]}
        fixed |= {"CELLO1_SETUP": "off", "CELLO1_DEVICE": "cpu", "HOME": str(tmp_path), "OUTPUT": str(tmp_path / "out")}
        return {"args": ["bash", str(LAUNCHERS / script), *arguments], "env": fixed | variables, "cwd": tmp_path}

    return start


def run(start: dict) -> subprocess.CompletedProcess:
    return subprocess.run(**start, capture_output=True, text=True, timeout=60)


def calls(folder: Path, command: str) -> list[tuple[dict[str, str], list[str]]]:
    """What the stand-in saw and was given in the calls of one command."""
    found = []
    for call in (folder / "calls").read_bytes().decode().split("\1\0")[:-1]:
        words = call.split("\0")[:-1]
        if command in words:
            found.append((dict(zip(SEEN, words, strict=False)), words[len(SEEN) :]))
    return found


HOSTILE = [
    *(
        "a b",
        "a'b",
        'a"b',
        'a\\"b',
        "a\\",
        "a\\\\",
        "a\nb",
        "a\n",
        "\n",
        "$x",
        "$(touch x)",
        "`id`",
        "{a}",
        "[1,2]",
        "a,b",
    ),
    *(
        "a=b",
        "null",
        "1e-3",
        "true",
        "a#b",
        "a}b",
        "é",
        "a\tb",
        "a\rb",
        " a",
        "a ",
        "~",
        "%(x)s",
        "a\\nb",
        "*",
        "@METRICS",
    ),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_verl_gets_every_name_as_it_is(start, tmp_path, name):
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    for kind in "mtvo":
        (tmp_path / f"{kind}{name}").mkdir()
    variables = {"MODEL": f"m{name}", "TRAIN_DATA": f"t{name}", "VAL_DATA": f"v{name}", "OUTPUT": f"o{name}"}
    done = run(start(**variables))
    assert done.returncode == 0, done.stderr
    ((seen, words),) = calls(tmp_path, "verl.trainer.main_ppo")
    overrides = [word for word in words[words.index("verl.trainer.main_ppo") :] if "=" in word]
    given = {override.key_or_group: override.value() for override in parser.parse_overrides(overrides)}
    output = f"{tmp_path}/o{name}"
    assert given["actor_rollout_ref.model.path"] == f"{tmp_path}/m{name}"
    assert given["data.train_files"] == f"{tmp_path}/t{name}"
    assert given["data.val_files"] == f"{tmp_path}/v{name}"
    assert (given["trainer.default_local_dir"], given["hydra.run.dir"]) == (f"{output}/grpo", f"{output}/hydra")
    assert given["ray_kwargs.ray_init.address"] == "local"
    # Ray puts the working directory first on the path of its workers: it is no stranger's.
    assert (seen["cwd"], seen["PYTHONSAFEPATH"]) == (output, "1")


ESCAPES = "\x1b]8;;x\x1b\\\x07\x7f\n\r\x9b31m\u202e\u2066\u061c\u200f\u2028 \x1b[2J"


@pytest.mark.parametrize("script", ["run_grpo.sh", "run_sft.sh"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_launchers_show_what_a_terminal_would_obey(start, tmp_path, script, locale):
    """In an error and in a heading."""
    inputs = {"MODEL": "m", "TRAIN_DATA": "t", "VAL_DATA": "v", "LC_ALL": locale}
    (tmp_path / f"o{ESCAPES}é").touch()
    refused = run(start(script, **inputs, OUTPUT=f"o{ESCAPES}é"))
    unknown = run(start("run_grpo.sh", **inputs, HARDWARE=f"x{ESCAPES}é"))
    for done in (refused, unknown):
        assert (done.returncode, done.stderr.count("\n"), done.stderr) == (2, 1, visible(done.stderr))
        assert done.stderr.startswith("error: ") and "31m" in done.stderr and "é" in done.stderr
    fine = run(start("run_grpo.sh", **inputs, OUTPUT=f"q{ESCAPES}é"))
    assert fine.returncode == 0 and "== GRPO with verl" in fine.stderr
    assert fine.stderr == visible(fine.stderr)


@pytest.mark.parametrize("name", ["MODEL", "TRAIN_DATA", "VAL_DATA", "OUTPUT", "TENSORBOARD_DIR"])
def test_what_verl_would_expand_is_refused(start, tmp_path, name):
    variables = {"MODEL": "m", "TRAIN_DATA": "t", "VAL_DATA": "v"} | {name: "a ${oc.env:HOME}"}
    done = run(start(**variables))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {name}=a ${{oc.env:HOME}} contains '${{', which verl would expand; rename the folder or file\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "kept"), [("out", True), ("o ut", False), ("o'ut", False), ("é", False)])
def test_what_is_compiled_is_kept_where_a_compiler_can_be_told_of_it(start, tmp_path, name, kept):
    output = tmp_path / name
    run(start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", OUTPUT=str(output)))
    ((seen, _),) = calls(tmp_path, "verl.trainer.main_ppo")
    folder = output / ".cache" if kept else Path(seen["TMPDIR"]) / "cache"
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "TORCHINDUCTOR")
    run(start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", OUTPUT=str(output), TORCHINDUCTOR_CACHE_DIR="/own"))
    assert calls(tmp_path, "verl.trainer.main_ppo")[1][0]["TORCHINDUCTOR_CACHE_DIR"] == "/own"


@pytest.mark.parametrize("script", ["run_grpo.sh", "run_ppo.sh", "run_sft.sh"])
def test_a_run_has_a_temporary_folder_which_goes_with_it(start, tmp_path, script):
    before = set(os.listdir("/tmp"))
    run(start(script, MODEL="m", TRAIN_DATA="t", VAL_DATA="v", TMPDIR=str(tmp_path / ("x" * 80))))
    ((seen, _),) = calls(tmp_path, "sft" if "sft" in script else "verl.trainer.main_ppo")
    folder = seen["TMPDIR"]
    assert seen["RAY_TMPDIR"] == folder and seen["HF_DATASETS_CACHE"] == f"{folder}/datasets"
    assert len(f"{folder}/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") <= 107
    assert not os.path.exists(folder)
    assert not {name for name in set(os.listdir("/tmp")) - before if name == os.path.basename(folder)}
    assert seen["PYTHONSAFEPATH"] == "1"


def test_a_short_temporary_folder_is_kept_to(start, tmp_path):
    with_short = Path("/tmp") / f"c{os.getpid()}"
    with_short.mkdir()
    try:
        run(start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", TMPDIR=str(with_short)))
        ((seen, _),) = calls(tmp_path, "verl.trainer.main_ppo")
        assert seen["TMPDIR"].startswith(f"{with_short}/")
        assert not any(with_short.iterdir())
    finally:
        shutil.rmtree(with_short)


@pytest.mark.parametrize("folder", ["/etc/passwd", "/nowhere", "tmp", ""])
def test_a_temporary_folder_that_is_none_is_passed_over(start, tmp_path, folder):
    assert run(start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", TMPDIR=folder)).returncode == 0
    ((seen, _),) = calls(tmp_path, "verl.trainer.main_ppo")
    assert seen["TMPDIR"].startswith("/tmp/cello1-")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_cannot_be_written_is_one_line(start, name):
    done = run(start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", **{name: "/proc"}))
    said = f"/proc cannot be written; set {name} to a folder whose path has at most 25 characters"
    assert (done.returncode, done.stderr) in (
        (2, f"error: {said}\n"),
        (0, done.stderr),
    )  # who is not root goes on in /tmp


def test_a_launcher_that_is_terminated_leaves_nothing(start, tmp_path):
    with subprocess.Popen(
        **start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", SLEEP="1"), stderr=subprocess.DEVNULL
    ) as process:
        while not (tmp_path / "calls").exists() or not calls(tmp_path, "watch"):
            assert process.poll() is None
            time.sleep(0.1)
        folder = calls(tmp_path, "watch")[0][0]["TMPDIR"]
        assert os.path.isdir(folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) != 0
    assert not os.path.exists(folder)


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_a_user_without_a_home_gets_one_below_the_output(start, tmp_path, home):
    arguments = start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v")
    del arguments["env"]["HOME"]
    run(arguments if home is None else arguments | {"env": arguments["env"] | {"HOME": home}})
    ((seen, _),) = calls(tmp_path, "verl.trainer.main_ppo")
    assert seen["HOME"] == f"{tmp_path}/out/home"
    assert os.path.isdir(seen["HOME"])


@pytest.mark.parametrize("script", ["run_grpo.sh", "run_sft.sh"])
def test_an_output_that_cannot_be_written_is_one_line(start, script):
    done = run(start(script, MODEL="m", TRAIN_DATA="t", VAL_DATA="v", OUTPUT="/proc/none"))
    assert done.returncode == 2
    assert done.stderr == "error: OUTPUT=/proc/none cannot be written; choose another folder\n"


def test_a_running_ray_is_joined_only_where_it_is_named(start, tmp_path):
    run(start(MODEL="m", TRAIN_DATA="t", VAL_DATA="v", RAY_ADDRESS="10.0.0.1:6379"))
    ((seen, words),) = calls(tmp_path, "verl.trainer.main_ppo")
    assert not [word for word in words if "ray_init.address" in word]
    assert seen["RAY_TMPDIR"] == ""


def test_the_embedded_default_in_miniature(start, tmp_path):
    for script, scale in (("run_grpo.sh", "embedded"), ("run_ppo.sh", "embedded_ppo")):
        run(start(script, SMOKE="1"))
        assert f"+scale=[{scale},smoke]" in calls(tmp_path, "verl.trainer.main_ppo")[-1][1]
    (_, sft), *_ = calls(tmp_path, "sft")
    assert sft[3:7] == ["--config", "embedded", "--config", "smoke"]
    assert [call[3:5] for _, call in calls(tmp_path, "cells")] == [["pbmc", "--out"]]
    assert calls(tmp_path, "tiny-model")


def steps_of(folder: Path) -> list[str]:
    """The commands of the recipe that were run, in order."""
    found = [words for _, words in calls(folder, "recipe.cello1")]
    return [words[words.index("recipe.cello1") + 1] for words in found]


def test_the_main_job_step_by_step(start, tmp_path):
    assert run(start()).returncode == 0
    done = [
        "cells",
        "prepare",
        "recombine",
        "recombine",
        "traces",
        "tiny-model",
        "sft",
        "preflight",
        "watch",
        "export",
        "summary",
    ]
    assert steps_of(tmp_path) == done
    ((_, prepare),) = calls(tmp_path, "prepare")
    inputs, out = str(ROOT / "outputs" / "cells" / "human"), str(tmp_path / "out" / "data")
    assert prepare[3:7] == [inputs, "--out", out, "--quiet"]
    assert prepare[prepare.index("--test-donors") + 1] == "human3"
    assert [call[call.index("--cells") + 1] for _, call in calls(tmp_path, "recombine")] == [inputs] * 2
    ((_, summary),) = calls(tmp_path, "summary")
    assert summary[summary.index("--decode") + 1] == "greedy,constrained,matrix"
    assert summary[summary.index("--baseline") + 1] == f"{out}/train/train_data.json"
    assert run(start()).returncode == 0
    assert steps_of(tmp_path)[len(done) :][:2] == ["cells", "sft"], "data that are there are not made again"
    other = run(start(SEED="2"))
    assert other.returncode == 2 and "was made with other settings" in other.stderr


def test_the_main_job_on_files_of_ones_own(start, tmp_path):
    (tmp_path / "my cells").mkdir()
    options = """--type-column 'cell type' --donor-column=donor --test-donors "Ann B" $(touch x)"""
    assert run(start(H5AD="my cells", PREPARE_ARGS=options)).returncode == 0
    assert not calls(tmp_path, "cells") and not (tmp_path / "x").exists()
    ((_, prepare),) = calls(tmp_path, "prepare")
    assert prepare[3] == str(tmp_path / "my cells")
    assert prepare[-7:] == [
        "--type-column",
        "cell type",
        "--donor-column=donor",
        "--test-donors",
        "Ann B",
        "$(touch",
        "x)",
    ]
    assert str(tmp_path / "my cells") in calls(tmp_path, "recombine")[0][1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"H5AD": "none"}, "H5AD=none does not exist; give an h5ad file, or a folder of them"),
        ({"H5AD": ".", "CELLS": "pbmc"}, "H5AD and CELLS are set; leave one of them out"),
        ({"CELLS": "liver"}, "CELLS=liver is unknown; it is pancreas or pbmc"),
        (
            {"H5AD": ".", "PREPARE_ARGS": "--type-column 'a"},
            "PREPARE_ARGS has a quote without its end: --type-column 'a",
        ),
        (
            {"H5AD": ".", "MODEL": "m"},
            "MODEL is set, and H5AD or CELLS, of which a small model is made; leave one of them out",
        ),
    ],
)
def test_cells_that_cannot_be_taken(start, variables, message):
    found = run(start(**variables))
    assert found.returncode == 2
    assert found.stderr == f"error: {message}\n"


def test_without_a_network_the_blood_cells_are_taken_with_a_note(start, tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    python.write_text(
        STAND_IN.replace("while (($#)); do", '[[ "$*" != *"cells pancreas"* ]] || exit 1\nwhile (($#)); do')
    )
    found = run(start())
    assert found.returncode == 0, found.stderr
    assert "note: the blood cells that come with scanpy are taken instead (CELLS=pbmc)" in found.stderr
    ((_, prepare),) = calls(tmp_path, "prepare")
    assert prepare[3] == str(tmp_path / "out" / "cells")
    assert run(start(CELLS="pancreas", OUTPUT=str(tmp_path / "b"))).returncode == 1


# ----------------------------------------------------------------------------------- an OUTPUT that a stranger has made

INPUTS = {"MODEL": "m", "TRAIN_DATA": "t", "VAL_DATA": "v"}


@pytest.mark.parametrize("home", [False, True])
@pytest.mark.parametrize("seal", [None, "", "1 -", "4194 2026-11-30 08:00:00.123456789 +0000"])
def test_what_would_be_run_as_it_is_was_made_here(start, tmp_path, home, seal):
    """Compiled code, and what Python loads from a home: of another folder nothing is taken, and nothing is lost."""
    folder, variable = ("home", "HOME") if home else (".cache", "TORCHINDUCTOR_CACHE_DIR")
    variables = INPUTS | ({"HOME": "/proc/none"} if home else {})

    def place(output):
        (tmp_path / "calls").unlink(missing_ok=True)
        assert run(start(**variables, OUTPUT=str(output))).returncode == 0
        return Path(calls(tmp_path, "verl.trainer.main_ppo")[0][0][variable])

    brought = tmp_path / "brought" / folder / "lib" / "x.so"
    brought.parent.mkdir(parents=True)
    brought.touch()
    if seal is not None:
        (tmp_path / "brought" / folder / ".made-here").write_text(seal)
    found = place(tmp_path / "brought")
    assert not found.is_relative_to(tmp_path / "brought") and brought.exists()
    assert place(tmp_path / "out").is_relative_to(tmp_path / "out" / folder)
    assert place(tmp_path / "out").is_relative_to(tmp_path / "out" / folder), "also when the run goes on"
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert not place(tmp_path / "copy").is_relative_to(tmp_path / "copy")


def test_links_in_an_output_lose_nothing(start, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".cache").symlink_to(tmp_path / "mine")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "mine" / "file")
    assert run(start(**INPUTS)).returncode == 0
    ((seen, _),) = calls(tmp_path, "verl.trainer.main_ppo")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    assert (tmp_path / "mine" / "file").read_text() == "kept"
    assert not seen["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["numpy.py", "torch/__init__.py", "ray.cpython-311-x86_64-linux-gnu.so", "a b.pyc"])
@pytest.mark.parametrize("script", ["run_grpo.sh", "run_ppo.sh"])
def test_modules_in_the_output_are_not_loaded(start, tmp_path, script, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).touch()
    found = run(start(script, **INPUTS))
    assert found.returncode == 2 and not calls(tmp_path, "verl.trainer.main_ppo")
    assert found.stderr.startswith(
        f"error: OUTPUT={tmp_path}/out holds Python modules ({tmp_path}/out/{name}), which Ray "
    )
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(("value", "given"), [("", 0), ("0", 0), ("false", 0), ("1", 1)])
def test_a_checkpoint_is_trusted_where_that_is_said(start, tmp_path, value, given):
    assert run(start(**INPUTS, TRUST_CHECKPOINT=value)).returncode == 0
    for command in ("preflight", "export"):
        ((_, words),) = calls(tmp_path, command)
        assert words.count("--trust-checkpoint") == given
