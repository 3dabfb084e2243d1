"""Fetch or write the cells of the main job, as h5ad files of several donors.

``python -m recipe.cello1 cells pancreas --out DIR`` or ``... cells pbmc --out DIR``

``pancreas``: 2,142 cells of the human pancreas, four donors, 14 types, counts, and 1,886 of the mouse (Baron et al.
2016, GSE84133), as the package ``came`` has them (PyPI, MIT licence). It is downloaded by pip, checked against its hash
and unpacked; it is neither installed nor imported. DIR/human and DIR/mouse have one file each; the symbols of the mouse
are written in upper case, so that most of them are those of the human genes of the same name.

``pbmc``: the 700 blood cells that come with scanpy (Zheng et al. 2017), without a network. They have one donor, so
``donor_id`` names five parts, of each type a fifth: what is held out are cells, not a donor.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from recipe.cello1.formats.atomic import replacing

SOURCES = ("pancreas", "pbmc")
N_PARTS = 5
_CAME = "came==0.1.13 --hash=sha256:7fdb1a65006ca668e0cab51576a09bf540f074346e5f120ec654cd4f91627f7d"
_INSIDE = "came/sample_data.zip"
_FILES = {"human/baron_human.h5ad": "raw-Baron_human.h5ad", "mouse/baron_mouse.h5ad": "raw-Baron_mouse.h5ad"}


def fetch_pancreas(out: Path) -> None:
    """Download the files, unless they are there."""
    if all((out / name).is_file() for name in _FILES):
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(_CAME + "\n")
        options = ["--no-input", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or f"pip ended with {done.returncode}").splitlines()[-1]
            msg = f"the pancreas cells cannot be fetched ({said}); check the network and the package index"
            raise ConnectionError(msg)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            inner = zipfile.ZipFile(io.BytesIO(wheel.read(_INSIDE)))
        for name, inside in _FILES.items():
            member = next(entry for entry in inner.namelist() if entry.endswith(inside))
            with replacing(out / name) as temporary:
                Path(temporary).write_bytes(inner.read(member))
                if name.startswith("mouse"):
                    _write_upper(Path(temporary))


def _write_upper(path: Path) -> None:
    """Write the symbols of a file in upper case; of those that become one, the first stays."""
    import anndata as ad

    adata = ad.read_h5ad(path)
    adata.var_names = adata.var_names.str.upper()
    adata[:, ~adata.var_names.duplicated()].copy().write_h5ad(path)


def write_pbmc(out: Path) -> None:
    """Write the blood cells."""
    import anndata as ad
    import pandas as pd
    import scanpy as sc

    found = sc.datasets.pbmc68k_reduced()
    types = found.obs["bulk_labels"].astype(str).to_numpy()
    parts = np.zeros(len(types), dtype=int)
    rng = np.random.default_rng(1)
    for name in sorted(set(types)):
        rows = rng.permutation(np.flatnonzero(types == name))
        parts[rows] = np.arange(len(rows)) % N_PARTS + 1
    donors = [f"part_{part}" for part in parts]
    obs = pd.DataFrame(
        {"cell_type": types, "donor_id": donors, "tissue": "blood", "disease": "normal"}, index=found.obs_names
    )
    var = pd.DataFrame({"feature_name": found.raw.var_names}, index=found.raw.var_names)
    with replacing(out / "pbmc68k_reduced.h5ad") as temporary:
        ad.AnnData(found.raw.X, obs=obs, var=var).write_h5ad(temporary)


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=SOURCES, help="which cells")
    parser.add_argument("--out", required=True, type=Path, help="folder for the files")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    {"pancreas": fetch_pancreas, "pbmc": write_pbmc}[args.source](args.out)
