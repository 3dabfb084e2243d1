"""Write the part of the recipe that goes to verl-recipe: training from prepared data, and nothing else.

    python -m recipe.cello1 upstream --out verl-recipe/cello1

The folder holds the modules that the training needs, found by following the imports from ``ENTRIES``, with launchers,
configuration, and their tests in a folder of their own. The rest stays the package that its README names.
"""

from __future__ import annotations

import argparse
import ast
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipe" / "cello1"
TESTS = ROOT / "tests"
# What verl, the launchers and the shell start; everything else follows from their imports.
ENTRIES = (
    *("__init__.py", "__main__.py", "cold_start/sft.py", "launch/preflight.py", "launch/watch.py"),
    *("rl/dataset.py", "rl/export.py", "rl/replay_buffer.py", "rl/reward_manager.py"),
)
NAMES = (
    *("REQUIRED_VERL.txt", "run_grpo.sh", "run_ppo.sh", "run_sft.sh"),
    *("launch/run_rl.sh", "launch/run_env.sh", "launch/cpu_env.sh", "launch/device.sh", "launch/messages.sh"),
)
# File here -> file there: what would make the environment only looks at it there.
RENAMED = {"launch/upstream_readme.md": "README.md", "launch/upstream_env.sh": "launch/setup_env.sh"}
_LEFT_OUT = "context_example.yaml"  # among the configurations: of data preparation
# Tests of more than one module, with the helpers that no test imports by name.
FURTHER_TESTS = ("recipe/config/test_configs.py", "conftest.py")


def modules(entries: Iterable[str] = ENTRIES) -> list[str]:
    """Find the modules that the entries need, themselves included, below the recipe."""
    found: set[Path] = set()
    left = [RECIPE / entry for entry in entries]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported(path, ast.walk(_tree(path)))
    return sorted(path.relative_to(RECIPE).as_posix() for path in found)


def tests(chosen: Iterable[str]) -> list[str]:
    """Find the tests of modules with the helpers they need; what imports anything else at its top is left out."""
    own = {RECIPE / name for name in chosen}
    found: set[Path] = set()
    named = [f"recipe/{Path(name).parent}/test_{Path(name).name}" for name in chosen]
    for first in (TESTS / name for name in (*named, *FURTHER_TESTS) if (TESTS / name).is_file()):
        needed, left = {first}, [first]
        while left:
            path = left.pop()
            left += (new := _imported(path, iter(_tree(path).body)) - own - needed)
            needed |= new
        if all(path.is_relative_to(TESTS) for path in needed):
            found |= needed
    return sorted(path.relative_to(TESTS).as_posix() for path in found)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(path: Path, nodes: Iterator[ast.AST]) -> set[Path]:
    """Files of this repository that nodes of a file import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = [ROOT.joinpath(*name.split(".")) for name in names if name.startswith(("recipe.cello1.", "tests."))]
    return {found for file in files for found in (file.with_suffix(".py"), file / "__init__.py") if found.is_file()}


def write_tree(out: Path) -> list[Path]:
    """Write the folder of the recipe; returns its files, below it."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"out: {out} is not empty; give a new folder")
    if not TESTS.is_dir():
        raise FileNotFoundError(f"{ROOT} has no tests; call this in a checkout of the repository")
    chosen = modules()
    configs = [path for path in (RECIPE / "config").rglob("*.yaml") if path.name != _LEFT_OUT]
    names = (*chosen, *NAMES, *(path.relative_to(RECIPE).as_posix() for path in configs))
    copies = {RECIPE / name: name for name in names} | {RECIPE / here: there for here, there in RENAMED.items()}
    copies |= {TESTS / name: f"tests/{name.removeprefix('recipe/')}" for name in tests(chosen)}
    for source, name in copies.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        if source.is_relative_to(TESTS):
            text = target.read_text(encoding="utf-8")
            target.write_text(text.replace("from tests.", "from recipe.cello1.tests."), encoding="utf-8")
    return sorted(map(Path, copies.values()))


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="new folder, verl-recipe/cello1 for example")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    files = write_tree(args.out)
    lines = {name: len((args.out / name).read_bytes().splitlines()) for name in files if name.suffix == ".py"}
    in_tests = sum(n for name, n in lines.items() if name.parts[0] == "tests")
    of_recipe = sum(lines.values()) - in_tests
    print(f"{args.out}: {len(files)} files; {of_recipe:,} lines of Python, and {in_tests:,} of tests")
