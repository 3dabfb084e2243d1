"""One name, one meaning: no two modules define different public things under one name."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.helpers.rooms import RECIPE, ROOT

# What every module of a kind has: the parts of a command, and a logger.
OF_A_KIND = {"build_parser", "run", "main", "AFTER_INTERRUPT", "logger"}


def public_names(path: Path) -> set[str]:
    """Names that a module defines at its top level, without those that begin with an underscore."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return {name for name in found if not name.startswith("_")}


def test_no_two_public_things_have_one_name():
    places = defaultdict(list)
    for folder in (RECIPE, ROOT / "scverse_plugin"):
        for path in sorted(folder.rglob("*.py")):
            for name in public_names(path) - OF_A_KIND:
                places[name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
