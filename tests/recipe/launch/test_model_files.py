"""Model folders of strangers: whatever their files hold, it is read or refused in one line."""

import json
import random
import struct

import pytest

from recipe.cello1.launch.model_files import read_model

TENSORS = {"__metadata__": {}, "model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
FILES = {
    "config.json": {"max_position_embeddings": 10},
    "tokenizer_config.json": {},
    "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 1, "content": "b"}]},
    "model.safetensors.index.json": {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}},
}
ODD = [None, [], {}, 7, -1, 1.5, True, "x", "", 10**30, [[]], {"a": 1}, float("nan"), [1, 2], [-2, 5], ["a"]]


def changed(value, rng):
    if rng.random() < 0.25:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: changed(part, rng) if rng.random() < 0.5 else part for key, part in value.items()}
    if isinstance(value, list):
        return [changed(part, rng) for part in value]
    return value


def write(folder, tensors=TENSORS, **files):
    header = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    for name, content in {**FILES, **files}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_what_is_in_order_is_read(tmp_path):
    write(tmp_path)
    found = read_model(tmp_path)
    assert (found.n_parameters, found.config) == (4, {"max_position_embeddings": 10})


def test_odd_folders_are_read_or_refused_in_one_line(tmp_path):
    for seed in range(300):
        rng = random.Random(seed)
        write(tmp_path, changed(TENSORS, rng), **{name: changed(content, rng) for name, content in FILES.items()})
        try:
            assert read_model(tmp_path).n_parameters >= 0, seed
        except ValueError as error:
            said = str(error)
            assert "\n" not in said and str(tmp_path) in said and len(said) < 1000, seed


@pytest.mark.parametrize(
    "places",
    [
        [(0, 16), (0, 16)],
        [(0, 8), (4, 16)],
        [(8, 16)],
        [(0, 8), (12, 16)],
        [(0, 16), (16, 8)],
        [(-8, 16)],
        [(0, 16, 16)],
        [(0, 16), (16, 16), (16, 8)],
        [(0, 8), (8, 16), (16, 4)],
    ],
)
def test_tensors_that_do_not_lie_one_after_another(tmp_path, places):
    """A header of 100 MB may have a million tensors on one place, which all would be read."""
    write(tmp_path, {f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": at} for i, at in enumerate(places)})
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_model(tmp_path)


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"null", b"{}{}", b""])
def test_odd_headers(tmp_path, header):
    write(tmp_path, header)
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        read_model(tmp_path)


def test_a_header_that_says_to_be_endless(tmp_path):
    write(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)  # sparse: of no bytes on the disk
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        read_model(tmp_path)
