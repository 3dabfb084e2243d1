import pytest

from recipe.cello1 import same_run
from recipe.cello1.same_run import check_same_run, model_fingerprint, write_run


def test_the_same_settings_go_on_and_others_are_named(tmp_path):
    file = tmp_path / "run.json"
    check_same_run(file, {"a": 1}, "out")
    write_run(file, {"a": 1, "b": {"c": (1, 2), "d": None}})
    check_same_run(file, {"b": {"d": None, "c": [1, 2]}, "a": 1}, "out")
    with pytest.raises(ValueError, match=r"output=out .*: a \(1, now 2\), b\.c \(\[1, 2\], now None\);"):
        check_same_run(file, {"a": 2, "b": {"d": None}}, "out")


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_models_have_fingerprints(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(same_run, "_SAMPLE_BYTES", 16)
    contents = {"model.safetensors": b"w" * 4096, "config.json": b"{}", "README.md": b"card"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file, content in contents.items():
            (tmp_path / name / file).write_bytes(content)
    (tmp_path / "two" / "README.md").write_text("another card")
    one = model_fingerprint(tmp_path / "one")
    assert one == model_fingerprint(tmp_path / "two")
    (tmp_path / "two" / changed).write_bytes(contents[changed][:-1] + b"x")
    assert model_fingerprint(tmp_path / "two") != one
    assert model_fingerprint("owner/name") == "owner/name"
