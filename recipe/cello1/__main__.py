"""``cello1 COMMAND``, or ``python -m recipe.cello1 COMMAND``: one shell around every command.

What a function says of its parameters, the shell says of the options; see ``in_options``.

A command is a module with ``build_parser()`` and ``run(args)``; what follows ``--`` is ``args.rest`` for those whose
parser has a default for it. ``run`` returns nothing when all is done, a sentence when something is missing, or an
exit code of its own. Other packages add commands through the entry-point group ``cello1.commands``.

What a command prints is filtered: file names, types and the answers of servers hold what a terminal would obey.

Exit codes: 0 done, 1 the input or the run failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipe.cello1.task.text import in_options, visible

GROUP = "cello1.commands"
COMMANDS = {
    "prepare": "recipe.cello1.data.prepare",
    "prepare audit": "recipe.cello1.data.leaks",
    "recombine": "recipe.cello1.cold_start.recombine",
    "traces markers": "recipe.cello1.cold_start.marker_traces",
    "traces teacher": "recipe.cello1.cold_start.teacher_traces",
    "sft": "recipe.cello1.cold_start.sft",
    "export": "recipe.cello1.rl.export",
    "predict": "recipe.cello1.inference.predict",
    "vote": "recipe.cello1.inference.vote",
    "evaluate": "recipe.cello1.evaluation.evaluate",
}
# What the launchers call, and maintainers.
STEPS = {
    "cells": "recipe.cello1.cold_start.cells",
    "tiny-model": "recipe.cello1.cold_start.tiny_model",
    "preflight": "recipe.cello1.launch.preflight",
    "watch": "recipe.cello1.launch.watch",
    "summary": "recipe.cello1.launch.summary",
    "upstream": "recipe.cello1.launch.upstream",
}


class Terminal:
    """A stream that lets nothing through that a terminal would obey, but for the moves of a progress bar."""

    _COLOUR = re.compile(r"\x1b\[[\d;]*m")
    _MOVE = re.compile(r"(?:\r|(?:\n|\x1b\[A)+\Z)?")

    def __init__(self, stream: Any, *, moves: bool) -> None:
        self._stream = stream
        self._moves = moves

    def write(self, text: str) -> int:
        """Write a piece of text, or a move."""
        move = self._MOVE.match(text)[0] if self._moves else ""  # type: ignore[index]
        self._stream.write(move + visible(self._COLOUR.sub("", text[len(move) :])))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def commands() -> dict[str, str]:
    """Return every command that is there with its module, those of other packages included."""
    others = {point.name: point.value for point in sorted(entry_points(group=GROUP))}
    known = {**COMMANDS, **others, **STEPS}
    return {name: module for name, module in known.items() if not _is_left_out(module)}


def _is_left_out(module: str) -> bool:
    """Tell whether a module of the recipe is not there: launch/upstream.py leaves some out."""
    path = Path(__file__).parents[2].joinpath(*module.split("."))
    return module.startswith("recipe.cello1.") and not path.with_suffix(".py").is_file()


def summary(module: str) -> str:
    """Return the first line of a module's docstring, without importing anything."""
    package, _, rest = module.partition(".")
    if module.startswith("recipe.cello1."):
        folders = [str(Path(__file__).parents[1])]
    else:
        spec = find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder, *rest.split(".")).with_suffix(".py")
        if path.is_file():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return text.split("\n")[0].rstrip(".")
    return ""


def usage() -> str:
    """Write the help of the shell."""
    known = commands()
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {summary(module)}" for name, module in known.items() if name not in STEPS]
    steps = [f"  {name:<{width}}  {summary(module)}" for name, module in known.items() if name in STEPS]
    return "\n".join(
        [
            "usage: cello1 COMMAND ...",
            "",
            "Cell type annotation by reasoning over cell puzzles: data, training, prediction, evaluation, annotation.",
            "",
            "commands:",
            *lines,
            "",
            "steps of the launchers, and of maintainers:",
            *steps,
            "",
            "cello1 COMMAND --help lists its options; with --traceback an error shows where it was raised.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command."""
    if argv is None:  # the program itself; progress bars go to stderr, and what it starts runs no module that lies here
        os.environ["PYTHONSAFEPATH"] = "1"
        sys.stdout, sys.stderr = Terminal(sys.stdout, moves=False), Terminal(sys.stderr, moves=True)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    known = commands()
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), "")
    if not name:
        near = [other for other in known if other.split()[0] == words[0]]
        hint = f"it is one of: {', '.join(near)}" if near else "cello1 --help lists the commands"
        print(f"cello1: error: there is no command {' '.join(words[: 1 + bool(near)])!r}; {hint}", file=sys.stderr)
        return 2
    return _run(name, known[name], words[len(name.split()) :])


def _run(name: str, module: str, words: list[str]) -> int:
    def fail(text: object) -> int:
        said = str(text) if parser is None else in_options(str(text), parser)
        print(f"cello1 {name}: error: {said}", file=sys.stderr)
        return 1

    command = parser = None
    end = words.index("--") if "--" in words else len(words)
    words, rest = words[:end], words[end + 1 :]
    traceback = "--traceback" in words
    if traceback:
        words.remove("--traceback")
    try:
        command = import_module(module)
        parser = command.build_parser()
        parser.prog = f"cello1 {name}"
        parser.description = parser.description or summary(module)
        args = parser.parse_intermixed_args(words)
        if rest:  # for a program that the command calls
            if parser.get_default("rest") is None:
                parser.error(f"nothing can follow --, got {' '.join(rest)}")
            args.rest = rest
        outcome = command.run(args)
    except KeyboardInterrupt:
        print(f"cello1 {name}: interrupted{getattr(command, 'AFTER_INTERRUPT', '')}", file=sys.stderr)
        return 130
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        if traceback:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name:
            return fail(f"the package {error.name} is not installed: pip install {error.name}")
        if isinstance(error, MemoryError):
            return fail(str(error) or "memory ran out; give less at once, or use a larger machine")
        return fail(str(error) or f"{type(error).__name__}, without a message; --traceback shows where it was raised")
    return fail(outcome) if isinstance(outcome, str) else outcome or 0


if __name__ == "__main__":
    raise SystemExit(main())
