"""Annotate held-out blood cells with the model that ``CELLS=pbmc bash recipe/cello1/run_grpo.sh`` has trained.

``python examples/annotate_pbmc.py --model outputs/embedded/model --data outputs/embedded/data``

The clusters get shuffled numbers for names, so that nothing but the genes tells what they are. Printed is one table:
accuracy over groups by consensus of puzzles, next to the same question put cell by cell, with a majority vote in each
group (as celltypist does with its own answers).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc

import scverse_plugin
from recipe.cello1.engines.protocol import Engine
from recipe.cello1.engines.start import start_engine
from recipe.cello1.evaluation.intervals import wilson
from recipe.cello1.formats.puzzle_files import load_puzzles

# As in the puzzles that the embedded model is trained on: 12 genes, up to 5 cells, as many types as cells.
AS_TRAINED = {"n_top_genes": 12, "puzzle_size": 5, "n_candidates": 5, "max_tokens": 200}


def load(data: Path, seed: int = 0) -> tuple[ad.AnnData, dict[str, str]]:
    """Return the held-out cells and the type behind each cluster name."""
    puzzles = load_puzzles(data / "test" / "test_data.json").puzzles
    adata = sc.datasets.pbmc68k_reduced()
    adata = adata[adata.obs_names.isin([cell for puzzle in puzzles for cell in puzzle.meta["cell_ids"]])].copy()
    adata.obs["tissue"] = "blood"  # CELLxGENE's columns become the context of the puzzles
    adata.obs["disease"] = "normal"
    types = list(adata.obs["bulk_labels"].cat.categories)
    names = np.random.default_rng(seed).permutation(len(types)).astype(str).tolist()
    adata.obs["cluster"] = adata.obs["bulk_labels"].cat.rename_categories(dict(zip(types, names, strict=True)))
    return adata, dict(zip(names, types, strict=True))


def by_puzzles(adata: ad.AnnData, types: Sequence[str], engine: Engine, seed: int = 0, n_votes: int = 30) -> None:
    """Label the clusters; no threshold, since the table is about all groups."""
    sc.tl.cello1_annotate(
        adata,
        types,
        groupby="cluster",
        engine=engine,
        n_votes=n_votes,
        cells_per_group=10,
        one_to_one=False,
        min_support=0,
        support="votes",  # reading probabilities out needs room for all types beside each prompt
        rng=seed,
        **AS_TRAINED,
    )


def by_cells(adata: ad.AnnData, types: Sequence[str], engine: Engine, seed: int = 0) -> dict[str, str]:
    """Ask about each cell alone, and take the majority in each cluster."""
    alone = {**AS_TRAINED, "puzzle_size": 1, "n_candidates": len(types)}
    sc.tl.cello1_annotate(
        adata,
        types,
        engine=engine,
        n_votes=1,
        min_support=0,
        support="votes",  # reading probabilities out needs room for all types beside each prompt
        store_reasoning=False,
        rng=seed,
        key_added="cell",
        **alone,
    )
    counts = adata.obs.groupby("cluster", observed=True)["cell"].agg(lambda labels: labels.mode().iloc[0])
    return {str(group): str(label) for group, label in counts.items()}


def table(adata: ad.AnnData, gold: Mapping[str, str], majority: Mapping[str, str]) -> str:
    """Write the table."""
    groups = scverse_plugin.get.cello1_df(adata)
    right = np.array([row.label == gold[name] for name, row in groups.iterrows()])
    alone = np.array([majority[name] == gold[name] for name in groups.index])
    lines = [
        "| labels | groups right | 95% interval | support, right | support, wrong |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    support = groups["support"].to_numpy()
    means = [f"{support[rows].mean():.2f}" if rows.any() else "none" for rows in (right, ~right)]
    for name, hits, found in (("consensus of puzzles", right, means), ("majority of single cells", alone, ["", ""])):
        low, high = wilson(int(hits.sum()), len(hits))
        lines.append(f"| {name} | {hits.sum()} of {len(hits)} | {low:.2f} to {high:.2f} | {found[0]} | {found[1]} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="outputs/embedded/model", help="model folder")
    parser.add_argument("--data", type=Path, default=Path("outputs/embedded/data"), help="folder of its puzzles")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the annotated h5ad and the report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = build_parser().parse_args(argv)

    adata, gold = load(args.data, args.seed)
    types = sorted(gold.values())
    with start_engine(args.engine, args.model, constrained=True, max_model_len=1024) as engine:
        by_puzzles(adata, types, engine, args.seed)
        majority = by_cells(adata, types, engine, args.seed)
    print(scverse_plugin.get.cello1_df(adata)[["label", "support", "runner_up", "margin", "mixed"]].to_string())
    print()
    print(table(adata, gold, majority))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(args.out / "annotated.h5ad")
        print(scverse_plugin.report(adata, args.out / "report.html"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
