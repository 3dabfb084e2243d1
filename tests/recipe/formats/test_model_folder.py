"""Model folders: a wrong path is named before anything is loaded, and a changed model is told from what it was."""

import pytest

from recipe.cello1.formats import model_folder as hf_folder
from recipe.cello1.formats.model_folder import check_model_path, model_fingerprint


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
