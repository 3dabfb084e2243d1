"""The rooms of the recipe: what each may import, and which modules stay light."""

from pathlib import Path

from recipe import cello1

RECIPE = Path(cello1.__file__).parent
ROOT = RECIPE.parents[1]

# Room -> what it may import besides itself. A name with a dot admits that folder only.
MAY_IMPORT = {
    "task": (),
    "formats": ("task",),
    "engines": ("task", "formats"),
    "data": ("task", "formats"),
    "rl": ("task", "formats"),
    "inference": ("task", "formats", "engines"),
    "cold_start": ("task", "formats", "engines", "data.expression"),
    "evaluation": ("task", "formats", "engines", "inference"),
    "launch": ("task", "formats", "engines", "rl", "inference", "evaluation"),
    "scverse_plugin": ("task", "formats", "engines"),
}

TASK = tuple(f"task.{path.stem}" for path in sorted((RECIPE / "task").glob("[a-z]*.py")))
# Needs numpy at most (the ranking of genes and voting need scipy), so that reward and plugin load in no time.
LIGHT = (
    *TASK,
    *(f"formats.{name}" for name in ("atomic", "items", "rl_rows", "puzzle_files", "predictions", "provenance")),
    *("rl.shaping", "rl.curriculum"),
)
NEED_SCIPY = ("task.genes", "task.voting", "formats.predictions")


def own_tests(module: str) -> str:
    """Path of the tests of a module, below the root."""
    room, name = module.split(".")
    return f"tests/recipe/{room}/test_{name}.py"
