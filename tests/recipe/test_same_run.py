import pytest

from recipe.cello1.same_run import check_same_run, write_run


def test_the_same_settings_go_on_and_others_are_named(tmp_path):
    file = tmp_path / "run.json"
    check_same_run(file, {"a": 1}, "out")
    write_run(file, {"a": 1, "b": {"c": (1, 2), "d": None}})
    check_same_run(file, {"b": {"d": None, "c": [1, 2]}, "a": 1}, "out")
    with pytest.raises(ValueError, match=r"output=out .*: a \(1, now 2\), b\.c \(\[1, 2\], now None\);"):
        check_same_run(file, {"a": 2, "b": {"d": None}}, "out")
