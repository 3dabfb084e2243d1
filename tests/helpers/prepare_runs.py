"""Runs of ``prepare`` in this process, and what they leave."""

import hashlib
import json
import os
from pathlib import Path

from recipe.cello1.formats.puzzle_files import load_puzzles
from tests.helpers.cli import command

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("CELLO1_SHARED_DATA") or ROOT.parent / "shared" / "data")
REAL = SHARED / "cellpuzzles_unseen_melanoma.json"
FEW = ["--sizes", "3-4", "--per-size", "10", "--quiet", "--workers", "1"]
NAMES = ("lung/file0", "lung/file1", "kidney/file2")


def run(*arguments) -> int:
    words = [str(argument) for argument in arguments]
    return command("prepare audit")(words[1:]) if words[:1] == ["audit"] else command("prepare")(words)


def content(out: Path, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Hash of every file, hidden ones left out."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    names = {path.relative_to(out).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not name.startswith(".") and name not in besides
    }


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_bytes())


def build(folder, out, *options) -> list:
    assert run(folder, "--out", out, *FEW, *options) == 0
    return load_puzzles(out / "train" / "train_data.json").puzzles
