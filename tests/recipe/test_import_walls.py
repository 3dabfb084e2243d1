"""Floor 0 stays light: what it imports is checked in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "verl",
    "torch",
    "transformers",
    "scanpy",
    "anndata",
    "pandas",
    "vllm",
    "ray",
    "trl",
    "datasets",
    "cello1_verl",
)
FLOOR_0 = (
    "puzzle",
    "context",
    "answer",
    "prompt",
    "scoring",
    "files",
    "records",
    "puzzle_files",
    "prediction_records",
    "shaping",
    "curriculum",
    "versions",
    "voting",
)


def loaded_by(module: str, folder: Path = ROOT) -> set[str]:
    """Return the top-level packages in sys.modules after importing one module."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    # Coverage's start-up hook in the environment would count as loaded by us.
    environment.pop("COVERAGE_PROCESS_START", None)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """What the interpreter has loaded without us, through .pth files for example."""
    return loaded_by("json")


@pytest.mark.parametrize("name", FLOOR_0)
def test_floor_0_imports_nothing_heavy(name, bare):
    loaded = loaded_by(f"recipe.cello1.{name}") - bare
    assert "recipe" in loaded
    assert not loaded.intersection(HEAVY)


def test_floor_0_imports_only_numpy_beyond_the_standard_library(bare):
    names = [name for name in FLOOR_0 if name != "voting"]  # which has scipy, and all that scipy loads
    loaded = set().union(*[loaded_by(f"recipe.cello1.{name}") for name in names]) - bare
    beyond = {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")}
    assert beyond <= {"recipe", "numpy"}


def test_floor_0_works_when_copied_alone(tmp_path):
    target = tmp_path / "recipe" / "cello1"
    target.mkdir(parents=True)
    for name in ("__init__", *FLOOR_0):
        (target / f"{name}.py").write_text((ROOT / "recipe" / "cello1" / f"{name}.py").read_text())
    assert "recipe" in loaded_by("recipe.cello1.records", tmp_path)


def test_recipe_is_a_namespace_package():
    assert not (ROOT / "recipe" / "__init__.py").exists()
