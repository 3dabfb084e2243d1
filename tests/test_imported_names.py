"""Every name that is taken from vLLM and transformers is there; tests/versions.sh asks those of the GPU set, too."""

import ast
import json
import subprocess
import sys

import pytest

from tests.helpers.rooms import ROOT

PACKAGES = ("vllm", "transformers")
# Imports every module and looks the names up, and writes what is missing.
LOOK = """
import importlib, json, sys
missing = []
for module, name in json.loads(sys.argv[1]):
    try:
        found = importlib.import_module(module)
        if name and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except ImportError as error:
        missing.append(f"{module}:{name}: {error}")
print(json.dumps(missing))
"""


def imported_names() -> dict[str, set[tuple[str, str]]]:
    """The names that the project imports from each package: in functions and for type checkers, too."""
    found: dict[str, set[tuple[str, str]]] = {package: set() for package in PACKAGES}
    for folder in ("recipe", "scverse_plugin", "verl"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names: list[tuple[str, str]] = []
                if isinstance(node, ast.ImportFrom):
                    names = [(node.module or "", alias.name) for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [(alias.name, "") for alias in node.names]
                for module, name in names:
                    if (package := module.partition(".")[0]) in found:
                        found[package].add((module, name))
    return found


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.slow
def test_every_name_is_in_the_installed_version(package):
    pytest.importorskip("torch")
    names = sorted(imported_names()[package])
    assert len(names) > 5
    command = [sys.executable, "-W", "ignore", "-c", LOOK, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if package == "vllm" and "No module named 'vllm'" in result.stdout:
        pytest.skip("vLLM is not installed")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == []
