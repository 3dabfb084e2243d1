"""What the processes that Ray starts need in order to run this package."""

from __future__ import annotations

import os
from pathlib import Path


def worker_variables() -> dict[str, str]:
    """Make the variables by which a worker finds this package also where it is not installed.

    Returns
    -------
    ``PYTHONPATH``: this repository, then what is on the path of this process; for ``runtime_env["env_vars"]``.
    """
    here = str(Path(__file__).parents[2])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
