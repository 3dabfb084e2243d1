import os
from importlib.metadata import version

import pytest

from recipe.cello1.formats.provenance import (
    NOT_INSTALLED,
    check_same_run,
    package_versions,
    worker_variables,
    write_run,
)
from tests.helpers.rooms import ROOT


def test_the_same_settings_go_on_and_others_are_named(tmp_path):
    file = tmp_path / "run.json"
    check_same_run(file, {"a": 1}, "out")
    write_run(file, {"a": 1, "b": {"c": (1, 2), "d": None}})
    check_same_run(file, {"b": {"d": None, "c": [1, 2]}, "a": 1}, "out")
    with pytest.raises(ValueError, match=r"output=out .*: a \(1, now 2\), b\.c \(\[1, 2\], now None\);"):
        check_same_run(file, {"a": 2, "b": {"d": None}}, "out")


def test_what_is_installed_and_what_is_not():
    found = package_versions(["pytest", "no-such-package", "numpy"])
    assert found == {"pytest": version("pytest"), "no-such-package": NOT_INSTALLED, "numpy": version("numpy")}
    assert list(found) == ["pytest", "no-such-package", "numpy"]


def test_workers_find_the_package_first(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/a", str(ROOT), "/b"]))
    assert worker_variables()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/a", "/b"]
