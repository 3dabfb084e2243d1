"""How good labels and support of ``tl.annotate`` are, next to logistic regression and marker scores.

``python benchmarks/bench_labels.py --model outputs/pancreas/sft/model --data outputs/pancreas/data
--cells outputs/cells/human/baron_human.h5ad --out outputs/bench_labels``

The cells of the donors that the main job holds out are labelled as groups of three kinds: true types, clusters
(Leiden, which takes ``pip install igraph``), and chunks of five cells of a type, each with several seeds of the
annotation. Without ``--cells`` it is the embedded default: its held-out cells of scanpy's blood, with the clusters
that these have. Both baselines learn from the cells of the other donors, label each held-out cell, and take the
majority of a group. AUROC and the expected calibration error (ECE) are of support, over the groups of all seeds; the
errors after calibration are those that ``tl.calibrate`` finds for each seed on groups that its map has not seen, their
mean. Answers are kept in the folder ``--out``: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from rows import Row, finish
from tqdm import tqdm

import scverse_plugin
from recipe.cello1.engines.protocol import Engine
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import atomic_write, read_json
from scverse_plugin.method._calibrate import METHODS, expected_calibration_error

KINDS = ("type", "cluster", "chunk")
CHUNK = 5
AUROC, ECE, BEHIND = 0.88, 0.10, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The cells, log-normalised ones for the baselines, and how the model was asked in its training."""

    train: AnnData
    test: AnnData
    plain: AnnData
    truth: str
    as_trained: dict[str, Any]


def load(data: Path, cells: Path | None) -> Task:
    """Read the cells of the training and the held-out ones, with their groups."""
    manifest = read_json(data / "manifest.json")
    task = _embedded(manifest) if cells is None else _main_job(manifest, sc.read_h5ad(cells))
    types = task.test.obs[task.truth].astype(str)
    numbers = {name: str(i) for i, name in enumerate(np.random.default_rng(0).permutation(types.unique()))}
    task.test.obs["type"] = types.map(numbers).astype("category")
    turn = types.groupby(types).cumcount() // CHUNK
    task.test.obs["chunk"] = (task.test.obs["type"].astype(str) + "." + turn.astype(str)).astype("category")
    return task


def _embedded(manifest: Mapping[str, Any]) -> Task:
    adata = sc.datasets.pbmc68k_reduced()
    adata.obs["tissue"], adata.obs["disease"] = "blood", "normal"
    train, test = (adata[manifest["cells"][name]].copy() for name in ("train", "test"))
    test.obs["cluster"] = test.obs["louvain"].astype(str).astype("category")
    asked = {"n_top_genes": 12, "puzzle_size": 5, "n_candidates": 5}
    return Task(train, test, test, "bulk_labels", asked)


def _main_job(manifest: Mapping[str, Any], adata: AnnData) -> Task:
    settings, plan = manifest["settings"], manifest["plan"]
    held_out = adata.obs[settings["donor_column"]].astype(str).isin(plan["test_donors"])
    test = adata[held_out].copy()
    plain = adata.copy()
    sc.pp.normalize_total(plain, target_sum=1e4)
    sc.pp.log1p(plain)
    clustered = plain[held_out].copy()
    sc.pp.highly_variable_genes(clustered, n_top_genes=2000)
    sc.pp.pca(clustered, random_state=0)
    sc.pp.neighbors(clustered, random_state=0)
    sc.tl.leiden(clustered, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    test.obs["cluster"] = clustered.obs["leiden"].astype("category")
    asked = {"puzzle_size": max(settings["sizes"]), "n_candidates": max(settings["sizes"])}
    asked |= {"n_top_genes": settings["n_top"], "rank_by": settings["rank_by"], "layer": settings["layer"]}
    asked |= {"exclude_genes": settings["exclude_genes"], "prompt_layout": plan["layout"]}
    if settings["gene_column"] != "index":
        asked["gene_symbols"] = settings["gene_column"]
    return Task(plain[~held_out].copy(), test, plain[held_out].copy(), settings["type_column"], asked)


def majority(test: AnnData, kind: str, labels: pd.Series) -> pd.Series:
    """Return the most common label of each group."""
    return labels.astype(str).groupby(test.obs[kind].astype(str)).agg(lambda names: names.mode().iloc[0])


def baselines(task: Task) -> dict[str, pd.Series]:
    """Label each held-out cell by logistic regression, and by the sum of its markers."""
    from sklearn.linear_model import LogisticRegression

    train, test = task.train, task.plain
    counts = train.obs[task.truth].astype(str).value_counts()
    several = train[train.obs[task.truth].astype(str).isin(counts.index[counts > 1])].copy()  # the t-test needs two
    several.obs[task.truth] = several.obs[task.truth].astype(str).astype("category")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = LogisticRegression(max_iter=2000, C=0.1).fit(train.X, train.obs[task.truth].astype(str))
        sc.tl.rank_genes_groups(several, task.truth, method="t-test", use_raw=False)
    names = several.uns["rank_genes_groups"]["names"]
    scores = {name: np.asarray(test[:, list(names[name][:20])].X.mean(axis=1)).ravel() for name in names.dtype.names}
    return {
        "logistic regression": pd.Series(fitted.predict(test.X), index=test.obs_names),
        "marker scores": pd.DataFrame(scores, index=test.obs_names).idxmax(axis=1),
    }


def labelled(task: Task, kind: str, engine: Engine, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Annotate the groups of a kind; returns support, what is right, and the errors before and after calibration."""
    test, place = task.test, args.out / f"{kind}-{seed}.json"
    options = {"n_votes": args.n_votes, "cells_per_group": 10, "min_support": 0, "support": args.support}
    mark = {**options, **task.as_trained, "engine": engine.name, "fingerprint": engine.fingerprint}
    if place.exists() and (kept := read_json(place))["mark"] == json.loads(json.dumps(mark)):
        return kept
    options |= {"groupby": kind, "rng": seed, "max_tokens": 200, "progress": False, "cache": args.out / "answers.jsonl"}
    types = sorted(test.obs[task.truth].astype(str).unique())
    scverse_plugin.tl.annotate(test, types, engine=engine, **options, **task.as_trained)
    table = scverse_plugin.get.cello1_df(test)
    truth = majority(test, kind, test.obs[task.truth])
    found: dict[str, Any] = {"mark": mark, "from": test.uns["cello1"]["params"]["support"]}
    found |= {"support": table["raw_support"].tolist(), "right": (table["best"] == truth[table.index]).tolist()}
    if kind == "chunk":  # the others are too few
        for method in METHODS:
            scverse_plugin.tl.calibrate(test, truth=task.truth, method=method)
            found[method] = float(test.uns["cello1"]["calibration"]["ece_after"])
    atomic_write(place, json.dumps(found))
    return found


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description="How good labels and support are.")
    parser.add_argument("--model", default="outputs/embedded/model", help="model folder")
    parser.add_argument("--data", type=Path, default=Path("outputs/embedded/data"), help="folder that prepare made")
    parser.add_argument("--cells", type=Path, help="h5ad file that the data were made from; by default scanpy's blood")
    parser.add_argument("--engine", default="transformers", choices=("vllm", "transformers"))
    parser.add_argument("--support", default="auto", choices=("auto", "votes", "readout"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-votes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_labels"), help="folder of answers and results")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a bound is missed."""
    args = build_parser().parse_args(argv)
    task = load(args.data, args.cells)
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with start_engine(args.engine, args.model, constrained=True, max_model_len=1024) as engine:
        for kind, seed in tqdm([(kind, seed) for kind in KINDS for seed in range(args.seeds)], desc="annotating"):
            found[kind].append(labelled(task, kind, engine, seed, args))
    return finish(_table(task, found, args.seeds), args.json)


def _table(task: Task, found: Mapping[str, list[dict[str, Any]]], n_seeds: int) -> list[Row]:
    """Print the table for the README; returns what is wanted and whether it is met."""
    from sklearn.metrics import roc_auc_score

    by_cells = baselines(task)
    print(f"{task.test.n_obs} held-out cells, {n_seeds} seeds, support: {found['chunk'][0]['from']}\n")
    names = ["cello1", *by_cells, "AUROC", "ECE", *(f"ECE, {method}" for method in METHODS)]
    print(f"| groups | number | {' | '.join(names)} |\n| --- | ---: |{' ---: |' * len(names)}")
    rows = []
    for kind in KINDS:
        truth = majority(task.test, kind, task.test.obs[task.truth])
        right, support = (np.concatenate([run[name] for run in found[kind]]) for name in ("right", "support"))
        shares = [float(right.mean())]
        shares += [float((majority(task.test, kind, labels) == truth).mean()) for labels in by_cells.values()]
        auroc = float(roc_auc_score(right, support)) if 0 < right.sum() < len(right) else float("nan")
        figures = [*shares, auroc, expected_calibration_error(np.clip(support, 0, 1), right)]
        after = {method: float(np.mean([run[method] for run in found[kind]])) for method in METHODS if kind == "chunk"}
        cells = [f"{figure:.2f}" for figure in (*figures, *after.values())] + [""] * (len(METHODS) - len(after))
        print(f"| {kind} | {len(truth)} | {' | '.join(cells)} |")
        best, met = max(shares[1:]), shares[0] >= max(shares[1:]) - BEHIND
        wanted = f"not below by more than {BEHIND}"
        rows.append(Row(f"groups right: {kind}", f"{shares[0]:.2f}", f"{best:.2f}", "", wanted, met))
        rows.append(Row(f"AUROC of support: {kind}", f"{auroc:.3f}", "", "", f">= {AUROC}", auroc >= AUROC))
        for method, value in after.items():
            what = f"ECE of {kind}s after {method} calibration"
            rows.append(Row(what, f"{value:.3f}", f"{figures[-1]:.3f}", "", f"< {ECE}", value < ECE))
    print()
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
