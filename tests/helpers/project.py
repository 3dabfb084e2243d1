"""The project as files, and what it tells setuptools."""

import runpy
import subprocess
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


def setup_arguments() -> dict:
    """The arguments that setup.py passes to setuptools."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", seen.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return seen


def project_files() -> list[Path]:
    """Every file of the project that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive
        paths = [p for p in ROOT.rglob("*") if not {".venv", "outputs", "__pycache__"} & set(p.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())
