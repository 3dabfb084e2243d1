"""The light modules, which all else stands on, are covered by the tests of their own rooms: lines and branches."""

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment
from tests.helpers.rooms import LIGHT, own_tests

LEAST = 98  # percent


@pytest.mark.slow
def test_light_modules_are_covered_by_their_own_tests(tmp_path):
    def coverage(*arguments: str) -> None:
        command = [sys.executable, "-m", "coverage", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    data, report = f"--data-file={tmp_path / 'data'}", tmp_path / "report.json"
    own = ["tests/recipe/task", "tests/recipe/formats", *(own_tests(name) for name in LIGHT if name.startswith("rl."))]
    coverage("run", data, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own)
    coverage(
        "json",
        data,
        "-o",
        str(report),
        "--include",
        ",".join(f"recipe/cello1/{name.replace('.', '/')}.py" for name in LIGHT),
    )
    files = json.loads(report.read_text())["files"]
    covered = {name: found["summary"]["percent_covered"] for name, found in files.items()}
    assert len(covered) == len(LIGHT), covered
    lacking = {name: files[name]["missing_lines"] for name, percent in covered.items() if percent < LEAST}
    assert not lacking
