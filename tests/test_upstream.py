"""The recipe can be sent to verl as it is: alone in a bare tree, beside verl and nothing of this project."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.rooms import LIGHT, own_tests

ROOT = Path(__file__).parents[1]
OURS = {"recipe", "scverse_plugin", "cello1_verl"}

# What is run of tests/recipe: floor 0 and each seam to verl. The rest needs engines, cells or the processes of a run,
# and knows no more of where the recipe lies than these do.
OF_LIGHT = [name for name in LIGHT if name not in ("formats.atomic", "formats.provenance")]
SEAMS = ("rl.reward_manager", "rl.dataset", "rl.replay_buffer", "formats.rl_parquet")
CONFIGS = (  # of the many compositions, one of each kind
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
    """A tree like verl's, with the recipe and its tests."""
    tree = tmp_path_factory.mktemp("verl")
    (tree / "pyproject.toml").write_text(UPSTREAM)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "recipe" / "cello1", tree / "recipe" / "cello1", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "recipe", tree / "tests" / "recipe", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "helpers", tree / "tests" / "helpers", ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", tree / "tests")
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


def test_recipe_passes_its_own_tests(tree, python):
    pytest.importorskip("verl")
    names = [own_tests(name) for name in (*OF_LIGHT, *SEAMS)]
    names += [f"tests/recipe/config/test_configs.py::{name}" for name in CONFIGS]
    options = ["--import-mode=importlib", "-q", "-p", "no:cacheprovider", "-m", "not integration"]
    result = run(python, tree, "-m", "pytest", *options, *names)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_recipe_passes_upstreams_ruff(tree, command):
    arguments = [*command.split(), "--no-cache", "recipe"]
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
