"""The shell of the commands, as the tests call it."""

from collections.abc import Callable, Iterable

from recipe.cello1.__main__ import main


def command(name: str) -> Callable[[Iterable[object]], int]:
    """Return what runs a command in this process with some arguments, and returns its exit code."""
    return lambda arguments: main([*name.split(), *map(str, arguments)])
