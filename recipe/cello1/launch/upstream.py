"""Write the part of the recipe that goes to verl-recipe: training from prepared data, and nothing else.

    python -m recipe.cello1 upstream --out DIR

The tree holds the modules that the training needs, found by following the imports from ``ENTRIES``, with launchers,
configuration and tests. The rest stays the package that its README names.
"""

from __future__ import annotations

import argparse
import ast
import shutil
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipe" / "cello1"
# What verl, the launchers and the shell start; everything else follows from their imports.
ENTRIES = (
    "__init__.py",
    "__main__.py",
    "rl/dataset.py",
    "rl/reward_manager.py",
    "rl/replay_buffer.py",
    "rl/export.py",
    "cold_start/sft.py",
    "launch/preflight.py",
    "launch/watch.py",
    "launch/environment.py",
)
# File here -> file there.
FILES = {
    "launch/upstream_readme.md": "README.md",
    "launch/upstream_env.sh": "launch/setup_env.sh",
    **{name: name for name in ("REQUIRED_VERL.txt", "run_grpo.sh", "run_ppo.sh", "run_sft.sh")},
    **{name: name for name in ("launch/run_rl.sh", "launch/cpu_env.sh")},
}


def modules(entries: Iterable[str] = ENTRIES) -> list[Path]:
    """Find the modules that the entries need, themselves included, below the recipe."""
    found: set[Path] = set()
    left = [RECIPE / entry for entry in entries]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported(path)
    return sorted(path.relative_to(RECIPE) for path in found)


def _imported(path: Path) -> set[Path]:
    """Modules of the recipe that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = [ROOT.joinpath(*name.split(".")) for name in names if name.startswith("recipe.cello1.")]
    return {path for file in files for path in (file.with_suffix(".py"), file / "__init__.py") if path.is_file()}


def write_tree(out: Path) -> list[Path]:
    """Write the tree; returns its files below ``out``."""
    if out.exists() and any(out.iterdir()):
        msg = f"--out: {out} is not empty; give a new folder"
        raise FileExistsError(msg)
    target = out / "recipe" / "cello1"
    chosen = modules()
    configs = [path.relative_to(RECIPE) for path in (RECIPE / "config").rglob("*.yaml")]
    for here, there in {**{name: name for name in (*chosen, *configs)}, **FILES}.items():
        (target / there).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RECIPE / here, target / there)
    tests = ROOT / "tests"
    for path in (*tests.glob("recipe/**/test_*.py"), *tests.glob("helpers/*.py"), tests / "conftest.py"):
        name = path.relative_to(tests)
        module = Path(*name.parts[1:-1], name.name.removeprefix("test_"))
        if name.parts[0] != "recipe" or module in chosen:
            (out / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / "tests" / name)
    return sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="new folder for the tree")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    files = write_tree(args.out)
    lines = sum(
        len((args.out / name).read_text(encoding="utf-8").splitlines())
        for name in files
        if name.suffix == ".py" and name.parts[0] == "recipe"
    )
    print(f"{len(files)} files, {lines:,} lines of Python in the recipe: {args.out}")
