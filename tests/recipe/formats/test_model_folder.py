"""Model folders: a wrong path is named before anything is loaded, and a changed model is told from what it was."""

import json
import logging
import re

import pytest

from recipe.cello1.formats import model_folder as hf_folder
from recipe.cello1.formats.model_folder import check_model_path, load_pickled, model_fingerprint


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "~/model", "model", "a/b/c"])
def test_missing_model_folder(model):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_model_path(model)


def test_model_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        check_model_path(str(tmp_path))


def test_hub_name_is_not_looked_up():
    check_model_path("ncbi/Cell-o1")
    assert model_fingerprint("ncbi/Cell-o1") == ""


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("place", [0, -1])
def test_fingerprint_sees_changes_of_weights_configuration_and_tokenizer(tmp_path, monkeypatch, changed, place):
    monkeypatch.setattr(hf_folder, "_SAMPLE_BYTES", 16)
    files = ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja")
    for name in files:
        (tmp_path / name).write_bytes(b"w" * 4096)
    first = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("not part of the model")
    assert model_fingerprint(str(tmp_path)) == first
    content = bytearray(b"w" * 4096)
    content[place] = ord("x")
    (tmp_path / changed).write_bytes(content)
    assert model_fingerprint(tmp_path) != first


def folder_of(tmp_path, **files):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("secret.json", "out.safetensors"):
        (tmp_path / name).write_text("{}")
    for name, content in {"config": {}, **files}.items():
        (folder / f"{name.replace('__', '.')}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("outside", ["../out.safetensors", "a/../../out.safetensors", "/etc/out.safetensors"])
def test_weights_of_another_folder(tmp_path, outside):
    folder = folder_of(tmp_path, model__safetensors__index={"weight_map": {"a": "model.safetensors", "b": outside}})
    with pytest.raises(ValueError, match=re.escape(f"index.json names {outside!r}, outside of its folder")):
        check_model_path(str(folder))


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "spm_file"])
def test_a_tokenizer_of_another_folder(tmp_path, key):
    """transformers reads it, and whoever saves the tokenizer writes it out."""
    folder = folder_of(tmp_path, tokenizer_config={key: "../secret.json"})
    with pytest.raises(
        ValueError, match=re.escape("tokenizer_config.json names '../secret.json', outside of its folder")
    ):
        check_model_path(str(folder))


def test_names_that_are_in_order(tmp_path):
    folder = folder_of(
        tmp_path,
        model__safetensors__index={"weight_map": {"a": "model-1.safetensors", "b": "./part/../model-2.safetensors"}},
        tokenizer_config={
            "tokenizer_file": "/somebody/cache/tokenizer.json",
            "vocab_file": None,
            "b_file": "config.json",
        },
    )
    (tmp_path / "link").symlink_to(folder)
    check_model_path(str(folder))
    check_model_path(str(tmp_path / "link"))


def test_an_adapter_in_place_of_a_model(tmp_path):
    folder = folder_of(tmp_path, adapter_config={"base_model_name_or_path": "some/body"})
    with pytest.raises(ValueError, match=r"for which 'some/body' would be loaded .* the adapter as lora"):
        check_model_path(str(folder))


@pytest.mark.parametrize(("content", "said"), [("[" * 100_000, "is not valid JSON"), ("[1]", "got list"), ("", "JSON")])
def test_files_that_are_no_objects(tmp_path, content, said):
    (folder_of(tmp_path) / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer_config.json .*{said}.*; copy it again"):
        check_model_path(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (PermissionError(13, "Permission denied", "a.pt"), PermissionError, "Permission denied: 'a.pt'"),
        (MemoryError("out"), MemoryError, "out"),
        (
            RuntimeError("unable to mmap\n9 bytes"),
            ValueError,
            "a.pt cannot be read .RuntimeError: unable to mmap 9",
        ),
    ],
)
def test_what_is_not_the_files_fault_is_said_as_it_is(tmp_path, monkeypatch, error, kind, said):
    torch = pytest.importorskip("torch")

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    logger = logging.getLogger("torch.distributed.device_mesh")
    before = logger.level
    with pytest.raises(kind, match=said):
        load_pickled(tmp_path / "a.pt", "remedy")
    assert logger.level == before


def test_a_file_that_ends_too_early_is_said_to(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="a.pt cannot be read .EOFError.; copy it again"):
        load_pickled(tmp_path / "a.pt", "remedy")
