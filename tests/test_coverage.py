"""Floor 0, which everything stands on, is covered by its own tests: lines and branches, each module for itself."""

import json
import subprocess
import sys

from tests.recipe.processes import ROOT, environment
from tests.recipe.test_import_walls import FLOOR_0

LEAST = 98  # percent


def test_floor_0_is_covered_by_its_own_tests(tmp_path):
    def coverage(*arguments: str) -> None:
        command = [sys.executable, "-m", "coverage", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    data, report = f"--data-file={tmp_path / 'data'}", tmp_path / "report.json"
    own = [f"tests/recipe/test_{name}.py" for name in FLOOR_0]
    coverage("run", data, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own)
    coverage("json", data, "-o", str(report), "--include", ",".join(f"recipe/cello1/{name}.py" for name in FLOOR_0))
    files = json.loads(report.read_text())["files"]
    covered = {name: found["summary"]["percent_covered"] for name, found in files.items()}
    assert len(covered) == len(FLOOR_0), covered
    lacking = {name: files[name]["missing_lines"] for name, percent in covered.items() if percent < LEAST}
    assert not lacking
