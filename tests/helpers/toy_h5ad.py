"""CELLxGENE-like files of a few cells: one seeded generator for every test of the data pipeline."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

N_GENES = 120
N_TYPES = 10


def toy_adata(
    seed: int = 0,
    n_cells: int = 600,
    n_donors: int = 5,
    n_types: int = N_TYPES,
    n_genes: int = N_GENES,
    donor_prefix: str = "donor",
    integer: bool = False,
    batches: int = 0,
) -> ad.AnnData:
    """Cells with markers of their type, all columns that the pipeline reads, and nothing wrong with them."""
    rng = np.random.default_rng(seed)
    types = rng.integers(n_types, size=n_cells)
    donors = rng.integers(n_donors, size=n_cells)
    rate = rng.gamma(1.0, 1.0, n_genes)
    rate[:70] += 1.0  # so that every cell expresses more than 50 genes
    matrix = rng.poisson(rate, size=(n_cells, n_genes)).astype(np.float32)
    for kind in range(n_types):
        matrix[types == kind, n_genes - 1 - kind] += 30
    if not integer:
        matrix = np.log1p(matrix * (1e4 / np.maximum(matrix.sum(axis=1, keepdims=True), 1))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type {kind}" for kind in types]),
            "donor_id": pd.Categorical([f"{donor_prefix}{donor}" for donor in donors]),
            "suspension_type": pd.Categorical(["cell"] * n_cells),
            "tissue": pd.Categorical(["skin epidermis"] * n_cells),
            "disease": pd.Categorical(["melanoma"] * n_cells),
            "sex": pd.Categorical([("male", "female")[donor % 2] for donor in donors]),
            "development_stage": pd.Categorical([f"{40 + donor}-year-old stage" for donor in donors]),
            "self_reported_ethnicity": pd.Categorical(["unknown"] * n_cells),
        },
        index=[f"{donor_prefix}-cell{i}" for i in range(n_cells)],
    )
    if batches:
        obs["batch"] = pd.Categorical([f"b{i % batches}" for i in range(n_cells)])
    names = [f"GENE{i}" for i in range(n_genes)]
    var = pd.DataFrame({"feature_name": names}, index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return ad.AnnData(sp.csr_matrix(matrix), obs=obs, var=var)


def write(adata: ad.AnnData, path: Path, **options) -> Path:
    """Write as h5ad or zarr, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path, **options)
    return path
