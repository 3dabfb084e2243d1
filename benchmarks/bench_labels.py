"""How good labels and support of ``tl.annotate`` are, next to logistic regression and marker scores.

``python benchmarks/bench_labels.py --model outputs/embedded/model --data outputs/embedded/data``

The held-out cells of the embedded default are labelled as groups of three kinds: true types, clusters, and chunks of
five cells of a type. Both baselines learn from the cells that the model was trained on, label each held-out cell, and
take the majority of a group. AUROC and the expected calibration error (ECE) are of support, over the chunks of all
seeds; the error after calibration is that on chunks which the map has not seen with any seed.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from rows import Row, finish
from tqdm import tqdm

import scverse_plugin
from recipe.cello1.engines.protocol import Engine
from recipe.cello1.engines.start import start_engine

# As in the puzzles that the embedded model is trained on.
AS_TRAINED = {"n_top_genes": 12, "puzzle_size": 5, "n_candidates": 5, "max_tokens": 200}
KINDS = ("type", "cluster", "chunk")
CHUNK = 5
AUROC, ECE, BEHIND = 0.88, 0.10, 0.05


def load(data: Path) -> tuple[AnnData, AnnData]:
    """Return the cells of the training and the held-out ones, with their groups."""
    cells = json.loads((data / "manifest.json").read_text())["cells"]
    adata = sc.datasets.pbmc68k_reduced()
    adata.obs["tissue"], adata.obs["disease"] = "blood", "normal"
    train, test = adata[cells["train"]].copy(), adata[cells["test"]].copy()
    types = test.obs["bulk_labels"].astype(str)
    numbers = {name: str(i) for i, name in enumerate(np.random.default_rng(0).permutation(types.unique()))}
    test.obs["type"] = types.map(numbers).astype("category")
    test.obs["cluster"] = test.obs["louvain"].astype(str).astype("category")
    turn = types.groupby(types).cumcount() // CHUNK
    test.obs["chunk"] = (test.obs["type"].astype(str) + "." + turn.astype(str)).astype("category")
    return train, test


def majority(test: AnnData, kind: str, labels: pd.Series) -> pd.Series:
    """Return the most common label of each group."""
    return labels.astype(str).groupby(test.obs[kind].astype(str)).agg(lambda names: names.mode().iloc[0])


def baselines(train: AnnData, test: AnnData) -> dict[str, pd.Series]:
    """Label each held-out cell by logistic regression, and by the sum of its markers."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = LogisticRegression(max_iter=2000, C=0.1).fit(train.X, train.obs["bulk_labels"].astype(str))
        sc.tl.rank_genes_groups(train, "bulk_labels", method="t-test", use_raw=False)
    names = train.uns["rank_genes_groups"]["names"]
    scores = {name: test[:, list(names[name][:20])].X.mean(axis=1) for name in names.dtype.names}
    return {
        "logistic regression": pd.Series(fitted.predict(test.X), index=test.obs_names),
        "marker scores": pd.DataFrame(scores, index=test.obs_names).idxmax(axis=1),
    }


def labelled(test: AnnData, kind: str, engine: Engine, seed: int, n_votes: int) -> pd.DataFrame:
    """Annotate the groups of a kind; returns their table, with what is right."""
    types = sorted(test.obs["bulk_labels"].unique())
    options = {"groupby": kind, "n_votes": n_votes, "cells_per_group": 10, "min_support": 0, "rng": seed}
    scverse_plugin.tl.annotate(test, types, engine=engine, progress=False, cache=None, **options, **AS_TRAINED)
    table = scverse_plugin.get.cello1_df(test)
    truth = majority(test, kind, test.obs["bulk_labels"])
    return table.assign(right=[row["best"] == truth[name] for name, row in table.iterrows()])


def calibration(tables: list[pd.DataFrame], method: str) -> Mapping[str, float]:
    """Say what support is worth."""
    from scverse_plugin.method._calibrate import fit

    table = pd.concat(tables)
    support, right = table["raw_support"].to_numpy(), table["right"].to_numpy()
    return fit(support, right, method, same=table.index.to_numpy())  # type: ignore[arg-type]


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description="How good labels and support are.")
    parser.add_argument("--model", default="outputs/embedded/model", help="model folder")
    parser.add_argument("--data", type=Path, default=Path("outputs/embedded/data"), help="folder of the embedded data")
    parser.add_argument("--engine", default="transformers", choices=("vllm", "transformers"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-votes", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a bound is missed."""
    args = build_parser().parse_args(argv)
    train, test = load(args.data)
    tables: dict[str, list[pd.DataFrame]] = {kind: [] for kind in KINDS}
    with start_engine(args.engine, args.model, constrained=True, max_model_len=1024) as engine:
        for kind, seed in tqdm([(kind, seed) for kind in KINDS for seed in range(args.seeds)], desc="annotating"):
            tables[kind].append(labelled(test, kind, engine, seed, args.n_votes))
    by_cells = baselines(train, test)
    support = test.uns["cello1"]["params"]["support"]
    names = ["cello1", *by_cells]
    print(f"| groups (support: {support}) | number | {' | '.join(names)} |\n| --- | ---: |{' ---: |' * len(names)}")
    rows = []
    for kind in KINDS:
        truth = majority(test, kind, test.obs["bulk_labels"])
        shares = [float(pd.concat(tables[kind])["right"].mean())]
        shares += [float((majority(test, kind, labels) == truth).mean()) for labels in by_cells.values()]
        print(f"| {kind} | {len(truth)} | {' | '.join(f'{share:.2f}' for share in shares)} |")
        best, met = max(shares[1:]), shares[0] >= max(shares[1:]) - BEHIND
        wanted = f"not below by more than {BEHIND}"
        rows.append(Row(f"groups right: {kind}", f"{shares[0]:.2f}", f"{best:.2f}", "", wanted, met))
    for method in ("isotonic", "temperature"):
        found = calibration(tables["chunk"], method)
        auroc, before, after = (found[name] for name in ("auroc", "ece_before", "ece_after"))
        print(
            f"support of {found['n']} chunks, {method}: AUROC {auroc:.3f}, ECE {before:.3f} before, {after:.3f} after"
        )
        rows.append(
            Row(f"ECE after {method} calibration", f"{after:.3f}", f"{before:.3f}", "", f"< {ECE}", after < ECE)
        )
    rows.append(Row("AUROC of support", f"{auroc:.3f}", "", "", f">= {AUROC}", auroc >= AUROC))
    return finish(rows, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
