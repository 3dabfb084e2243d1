"""The rooms of the recipe: who may import whom, read from the source, and what stays light, in a fresh interpreter."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.rooms import LIGHT, MAY_IMPORT, NEED_SCIPY, RECIPE, ROOT, TASK

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


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name, bare):
    loaded = loaded_by(f"recipe.cello1.{name}") - bare
    assert "recipe" in loaded
    assert not loaded.intersection(HEAVY)


def test_light_modules_import_only_numpy_beyond_the_standard_library(bare):
    names = [name for name in LIGHT if name not in NEED_SCIPY]
    loaded = set().union(*[loaded_by(f"recipe.cello1.{name}") for name in names]) - bare
    beyond = {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")}
    assert beyond <= {"recipe", "numpy"}


def test_task_works_when_copied_alone(tmp_path):
    target = tmp_path / "recipe" / "cello1"
    shutil.copytree(RECIPE / "task", target / "task", ignore=shutil.ignore_patterns("__pycache__"))
    for name in TASK:
        assert "recipe" in loaded_by(f"recipe.cello1.{name}", tmp_path)


def test_recipe_is_a_namespace_package():
    assert not (ROOT / "recipe" / "__init__.py").exists()


# ------------------------------------------------------------------------------------------------- the import table


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports: at the top, in functions, for type checkers; also by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("recipe.cello1.")}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def arrows() -> dict[str, set[str]]:
    """Each module of the recipe with the modules of ours that it imports."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in RECIPE.rglob("*.py")}
    return {name: {other for other in imports_of(path) if is_module(other)} for path, name in names.items()}


def room_of(module: str) -> str:
    return module.split(".")[2]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_the_table_admits(room):
    folder = ROOT / room if room == "scverse_plugin" else RECIPE / room
    files = list(folder.rglob("*.py"))
    assert files
    admitted = tuple(f"recipe.cello1.{other}." for other in (room, *MAY_IMPORT[room]))
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports_of(path)
        if is_module(name) and not f"{name}.".startswith(admitted)
    }
    assert not wrong


def test_every_folder_of_code_is_in_the_table():
    folders = {path.name for path in RECIPE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders == set(MAY_IMPORT) - {"scverse_plugin"}


def test_no_module_imports_in_a_circle():
    list(graphlib.TopologicalSorter(arrows()).static_order())  # raises CycleError, which names the circle


def test_rooms_are_small_enough_to_look_over():
    entries = [path for path in RECIPE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17, sorted(path.name for path in entries)
    for folder in (path for path in RECIPE.rglob("*") if path.is_dir()):
        assert len(list(folder.glob("*.py"))) <= 15, folder
