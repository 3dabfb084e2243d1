"""A run that is killed (SIGKILL) again and again ends with the files of an undisturbed one, and reads none twice."""

import pytest

from tests.helpers.kills import KILLS, kill_scenario
from tests.helpers.prepare_runs import content
from tests.helpers.toy_h5ad import toy_adata, write

SCENARIO = """
def prepare(out):
    options = ["--sizes", "3", "--per-size", "3", "--raw", "--workers", "1", "--threads", "1", "--quiet"]
    return lambda: main(["prepare", str(folder / "in"), "--out", str(folder / out), *options])


def look():
    parts = sorted((folder / "killed" / ".parts").rglob("*.json"))
    return {path.name: path.stat().st_mtime_ns for path in parts if not path.name.startswith(".")}


prepare("warm")()  # compiles what all of them need
seconds = finish(prepare("whole"))
found = kill_often(prepare("killed"), 0.2 * seconds, look)
finish(prepare("killed"))
(folder / "found.json").write_text(json.dumps([[*found, look()], at_once(prepare("both"))]))
"""


@pytest.mark.integration
def test_twenty_kills_lose_and_repeat_nothing(tmp_path):
    for i in range(12):
        write(toy_adata(i, n_cells=60, n_donors=2, donor_prefix=f"d{i}_"), tmp_path / "in" / f"file{i}.h5ad")
    parts, codes = kill_scenario(SCENARIO, tmp_path)
    assert codes == [0, 1]  # of two at once one works, and one does not
    assert len(parts) >= KILLS and len({len(done) for done in parts}) > 3  # they died in the middle of it
    for before, after in zip(parts, parts[1:], strict=False):
        assert before.items() <= after.items()  # no file is read again
    assert len(parts[-1]) == 12
    assert content(tmp_path / "killed") == content(tmp_path / "whole") == content(tmp_path / "both")
    assert not list((tmp_path / "killed").rglob("*.tmp"))
