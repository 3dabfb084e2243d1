"""What an expression file must not take from elsewhere, in data and plugin alike."""

import os

import h5py
import numpy as np
import pytest

from recipe.cello1.data.extract import Job, process_file
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.formats.outside_links import BadFileError, refuse_outside_links
from tests.helpers.toy_h5ad import toy_adata, write


def external_link(file, secret):
    del file["obs/tissue"]
    file["obs/tissue"] = h5py.ExternalLink(secret, "/obs/tissue")


def external_storage(file, secret):
    del file["var/feature_name"]
    file.create_dataset("var/feature_name", (120,), "S4", external=[(str(secret), 0, 480)])


def virtual(file, secret):
    layout = h5py.VirtualLayout((300,), "i4")
    layout[:] = h5py.VirtualSource(secret, "x", (300,))
    file.create_virtual_dataset("uns/a/b", layout)


def through_a_soft_link(file, secret):
    file["uns/out"] = h5py.ExternalLink(secret, "/")
    del file["obs/sex"]
    file["obs/sex"] = h5py.SoftLink("/uns/out/x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (external_link, "its obs/tissue is an external link to "),
        (external_storage, "its var/feature_name lies in another file, "),
        (virtual, "its uns/a/b is a virtual dataset"),
        (through_a_soft_link, "its uns/out is an external link to "),
    ],
)
def test_hdf5(tmp_path, change, said):
    secret = tmp_path / "secret"
    secret.write_bytes(b"key!" * 300)
    path = write(toy_adata(n_cells=40), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        change(file, secret)
    with pytest.raises(BadFileError, match=said):
        refuse_outside_links(path)
    result = process_file(Job(str(path), "a", "", PuzzleSettings()))
    assert said in result.reason and "may be an attack" in result.remedy and not result.puzzles


def test_links_inside_the_file_are_fine(tmp_path):
    path = write(toy_adata(n_cells=40), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["obs/again"] = h5py.SoftLink("/obs/tissue")
        file["uns/loop"] = file["uns"]
        file["uns/far"] = np.arange(3)
    refuse_outside_links(path)
    (tmp_path / "b.h5ad").symlink_to(path)
    refuse_outside_links(tmp_path / "b.h5ad")


@pytest.mark.parametrize("place", ["obs/tissue", "X/data/c", "zarr.json"])
@pytest.mark.filterwarnings("ignore")
def test_zarr(tmp_path, place):
    path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    refuse_outside_links(path)
    other = tmp_path / "other"
    os.replace(path / place, other) if (path / place).exists() else other.mkdir()
    (path / place).symlink_to(other)
    with pytest.raises(BadFileError, match=f"its {place} is a link to .*other, outside of it"):
        refuse_outside_links(path)
    assert "outside of it" in process_file(Job(str(path), "a", "", PuzzleSettings())).reason


@pytest.mark.filterwarnings("ignore")
def test_zarr_links_that_stay_inside(tmp_path):
    path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    (path / "uns" / "again").symlink_to(path / "obs")
    refuse_outside_links(path)
    os.mkfifo(path / "uns" / "pipe")
    with pytest.raises(BadFileError, match="its uns/pipe is neither a file nor a folder"):
        refuse_outside_links(path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.h5ad")
    with pytest.raises(BadFileError, match="neither a file nor a folder"):
        refuse_outside_links(tmp_path / "a.h5ad")
