"""What an expression file must not be, and must not take from elsewhere, in data and plugin alike."""

import gzip
import json
import os
import re
import resource
import subprocess
import sys
import zlib

import h5py
import numcodecs
import numpy as np
import pytest

from recipe.cello1.data.expression import vectors
from recipe.cello1.data.expression.matrix import map_blocks, open_matrix
from recipe.cello1.data.expression.store import Store
from recipe.cello1.data.extract import Job, process_file
from recipe.cello1.data.settings import PuzzleSettings
from recipe.cello1.formats import machine, stores
from recipe.cello1.formats.stores import BadFileError, check_store
from scverse_plugin._files import read_object
from tests.helpers.processes import environment
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
        check_store(path)
    result = process_file(Job(str(path), "a", "", PuzzleSettings()))
    assert said in result.reason and "may be an attack" in result.remedy and not result.puzzles


def test_links_inside_the_file_are_fine(tmp_path):
    path = write(toy_adata(n_cells=40), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        file["obs/again"] = h5py.SoftLink("/obs/tissue")
        file["uns/loop"] = file["uns"]
        file["uns/far"] = np.arange(3)
    check_store(path)
    (tmp_path / "b.h5ad").symlink_to(path)
    check_store(tmp_path / "b.h5ad")


@pytest.mark.parametrize("place", ["obs/tissue", "X/data/c", "zarr.json"])
@pytest.mark.filterwarnings("ignore")
def test_zarr(tmp_path, place):
    path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    check_store(path)
    other = tmp_path / "other"
    os.replace(path / place, other) if (path / place).exists() else other.mkdir()
    (path / place).symlink_to(other)
    with pytest.raises(BadFileError, match=f"its {place} is a link to .*other, outside of it"):
        check_store(path)
    assert "outside of it" in process_file(Job(str(path), "a", "", PuzzleSettings())).reason


@pytest.mark.filterwarnings("ignore")
def test_zarr_links_that_stay_inside(tmp_path):
    path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    (path / "uns" / "again").symlink_to(path / "obs")
    check_store(path)
    os.mkfifo(path / "uns" / "pipe")
    with pytest.raises(BadFileError, match="its uns/pipe is neither a file nor a folder"):
        check_store(path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.h5ad")
    with pytest.raises(BadFileError, match="neither a file nor a folder"):
        check_store(tmp_path / "a.h5ad")


# ------------------------------------------------------------------------------------------------ something else


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty; fetch"),
        (gzip.compress(b"x" * 99, mtime=0), "it is packed .*; unpack it"),
        (b"PK\x03\x04" + b"x" * 99, "it is packed .*; unpack it"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 99, "it is packed .*; unpack it"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "only points to the data .*git lfs pull",
        ),
        (b"\n <!DOCTYPE html><html>", "it is a web page or XML; download it again"),
        (b"gene,cell\n", "it is no HDF5 file; give an h5ad file"),
        (b"\x89HDF\r\n\x1a\n", "cannot be read .*; the file is damaged"),
    ],
)
def test_what_a_file_is_decides_the_remedy(tmp_path, content, said):
    path = tmp_path / "a.h5ad"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=said):
        check_store(path)
    assert re.search(said, str(BadFileError(*_outcome(path))))
    with pytest.raises(ValueError, match=f"input: {path}: .*{said}"):
        read_object(path)


def _outcome(path):
    result = process_file(Job(str(path), "a", "", PuzzleSettings()))
    return result.reason, result.remedy


@pytest.mark.parametrize("group", ["mod/rna", "matrix/data", "row_attrs/Gene", "assays/RNA"])
def test_other_formats_are_called_by_their_name_in_the_plugin_too(tmp_path, group):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file.create_group(group)
    said = {"mod": "MuData", "matrix": "10x", "row_attrs": "loom", "assays": "Seurat"}[group.partition("/")[0]]
    assert said in _outcome(tmp_path / "a.h5ad")[0]
    with pytest.raises(ValueError, match=f"a.h5ad: it is .*{said}"):
        read_object(tmp_path / "a.h5ad")


@pytest.mark.slow
def test_the_kind_of_a_store_not_its_name_decides_how_it_is_read(tmp_path):
    adata = toy_adata(n_cells=60, n_donors=2)
    settings = PuzzleSettings(sizes=(3,), per_size=3)
    made = []
    for name, kind in (("a.h5ad", "h5ad"), ("b.h5ad", "zarr"), ("c.zarr", "h5ad"), ("d.zarr", "zarr")):
        getattr(adata, f"write_{kind}")(tmp_path / name)
        made.append(process_file(Job(str(tmp_path / name), "a", "", settings)).puzzles)
        assert read_object(tmp_path / name).shape == adata.shape
    assert made[0] and all(found == made[0] for found in made)


def test_a_file_that_is_locked_is_not_called_damaged_by_the_plugin(tmp_path):
    path = write(toy_adata(n_cells=4), tmp_path / "a.h5ad")
    code = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process has it open"):
            read_object(path)
        other.communicate(b"\n")
    assert read_object(path).n_obs == 4


# ------------------------------------------------------------------------------- what unpacks to more than it says

BOMB = bytes(1 << 28)


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 27)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


@pytest.mark.parametrize("place", ["X/data", "X/indptr", "obs/tissue/codes", "var/feature_name", "obs/_index"])
def test_a_chunk_of_hdf5_that_unpacks_to_more_than_it_says(tmp_path, place, little_memory):
    path = write(toy_adata(n_cells=300), tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(path, "a") as file:
        file[place].id.write_direct_chunk((0,), zlib.compress(BOMB))
    said = f"its {place} is stored in more bytes than it has"
    assert _outcome(path) == (said, stores.DAMAGED)
    with pytest.raises(ValueError, match=f"input: .*a.h5ad: {said}"):
        read_object(path)


@pytest.mark.parametrize("place", ["X/data", "X/indices"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_chunk_of_the_matrix_that_unpacks_to_a_little_more_than_it_says(tmp_path, place, shuffle, monkeypatch):
    path = write(toy_adata(n_cells=300), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        values = file[place][:]
        del file[place]
        file.create_dataset(place, data=values, chunks=(1000,), compression="gzip", shuffle=shuffle)
        file[place].id.write_direct_chunk((0,), zlib.compress(BOMB[: 1 << 24]))
    sizes = []
    inflate = vectors.inflate.decompressobj

    class Counted:
        def __init__(self):
            self.stream = inflate()

        def decompress(self, *arguments):
            sizes.append(len(found := self.stream.decompress(*arguments)))
            return found

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(vectors.inflate, "decompressobj", Counted)
    with Store(path) as store, pytest.raises(BadFileError, match="a compressed chunk of its matrix holds more than it"):
        list(map_blocks(open_matrix(store.matrix(), store.file), len))
    assert 0 < max(sizes) < 1 << 18


@pytest.mark.parametrize("place", ["X/data", "obs/tissue/codes", "var/feature_name"])
@pytest.mark.parametrize(
    "codec", [numcodecs.Zstd(), numcodecs.GZip(), numcodecs.Zlib(), numcodecs.Blosc(), numcodecs.LZ4()], ids=repr
)
@pytest.mark.filterwarnings("ignore")
def test_a_chunk_of_zarr_that_unpacks_to_more_than_it_says(tmp_path, codec, place, little_memory):
    path = write(toy_adata(n_cells=300), tmp_path / "a.zarr")
    metadata = path / place / ".zarray"
    text = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(text | {"compressor": codec.get_config()}))
    (path / ".zmetadata").unlink()
    (path / place / "0").write_bytes(codec.encode(BOMB))
    result = process_file(Job(str(path), "a", "", PuzzleSettings()))
    assert not result.puzzles
    assert "it takes more memory than is free" in result.remedy
    with pytest.raises(ValueError, match=r"input: .*a.zarr cannot be read .*memory"):
        read_object(path)


BLOSC = [("lz4", 1), ("zstd", 1), ("zlib", 2), ("blosclz", 0)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A store was opened in this process."""
    check_store(write(toy_adata(n_cells=4), tmp_path_factory.mktemp("opened") / "a.zarr"))


CHANGED = """
import random, sys
import numcodecs
import numpy as np
from recipe.cello1.formats.stores import check_store

check_store(sys.argv[1])  # a store was opened in this process
if sys.argv[2] == "texts":
    codec, values = numcodecs.VLenUTF8(), np.array(["abc", "dé", ""] * 40, dtype=object)
else:
    codec, values = numcodecs.Blosc(sys.argv[2], shuffle=int(sys.argv[3])), np.arange(20000.0)
good = codec.encode(values)
assert len(codec.decode(good)) in (120, 160_000)
rng, read, refused = random.Random(0), 0, 0
for _ in range(3000):
    bad = bytearray(good)
    for _ in range(rng.choice([1, 2, 5])):
        bad[rng.randrange(rng.choice([8, 16, 32, len(bad)]))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    if sys.argv[2] != "texts" and int.from_bytes(bad[4:8], "little") > 1 << 26:
        continue  # which memory allows or not
    try:
        codec.decode(bytes(bad[: rng.choice([len(bad), rng.randrange(len(bad))])]))
        read += 1
    except (RuntimeError, ValueError, MemoryError):
        refused += 1
print(read, refused)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*BLOSC, ("texts", 0)], ids=str)
def test_chunks_changed_anywhere_do_not_crash(tmp_path, kind):
    """In a process of their own, which a crash would end: numcodecs reads on behind a chunk that says to be longer."""
    path = write(toy_adata(n_cells=4), tmp_path / "a.zarr")
    command = [sys.executable, "-W", "ignore", "-c", CHANGED, str(path), *map(str, kind)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read > 0 < refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("codec", ["Blosc", "VLenUTF8", "VLenBytes", "VLenArray"])
@pytest.mark.parametrize("chunk", [b"", b"abc", b"\x02\x01\x91\x01" + b"\xff" * 12, b"\xff" * 99])
def test_a_chunk_that_says_to_be_longer_than_it_is(opened, codec, chunk):
    options = {"dtype": "i4"} if codec == "VLenArray" else {}
    with pytest.raises(ValueError, match="a chunk says that it has [0-9,]+ bytes, and has"):
        getattr(numcodecs, codec)(**options).decode(chunk)


@pytest.mark.filterwarnings("ignore")
def test_a_store_with_such_a_chunk_is_refused(tmp_path):
    path = write(toy_adata(n_cells=300), tmp_path / "a.zarr")
    metadata = path / "X" / "data" / ".zarray"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"compressor": numcodecs.Blosc().get_config()}))
    (path / ".zmetadata").unlink()
    chunk = bytearray(numcodecs.Blosc().encode(np.arange(1000.0)))
    chunk[12:16] = b"\xff\xff\xff\x7f"
    (path / "X" / "data" / "0").write_bytes(chunk)
    reason, remedy = _outcome(path)
    assert "the matrix cannot be read (a chunk says that it has 2,147,483,647 bytes, and has" in reason
    assert remedy == stores.DAMAGED
    with pytest.raises(ValueError, match=r"a.zarr cannot be read .*a chunk says"):
        read_object(path)


@pytest.mark.parametrize("place", ["obs/tissue/codes", "obs/_index", "var/feature_name"])
def test_an_array_that_says_to_be_endless(tmp_path, place, little_memory):
    path = write(toy_adata(n_cells=300), tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        kind, attributes = file[place].dtype, dict(file[place].attrs)
        del file[place]
        file.create_dataset(place, (10**11,), kind, chunks=(1000,)).attrs.update(attributes)
    assert path.stat().st_size < 1e6
    result = process_file(Job(str(path), "a", "", PuzzleSettings()))
    assert not result.puzzles and result.reason


@pytest.mark.filterwarnings("ignore")
def test_zarr_is_never_unpickled(tmp_path):
    """Recent versions of numcodecs refuse to, older ones do it for any array whose metadata names the codec."""
    numcodecs.register_codec(numcodecs.Pickle)
    path = write(toy_adata(n_cells=40), tmp_path / "a.zarr")
    check_store(path)
    with pytest.raises(ValueError, match="codec not available"):
        numcodecs.get_codec({"id": "pickle", "protocol": 5})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", ["1.5", "[]", "null", '"x"', "["])
def test_metadata_of_a_group_that_are_none(tmp_path, content):
    path = write(toy_adata(n_cells=4), tmp_path / "a.zarr")
    (path / "obs" / ".zgroup").write_text(content)
    (path / ".zmetadata").unlink()
    with pytest.raises(BadFileError):
        check_store(path)
