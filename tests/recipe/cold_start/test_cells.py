import io
import subprocess
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from recipe.cello1.cold_start import cells
from tests.helpers.cli import command
from tests.helpers.toy_h5ad import toy_adata

main = command("cells")


def test_blood_cells_are_in_five_parts_of_each_type(tmp_path):
    sc = pytest.importorskip("scanpy")
    assert main(["pbmc", "--out", tmp_path]) == 0
    (path,) = tmp_path.iterdir()
    found, source = ad.read_h5ad(path), sc.datasets.pbmc68k_reduced()
    assert (found.X != source.raw.X).nnz == 0 and found.obs_names.equals(source.obs_names)
    assert found.obs["cell_type"].tolist() == source.obs["bulk_labels"].tolist()
    counts = found.obs.groupby(["cell_type", "donor_id"], observed=True).size().unstack()
    assert list(counts.columns) == [f"part_{i}" for i in range(1, 6)]
    assert (counts.max(axis=1) - counts.min(axis=1)).max() <= 1
    before = path.read_bytes()
    assert main(["pbmc", "--out", tmp_path]) == 0
    assert path.read_bytes() == before


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Stand in for pip: a wheel with two toy files in its zip."""
    asked = []

    def run(command, **_):
        asked.append(command)
        inner, adata = io.BytesIO(), toy_adata(n_cells=20)
        adata.var_names = ["Ins1", "INS1", *[f"gene{i}" for i in range(adata.n_vars - 2)]]
        adata.write_h5ad(tmp_path / "toy.h5ad")
        with zipfile.ZipFile(inner, "w") as file:
            for name in ("human", "mouse"):
                file.write(tmp_path / "toy.h5ad", f"sample_data/raw-Baron_{name}.h5ad")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "came.whl"), "w") as wheel:
            wheel.writestr("came/sample_data.zip", inner.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(cells.subprocess, "run", run)
    return asked


def test_pancreas_cells_are_fetched_once_and_checked_by_pip(tmp_path, pip):
    for _ in range(2):
        assert main(["pancreas", "--out", tmp_path / "out"]) == 0
    (words,) = pip
    assert "--require-hashes" in words and "--no-deps" in words
    human, mouse = (ad.read_h5ad(tmp_path / "out" / name / f"baron_{name}.h5ad") for name in ("human", "mouse"))
    assert human.var_names[:3].tolist() == ["Ins1", "INS1", "gene0"]
    assert mouse.var_names[:2].tolist() == ["INS1", "GENE0"] and mouse.n_vars == human.n_vars - 1
    assert np.array_equal(mouse.X[:, 0].toarray(), human.X[:, 0].toarray())


def test_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: no distribution")
    monkeypatch.setattr(cells.subprocess, "run", lambda *_, **__: failed)
    assert main(["pancreas", "--out", tmp_path / "out"]) == 1
    why = "the pancreas cells cannot be fetched (ERROR: no distribution)"
    error = f"cello1 cells: error: {why}; check the network and the package index\n"
    assert capsys.readouterr().err == error
