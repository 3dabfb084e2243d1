"""Three good files, and what is made of them: once for all tests of the data room."""

from pathlib import Path

import pytest

from tests.helpers.prepare_runs import FEW, run
from tests.helpers.toy_h5ad import toy_adata, write


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three good files in two folders."""
    root = tmp_path_factory.mktemp("input")
    for i, place in enumerate(("lung", "lung", "kidney")):
        adata = toy_adata(i, n_cells=300, donor_prefix=f"d{i}_")
        adata.obs["tissue"] = f"{place} {i}"
        write(adata, root / place / f"file{i}.h5ad", compression="gzip")
    return root


@pytest.fixture(scope="session")
def made(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert run(folder, "--out", out, "--raw", *FEW) == 0
    return out
