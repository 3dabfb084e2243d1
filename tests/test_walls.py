"""The walls between the rooms of the repository (floor 0: tests/recipe; the recipe alone: tests/test_upstream.py)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipe" / "cello1"
VERL_MODULES = ("reward_manager", "dataset", "replay_buffer")
MODULES = sorted(RECIPE.rglob("*.py"))


def test_plugin_loads_neither_verl_nor_an_engine():
    code = """
import sys
import scverse_plugin

print([name for name in ("verl", "vllm", "torch", "ray", "cello1_verl") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, at the top or in a function; inside ``if TYPE_CHECKING`` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(RECIPE).as_posix())
def test_recipe_knows_neither_overlay_nor_plugin(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert not roots & {"cello1_verl", "scverse_plugin"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(RECIPE).as_posix())
def test_only_the_seams_import_verl_at_the_top(path):
    tops = {
        alias
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names])
    }
    assert any(name.partition(".")[0] == "verl" for name in tops) == (path.stem in VERL_MODULES)


def test_overlay_has_the_licence_header_that_upstream_checks():
    for path in (ROOT / "verl").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# Copyright 2025 Individual Contributor: "), path
        assert "http://www.apache.org/licenses/LICENSE-2.0" in "\n".join(lines[:13]), path


def test_overlay_imports_only_verl_torch_and_what_they_need():
    allowed = {"verl", "torch", "transformers", "vllm", "ray", *sys.stdlib_module_names}
    for path in (ROOT / "verl").rglob("*.py"):
        assert {name.partition(".")[0] for name in imports_of(path)} <= allowed, path


def test_cpu_platform_imports_only_verl_torch_and_the_standard_library():
    path = ROOT / "verl" / "plugin" / "platform" / "platform_cpu.py"
    assert {name.partition(".")[0] for name in imports_of(path)} <= {"verl", "torch", *sys.stdlib_module_names}
    relative = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative, "what else this fork adds, at the paths it has here and would have in verl"
    for node in relative:
        folder = path.parents[node.level - 1].joinpath(*node.module.split("."))
        assert folder.is_relative_to(ROOT / "verl")
        assert all((folder / f"{alias.name}.py").is_file() for alias in node.names)
