"""Make puzzles, traces, tokenizer and model of the embedded default, offline.

``python -m recipe.cello1 embedded --out DIR --seed SEED``

Source of the cells: ``scanpy.datasets.pbmc68k_reduced()``, 700 peripheral blood cells of the fresh 68k PBMC data (one
healthy donor; Zheng et al. 2017) with 10 types and log-normalised expression of 765 genes. They are split by cell, each
type on its own, before anything else is done, so that no cell, marker or token of the test puzzles is seen in training.

Files in DIR: ``sft.json`` (puzzles with traces), ``train.json`` and ``test.json`` (puzzles), ``train.parquet`` and
``test.parquet`` (the same as RL data), ``model`` (untrained model with its tokenizer) and, last, ``manifest.json``.
The same seed gives the same bytes.

With 560 training cells a model soon knows each by heart and nothing of their types: it gave a legal answer to 95% of
the training puzzles and to 24% of the test puzzles. Therefore the cells of ``sft.json`` are recombined: each gene has
the value of a random training cell of the type, and a random part of the expressed genes is lost, as in a shallower
sequencing run. The cells of ``train.json`` and ``test.json`` are as measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import issparse
from tqdm import tqdm

from recipe.cello1.cold_start.marker_traces import add_traces, marker_evidence
from recipe.cello1.cold_start.tiny_model import build_model, build_tokenizer
from recipe.cello1.formats.atomic import atomic_write, dumps, sha256
from recipe.cello1.formats.items import REASONING_KEY
from recipe.cello1.formats.model_folder import save_model
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.context import build_context
from recipe.cello1.task.genes import expression, top_genes
from recipe.cello1.task.prompt import LAYOUTS, Layout, messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.sampling import order_by_size, sample_puzzles

MANIFEST = "manifest.json"
MODEL = "model"
LABEL = "bulk_labels"
DONOR = {"donor_id": "pbmc68k_donor_a", "dataset": "pbmc68k_reduced", "tissue": "blood", "disease": "normal"}
_STREAMS = ("split", "sft", "train", "test")  # each has random numbers of its own: one size changes only one file


@dataclass(frozen=True, slots=True)
class EmbeddedSizes:
    """What decides the bytes of the files."""

    # Seed of split, puzzles and weights
    seed: int
    # Puzzles of each file, rounded up to a multiple of the number of sizes
    n_sft: int = 16000
    n_train: int = 972  # 27 batches of config/scale/embedded.yaml: the last 5 of its 32 steps see those of the first 5
    n_test: int = 900
    # Numbers of cells in a puzzle
    sizes: tuple[int, ...] = (3, 4, 5)
    # Genes listed for each cell
    n_top: int = 12
    # Prompt layout
    layout: Layout = "system"
    # Share of each type's cells that is held out
    test_share: float = 0.2
    # Lowest and highest share of its expressed genes that a recombined cell loses
    gene_loss: tuple[float, float] = (0.0, 0.7)
    # Genes that a trace cites for each cell
    n_cited: int = 3


SMOKE = {"n_sft": 600, "n_train": 60, "n_test": 24}


def split_cells(labels: Sequence[str], test_share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose the held-out cells, the same share of each type."""
    if not 0 < test_share < 1:
        msg = f"test_share must lie between 0 and 1, got {test_share}"
        raise ValueError(msg)
    types = np.asarray(labels, dtype=object)
    held_out = np.zeros(len(types), dtype=bool)
    for name in sorted(set(types.tolist())):
        rows = np.flatnonzero(types == name)
        if len(rows) < 2:
            msg = f"labels has a single cell of type {name!r}; it cannot be split"
            raise ValueError(msg)
        n_out = min(max(1, round(test_share * len(rows))), len(rows) - 1)
        held_out[rng.permutation(rows)[:n_out]] = True
    return held_out


def recombine(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make a cell of which each gene comes from a random one of some cells."""
    return values[rng.integers(len(values), size=values.shape[1]), np.arange(values.shape[1])]


def lose_genes(
    genes: Sequence[str], share: tuple[float, float], n_top: int, rng: np.random.Generator
) -> tuple[str, ...]:
    """List the top genes of a cell after a random part of its expressed genes was lost."""
    rate = rng.uniform(*share)
    order = rng.random(len(genes))
    kept = np.flatnonzero(order >= rate)
    if len(kept) < n_top:
        kept = np.sort(np.argsort(order)[-n_top:])
    return tuple(genes[i] for i in kept[:n_top].tolist())


def build(out: str | Path, settings: EmbeddedSizes) -> dict[str, Any]:
    """Build all files."""
    import scanpy as sc

    out = Path(out)
    (out / MANIFEST).unlink(missing_ok=True)
    steps = tqdm(total=5, desc="building", unit="step", leave=False)
    rng = {name: np.random.default_rng([settings.seed, i]) for i, name in enumerate(_STREAMS)}

    adata = sc.datasets.pbmc68k_reduced()
    matrix, names = expression(adata, use_raw=True)
    cells = top_genes(matrix, names, None)
    labels = adata.obs[LABEL].astype(str).tolist()
    ids = adata.obs_names.tolist()
    held_out = split_cells(labels, settings.test_share, rng["split"])
    kept = np.flatnonzero(~held_out).tolist()
    steps.update()

    dense = np.asarray(matrix.todense()) if issparse(matrix) else np.asarray(matrix)
    of_type = {name: dense[[row for row in kept if labels[row] == name]] for name in sorted(set(labels))}

    def made(wanted: Sequence[str]) -> list[tuple[str, ...]]:
        new = np.stack([recombine(of_type[name], rng["sft"]) for name in wanted])
        lists = top_genes(new, names, None)
        return [lose_genes(genes, settings.gene_loss, settings.n_top, rng["sft"]) for genes in lists]

    def draw(split: str, count: int) -> list[Puzzle]:
        # The rows of the other side have no label, so they are never drawn.
        own = [name if out == (split == "test") else None for name, out in zip(labels, held_out.tolist(), strict=True)]
        per_size = -(-count // len(settings.sizes))
        drawn = sample_puzzles(own, None, sizes=settings.sizes, n_per_size=per_size, rng=rng[split])
        puzzles = []
        for position in order_by_size([len(index.rows) for index in drawn], "mixed", rng[split]):
            index = drawn[position]
            meta: dict[str, Any] = dict(DONOR)
            if split == "sft":
                genes = made(index.labels)
            else:
                genes = [cells[row][: settings.n_top] for row in index.rows]
                meta["cell_ids"] = [ids[row] for row in index.rows]
            puzzles.append(Puzzle(tuple(genes), index.candidates, index.labels, build_context(DONOR), meta))
        return puzzles

    # Three times the length of the lists: genes that come up when others are lost need evidence, too.
    evidence = marker_evidence([cells[row][: 3 * settings.n_top] for row in kept], [labels[row] for row in kept])
    puzzles = {
        "sft": add_traces(draw("sft", settings.n_sft), evidence, settings.n_cited),
        "train": draw("train", settings.n_train),
        "test": draw("test", settings.n_test),
    }
    steps.update()
    for name, items in puzzles.items():
        write_puzzles(out / f"{name}.json", items)
    for name in ("train", "test"):
        write_rl_parquet(out / f"{name}.parquet", puzzles[name], name, settings.layout)
    steps.update()

    tokenizer = build_tokenizer(puzzles["sft"], layout=settings.layout)
    model = build_model(tokenizer, seed=settings.seed)
    save_model(out / MODEL, model, tokenizer)
    steps.update()

    manifest = {
        "settings": _plain(settings),
        "types": sorted(evidence),
        "cells": {
            "train": [ids[row] for row in kept],
            "test": [ids[row] for row in np.flatnonzero(held_out).tolist()],
        },
        "puzzles": {name: len(items) for name, items in puzzles.items()},
        "tokens": _token_counts(tokenizer, puzzles, settings.layout),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "files": _hashes(out),
    }
    atomic_write(out / MANIFEST, dumps(manifest, indent=1) + "\n")
    steps.update()
    steps.close()
    return manifest


def _plain(settings: EmbeddedSizes) -> dict[str, Any]:
    """Return the settings as JSON has them (tuples become lists)."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}


def _token_counts(tokenizer: Any, puzzles: Mapping[str, Sequence[Puzzle]], layout: Layout) -> dict[str, Any]:
    """Count tokens: the longest prompts and answers decide what the RL run must make room for."""
    counts = {}
    for name, items in puzzles.items():
        prompts = [
            tokenizer.apply_chat_template(messages(puzzle, layout), tokenize=False, add_generation_prompt=True)
            for puzzle in items
        ]
        lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        counts[name] = {"prompt_mean": round(float(np.mean(lengths)), 1), "prompt_max": max(lengths)}
        if REASONING_KEY in items[0].meta:
            texts = [format_answer(puzzle.answer or (), puzzle.meta[REASONING_KEY]) for puzzle in items]
            lengths = [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            counts[name] |= {"response_mean": round(float(np.mean(lengths)), 1), "response_max": max(lengths)}
    return counts


def _hashes(out: Path) -> dict[str, str]:
    files = [*out.glob("*.json"), *out.glob("*.parquet"), *(out / MODEL).glob("*")]
    names = sorted(file.relative_to(out).as_posix() for file in files if file.is_file() and file.name != MANIFEST)
    return {name: sha256(out / name) for name in names}


def is_built(out: str | Path, settings: EmbeddedSizes) -> bool:
    """Say whether a folder already holds what these settings give."""
    out = Path(out)
    if not (out / MANIFEST).is_file():
        return False
    manifest = json.loads((out / MANIFEST).read_bytes())  # written whole or not at all
    wanted = _plain(settings)
    found = manifest.get("settings", {})
    if found != wanted:
        other = sorted(key for key in {*wanted, *found} if found.get(key) != wanted.get(key))
        msg = (
            f"{out} was built with another {', '.join(f'{key} ({found.get(key)!r})' for key in other)}; "
            "choose another --out, or remove the folder"
        )
        raise ValueError(msg)
    return manifest.get("files") == _hashes(out)


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    default = EmbeddedSizes(seed=1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path, help="folder for the files")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of split, puzzles and weights")
    parser.add_argument("--layout", choices=LAYOUTS, default=default.layout, help="prompt layout")
    parser.add_argument("--smoke", action="store_true", help="few puzzles, for a test of the whole run")
    for name in SMOKE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"puzzles (default {getattr(default, name)})")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    counts = {name: getattr(args, name) for name in SMOKE if getattr(args, name) is not None}
    settings = EmbeddedSizes(seed=args.seed, layout=args.layout, **{**(SMOKE if args.smoke else {}), **counts})
    if settings.seed < 0 or min(settings.n_sft, settings.n_train, settings.n_test) < 1:
        msg = "--seed must not be negative and the numbers of puzzles must be positive"
        raise ValueError(msg)
    if is_built(args.out, settings):
        print(f"already built: {args.out}", file=sys.stderr)
        return
    manifest = build(args.out, settings)
    tokens, puzzles = manifest["tokens"], manifest["puzzles"]
    print(
        f"{puzzles['sft']} SFT, {puzzles['train']} RL and {puzzles['test']} test puzzles; "
        f"{tokens['sft']['prompt_mean'] + tokens['sft']['response_mean']:.0f} tokens each; "
        f"model with {manifest['parameters']:,} parameters: {args.out}",
        file=sys.stderr,
    )
