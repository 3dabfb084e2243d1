import importlib.util
import os
import subprocess
from importlib.metadata import distributions

import pytest

from recipe.cello1.launch import environment


def test_fingerprint_follows_content_and_place(tmp_path):
    file, moved = tmp_path / "setup.py", tmp_path / "moved.py"
    file.write_text("a")
    moved.write_text("a")
    first = environment.fingerprint(str(file))
    assert environment.fingerprint(str(file)) == first
    assert environment.fingerprint(str(moved)) != first
    file.write_text("b")
    assert environment.fingerprint(str(file)) != first


def test_pips_configuration_becomes_that_of_uv(tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.invalid/simple\ntrusted-host = one.invalid\n  two.invalid\n"
        "[install]\nfind-links = /a\n  /b\n"
    )
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://o'x:$(touch x)@two.invalid/simple file:///three")
    monkeypatch.setenv("PIP_INDEX_URL", "https://four.invalid/simple")  # a variable counts before the file
    monkeypatch.setenv("UV_INSECURE_HOST", "mine")  # said to uv itself
    shown = subprocess.run(
        ["bash", "-c", f"{environment.uv_settings()}; env"],
        env={"PATH": os.environ["PATH"], "UV_INSECURE_HOST": "mine"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert {line for line in shown if line.startswith("UV_")} == {
        "UV_DEFAULT_INDEX=https://four.invalid/simple",
        "UV_INDEX=https://o'x:$(touch x)@two.invalid/simple file:///three",
        "UV_FIND_LINKS=/a,/b",
        "UV_INSECURE_HOST=mine",
        "UV_INDEX_STRATEGY=unsafe-best-match",
    }
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("found", ["0.27.1", "0.27.1+cpu"])
def test_name_vllm_is_a_distribution_whose_version_says_cpu(tmp_path, found):
    environment.name_vllm(str(tmp_path), found)
    (alias,) = distributions(path=[str(tmp_path)])
    assert (alias.metadata["Name"], alias.version) == ("vllm", "0.27.1+cpu")
    # A complete RECORD is what lets pip remove it.
    assert all(file.locate().is_file() for file in alias.files)
    assert {file.name for file in alias.files} == {"METADATA", "INSTALLER", "RECORD"}
    assert not alias.requires


def test_name_vllm_replaces_the_name_of_an_older_version(tmp_path):
    environment.name_vllm(str(tmp_path), "0.27.0")
    environment.name_vllm(str(tmp_path), "0.27.1")
    assert [d.version for d in distributions(path=[str(tmp_path)])] == ["0.27.1+cpu"]


def test_name_vllm_leaves_a_real_vllm_alone(tmp_path):
    real = tmp_path / "vllm-0.24.0.dist-info"
    real.mkdir()
    environment.name_vllm(str(tmp_path), "0.27.1")
    assert real.is_dir()


def test_look_names_what_is_missing_and_the_remedy(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("verl", "trl") else real("json"))
    with pytest.raises(ImportError, match=r"lacks verl, trl.*pip install verl=="):
        environment.look()


def test_look_says_that_verl_would_not_find_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def no_distribution(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", no_distribution)
    with pytest.raises(ImportError, match="name-vllm"):
        environment.look()


def test_verify_fails_with_the_name_of_what_does_not_load(monkeypatch, capsys):
    monkeypatch.setitem(environment.IMPORTS, "test", ("json", "json:no_such_thing", "not_reached"))
    assert environment.main("verify", "test") == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("set-up failed: json:no_such_thing: AttributeError: ")


def test_verify_loads_the_plugin_with_a_training_set(monkeypatch):
    monkeypatch.setitem(environment.IMPORTS, "cpu", ())
    monkeypatch.setattr(environment, "entry_points", lambda **_: ())
    with pytest.raises(ImportError, match="the verl plugin cello1_cpu"):
        environment.verify("cpu")
