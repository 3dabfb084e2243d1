"""The recipe can be sent to verl as it is: alone in a bare tree, beside verl and nothing of this project."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from recipe.cello1.launch.upstream import write_tree
from tests.helpers.cli import command

ROOT = Path(__file__).parents[1]
OURS = {"recipe", "scverse_plugin", "cello1_verl"}
ROOMS = {"task", "formats", "rl", "cold_start", "launch"}
# Of its tests, for time: the floor below, each seam to verl, and of the many compositions one of each kind.
# The whole folder passes as well: `python -m pytest --import-mode=importlib recipe/cello1/tests` in the tree.
LONG = ("formats/test_items.py", "formats/test_puzzle_files.py", "formats/test_atomic.py", "rl/test_export.py")
CONFIGS = (
    "test_published_settings",
    "test_classes_named_in_the_config_exist",
    "test_composes_and_passes_verls_own_validation[cello1_grpo-8x80gb]",
    "test_variants_compose_and_pass_verls_own_validation[dapo]",
)

# The ruff settings of verl 0.9.1: pyproject.toml in its source distribution, as on github.com/verl-project/verl. The
# Python that it supports counts, too: ruff goes by the oldest.
UPSTREAM = """
[project]
name = "verl"
version = "0.9.1"
requires-python = ">=3.10,<3.13"

[tool.ruff]
line-length = 120

[tool.ruff.lint]
isort = {known-first-party = ["verl"]}
select = ["E", "F", "UP", "B", "I", "G"]
ignore = ["F405", "F403", "E731", "B007", "UP032", "G004", "UP045", "UP035"]
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A tree like verl's, with the recipe in it."""
    tree = tmp_path_factory.mktemp("verl")
    (tree / "pyproject.toml").write_text(UPSTREAM)
    write_tree(tree / "recipe" / "cello1")
    return tree


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment that has all packages of this one but ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for source in map(Path, sys.path):
        if not source.is_dir() or source.name not in ("site-packages", "dist-packages"):
            continue
        for entry in source.iterdir():
            is_ours = entry.name in OURS or "cello1" in entry.name.lower()
            if not is_ours and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(python: Path, tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def test_the_environment_has_verl_and_nothing_of_ours(tree, python):
    pytest.importorskip("verl")
    code = """
from importlib import metadata, util

print([name for name in ("verl", "cello1_verl", "scverse_plugin") if util.find_spec(name)])
print([found.name for found in metadata.distributions() if found.name in ("verl", "cello1")])
print(*util.find_spec("recipe").submodule_search_locations)
"""
    result = run(python, tree, "-c", code)
    assert result.stdout.splitlines() == ["['verl']", "['verl']", str(tree / "recipe")], result.stderr


def test_the_tree_is_the_rooms_of_training_and_nothing_else(tree):
    recipe = tree / "recipe" / "cello1"
    modules = [path.relative_to(recipe) for path in recipe.rglob("*.py")]
    assert {path.parts[0] for path in modules} == {*ROOMS, "tests", "__init__.py", "__main__.py"}
    assert {path.name for path in recipe.iterdir() if path.suffix != ".py"} == {
        *ROOMS,
        *("tests", "config", "README.md", "REQUIRED_VERL.txt", "run_grpo.sh", "run_ppo.sh", "run_sft.sh"),
    }
    launch = {path.name for path in (recipe / "launch").iterdir()}
    assert {"run_rl.sh", "run_env.sh", "cpu_env.sh", "setup_env.sh", "preflight.py", "watch.py"} <= launch
    assert not {"environment.py", "summary.py", "upstream.py"} & launch
    lines = {path: len((recipe / path).read_text().splitlines()) for path in modules if path.parts[0] != "tests"}
    assert sum(lines.values()) < 6_300
    assert len((recipe / "README.md").read_text().splitlines()) < 60
    tested = {path.name.removeprefix("test_") for path in modules if path.parts[0] == "tests"}
    assert {path.name for path in lines if path.parts[0] in ("task", "formats", "rl")} - tested == {
        *("sharded.py", "model_card.py"),  # by test_export.py
    }


def test_every_module_is_there_that_another_one_needs(tree, python):
    """Also in functions: the shell of the tree names its commands, and no other."""
    pytest.importorskip("verl")
    code = """
import ast, importlib.util, pathlib
for path in pathlib.Path("recipe").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("recipe.", "tests.", "scverse_plugin")):
            if "importorskip" not in path.read_text() or node.col_offset == 0:
                assert importlib.util.find_spec(node.module), (path, node.module)
"""
    result = run(python, tree, "-c", code)
    assert result.returncode == 0, result.stderr
    known = run(python, tree, "-m", "recipe.cello1", "--help").stdout
    assert {line.split()[0] for line in known.splitlines() if line.startswith("  ")} == {
        *("sft", "export", "preflight", "watch")
    }
    refused = run(python, tree, "-m", "recipe.cello1", "predict")
    assert (refused.returncode, refused.stderr.count("there is no command 'predict'")) == (2, 1)


@pytest.mark.slow
def test_recipe_passes_its_own_tests(tree, python):
    pytest.importorskip("verl")
    options = ["--import-mode=importlib", "-q", "-p", "no:cacheprovider", "-m", "not integration", "-W", "ignore"]
    options += [f"--ignore=recipe/cello1/tests/{name}" for name in LONG]
    names = ["task", "formats", "rl", *(f"config/test_configs.py::{name}" for name in CONFIGS)]
    result = run(python, tree, "-m", "pytest", *options, *(f"recipe/cello1/tests/{name}" for name in names))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("script", "variables", "said"),
    [
        ("run_grpo.sh", {}, "error: MODEL is not set; give MODEL, TRAIN_DATA and VAL_DATA"),
        ("run_ppo.sh", {"MODEL": "m", "TRAIN_DATA": "t"}, "error: MODEL is set but VAL_DATA is not"),
        ("run_sft.sh", {"MODEL": "m"}, "error: TRAIN_DATA is not set"),
        ("run_grpo.sh", {"MODEL": "./m", "TRAIN_DATA": "t", "VAL_DATA": "v"}, "MODEL=./m does not exist"),
    ],
)
def test_launchers_say_what_is_missing(tree, python, tmp_path, script, variables, said):
    pytest.importorskip("verl")
    fixed = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VIRTUAL_ENV": str(python.parents[1])}
    environment = fixed | {"OUTPUT": str(tmp_path / "out"), "CELLO1_DEVICE": "cpu"} | variables
    launcher = ["bash", str(tree / "recipe" / "cello1" / script)]
    done = subprocess.run(launcher, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and said in done.stderr


def test_an_environment_without_verl_is_named(tree, tmp_path):
    venv.create(tmp_path / "bare")
    environment = {"PATH": os.environ["PATH"], "VIRTUAL_ENV": str(tmp_path / "bare"), "MODEL": "m", "TRAIN_DATA": "t"}
    launcher = ["bash", str(tree / "recipe" / "cello1" / "run_sft.sh")]
    done = subprocess.run(launcher, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks verl,vllm,ray,transformers,transfer_queue,trl,peft; install what README.md" in done.stderr


def test_only_a_new_folder_is_written(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert command("upstream")(["--out", str(tmp_path)]) == 1
    assert "is not empty; give a new folder" in capsys.readouterr().err
    assert command("upstream")(["--out", str(tmp_path / "new")]) == 0
    assert "lines of Python, and " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_recipe_passes_upstreams_ruff(tree, command):
    arguments = [*command.split(), "--no-cache", "recipe"]
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
