"""Versions of installed packages, for everything that records what it was made with."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

NOT_INSTALLED = "not installed"


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Look the versions of packages up.

    Parameters
    ----------
    names
        Names of distributions, as pip knows them.

    Returns
    -------
    Name to version, in the order given; ``NOT_INSTALLED`` where there is no such distribution.
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found
