import os
from importlib.metadata import version

import pytest

from recipe.cello1.formats.provenance import (
    NOT_INSTALLED,
    check_same,
    check_same_run,
    digest,
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


def test_what_is_made_in_another_way_is_not_added():
    check_same({"model": "m", "sampling": {"seed": 1}}, {"sampling": {"seed": 1}, "model": "m"}, "answers.jsonl")
    with pytest.raises(
        ValueError, match=r"answers.jsonl: made with sampling \{'seed': 1\}, this run has \{'seed': 2\}"
    ):
        check_same({"model": "m", "sampling": {"seed": 1}}, {"model": "m", "sampling": {"seed": 2}}, "answers.jsonl")


def test_a_digest_is_that_of_the_content():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"a": 1, "b": (1, 2)}) != digest({"a": 1, "b": [2, 1]})
    assert len(digest("x")) == 64
    assert digest("x", 12) == digest("x")[:12]
