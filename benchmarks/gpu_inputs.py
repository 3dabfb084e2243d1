"""Inputs of ``bench_gpu.sh``: a model in the shape of Qwen2.5-7B with random weights, and puzzles of real length."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from recipe.cello1.cold_start.tiny_model import build_tokenizer
from recipe.cello1.formats.model_folder import save_model
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.task.context import build_context
from recipe.cello1.task.genes import expression, top_genes
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.sampling import sample_puzzles

# config.json of Qwen/Qwen2.5-7B-Instruct.
SHAPE = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SIZES = (8, 9, 10)
N_GENES = 50
DONOR = {"tissue": "blood", "disease": "normal"}


def puzzles(n_per_size: int, seed: int) -> list[Puzzle]:
    """Draw puzzles of 8 to 10 cells and 50 genes from the cells that come with scanpy."""
    import scanpy as sc

    adata = sc.datasets.pbmc68k_reduced()
    cells = top_genes(*expression(adata, use_raw=True), N_GENES)
    labels = adata.obs["bulk_labels"].astype(str).tolist()
    rng = np.random.default_rng(seed)
    drawn = sample_puzzles(labels, None, sizes=SIZES, n_per_size=n_per_size, rng=rng)
    return [
        Puzzle(
            tuple(cells[row] for row in index.rows), index.candidates, index.labels, build_context(DONOR), dict(DONOR)
        )
        for index in drawn
    ]


def main() -> int:
    """Write ``model`` and ``train.parquet``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for both; a finished one is kept")
    parser.add_argument("--seed", type=int, default=1, help="seed of puzzles and weights")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON to lay over the shape, for a try-out")
    args = parser.parse_args()
    if (args.out / "model" / "config.json").is_file():
        print(f"already there: {args.out}", file=sys.stderr)
        return 0
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    items = puzzles(n_per_size=300, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_rl_parquet(args.out / "train.parquet", items, "train")
    # Spelled by bytes and few merges, the prompts have about the length that Qwen's tokenizer gives them.
    tokenizer = build_tokenizer(items, min_count=10**9, n_merges=1024)
    config = Qwen2Config(
        **{**SHAPE, **args.shape}, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.bfloat16)
    save_model(args.out / "model", Qwen2ForCausalLM(config), tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
