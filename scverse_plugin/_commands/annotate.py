"""Label the cells of an h5ad file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.cello1.formats.atomic import replacing

# Options of annotate that are named as the parameters of tl.annotate: kind, and what to say of them.
_PLAIN: dict[str, tuple[Any, str]] = {
    "groupby": (str, "column of obs whose groups are labelled; without it every cell is"),
    "sample_key": (str, "column of obs with the donor"),
    "context": (str, "what is known of the donor, in sentences"),
    "layer": (str, "layer with the expression"),
    "gene_symbols": (str, "column of var with the gene symbols"),
    "mask_var": (str, "column of var: the genes that may be listed"),
    "n_top_genes": (int, "genes listed for each cell"),
    "rank_by": (str, "expression or specificity"),
    "cells_per_group": (int, "cells drawn for each group"),
    "cell_choice": (str, "random or representative"),
    "n_votes": (int, "rounds"),
    "puzzle_size": (int, "most cells in a puzzle"),
    "n_candidates": (int, "most types shown in a puzzle"),
    "min_support": (float, "groups with less support get no label"),
    "unassigned": (str, "label of groups without one"),
    "engine": (str, "vllm, openai or transformers"),
    "base_url": (str, "address of the server"),
    "prompt_layout": (str, "system or user, as the model was trained"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "probability mass to sample from"),
    "max_tokens": (int, "longest response"),
    "reasoning_budget": (int, "most tokens of reasoning"),
    "max_concurrency": (int, "puzzles under way at a time"),
    "cache": (str, ".jsonl file that keeps responses"),
    "on_error": (str, "raise or skip"),
    "rng": (int, "seed"),
    "key_added": (str, "name under which results are stored"),
}
_LISTS = {
    "groups": "groups to label",
    "context_keys": "columns of obs for the context",
    "exclude_genes": "patterns of genes not to list",
    "decoys": "types that these cells cannot be",
}

AFTER_INTERRUPT = "; with --cache, responses so far are kept: run the same command again to resume"


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path, help="h5ad file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="h5ad file to write")
    parser.add_argument("--model", help="folder of the model, or its name on the server")
    parser.add_argument(
        "--cell-types",
        required=True,
        help="types separated by '|', @FILE with one a line, or the name of an obs column with types",
    )
    for name, (kind, text) in _PLAIN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    for name, text in _LISTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", help=text)
    parser.add_argument("--use-raw", action=argparse.BooleanOptionalAction, help="take the expression from raw")
    parser.add_argument("--one-to-one", choices=("yes", "no", "auto"), help="whether no type is given twice")
    parser.add_argument("--shuffle-candidates", action="store_true", help="show candidates in random order")
    parser.add_argument("--no-constrained", action="store_true", help="do not hold the decoder to legal answers")
    parser.add_argument("--no-reasoning", action="store_true", help="do not store puzzles and reasoning")
    parser.add_argument("--engine-options", type=json.loads, help='JSON, {"max_model_len": 8192} for example')
    parser.add_argument("--ontology", action="store_true", help="add Cell Ontology ids")
    parser.add_argument("--report", type=Path, help="HTML file to write, too")
    parser.add_argument("--dry-run", action="store_true", help="print the prompts as JSON lines and stop")
    return parser


def _read_types(text: str, columns: Sequence[str]) -> list[str] | str:
    """Read --cell-types. A name alone is a column: a misspelt one must not become the only type."""
    if text.startswith("@"):
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if "|" not in text:
        if text not in columns:
            msg = f"--cell-types: obs has no column {text!r}; it has {list(columns)}; write types as 'type 1|type 2'"
            raise ValueError(msg)
        return text
    return [name.strip() for name in text.split("|")]


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import anndata as ad

    import scverse_plugin
    from scverse_plugin._report import check_path

    if not args.input.is_file():
        msg = f"input: there is no file {args.input}"
        raise FileNotFoundError(msg)
    if args.report is not None:
        check_path(args.report)
    adata = ad.read_h5ad(args.input)
    options = {name: getattr(args, name) for name in (*_PLAIN, *_LISTS) if getattr(args, name) is not None}
    for name in ("model", "use_raw", "engine_options"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.one_to_one is not None:
        options["one_to_one"] = {"yes": True, "no": False, "auto": "auto"}[args.one_to_one]
    options["shuffle_candidates"] = args.shuffle_candidates
    options["constrained"] = not args.no_constrained
    options["store_reasoning"] = not args.no_reasoning
    types = _read_types(args.cell_types, list(map(str, adata.obs.columns)))
    if args.dry_run:
        if "model" not in options:
            options["model"] = "none"
        for prompt in scverse_plugin.tl.annotate(adata, types, dry_run=True, **options) or ():
            print(json.dumps(prompt, ensure_ascii=False))
        return
    scverse_plugin.tl.annotate(adata, types, **options)
    key = options.get("key_added", "cello1")
    if args.ontology:
        scverse_plugin.tl.ontology_ids(adata, key)
    with replacing(args.output) as temporary:
        adata.write_h5ad(temporary)
    if args.report is not None:
        scverse_plugin.report(adata, args.report, key)
    table = scverse_plugin.get.cello1_df(adata, key)
    print(table[["label", "support", "runner_up", "margin", "votes", "failures", "status"]].head(100).to_string())
