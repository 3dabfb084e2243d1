"""Label the cells of an h5ad file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.cello1.formats.atomic import held, loads
from recipe.cello1.task.ontology import load_ontology
from recipe.cello1.task.prompt import LAYOUTS

if TYPE_CHECKING:
    from anndata import AnnData

# Options of annotate that are named as the parameters of tl.annotate: kind, and what to say of them.
_PLAIN: dict[str, tuple[Any, str]] = {
    "groupby": (str, "column of obs whose groups are labelled; without it every cell is"),
    "tissue": (str, "where the cells are from, if the model is to name the types itself"),
    "organism": (str, "human or mouse, for example; symbols are checked against it"),
    "evidence": (str, "cells or markers: what the model sees when it names types itself"),
    "refine": (str, "label of an earlier run in the file whose cells get finer labels"),
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
    "support": (str, "auto, votes, or readout: the model's probabilities"),
    "min_support": (float, "groups with less support get no label"),
    "max_false": (float, "share of false labels to accept, judged by --decoys, instead of --min-support"),
    "unassigned": (str, "label of groups without one"),
    "base_url": (str, "address of the server"),
    "prompt_layout": (str, f"{', '.join(LAYOUTS)}, as the model was trained"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "probability mass to sample from"),
    "max_tokens": (int, "longest response"),
    "reasoning_budget": (int, "most tokens of reasoning"),
    "max_concurrency": (int, "puzzles in flight at a time"),
    "max_puzzles": (int, "refuse a run that takes more"),
    "cache": (str, ".jsonl file that keeps responses; by default one for each model in the user's cache folder"),
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

AFTER_INTERRUPT = "; run the same command again to resume: what is kept (see --cache) is not asked again"


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path, help="h5ad file or zarr store")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".h5ad file or .zarr store to write")
    parser.add_argument(
        "--model", action="append", help="folder of the model, or its name on the server; again for each of several"
    )
    parser.add_argument("--engine", action="append", help="vllm, openai or transformers; once, or for each model")
    parser.add_argument(
        "--cell-types",
        help="types separated by '|', @FILE with one a line, or the name of an obs column with types; "
        "needed unless --tissue or --refine is given",
    )
    for name, (kind, text) in _PLAIN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    for name, text in _LISTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", help=text)
    parser.add_argument("--use-raw", action=argparse.BooleanOptionalAction, help="take the expression from raw")
    parser.add_argument("--one-to-one", action="store_true", help="no type is given to two groups")
    parser.add_argument("--no-context", action="store_true", help="send no donor metadata, wherever the model runs")
    parser.add_argument("--no-cache", action="store_true", help="keep no responses")
    parser.add_argument(
        "--price-per-million-tokens", type=float, nargs="+", metavar="PRICE", help="one, or two (prompt, answer)"
    )
    parser.add_argument("--shuffle-candidates", action="store_true", help="show candidates in random order")
    parser.add_argument("--no-constrained", action="store_true", help="do not hold the decoder to legal answers")
    parser.add_argument("--no-reasoning", action="store_true", help="do not store puzzles and reasoning")
    parser.add_argument("--engine-options", type=loads, help='JSON, {"max_model_len": 8192} for example')
    parser.add_argument("--back-off", action="store_true", help="label what close types share with their ancestor")
    parser.add_argument("--calibration", type=Path, help="object that --truth was given for: support as learnt there")
    parser.add_argument("--truth", help="column of obs with true types: calibrate support on this object")
    parser.add_argument("--ontology", action="store_true", help="add Cell Ontology ids")
    parser.add_argument("--report", type=Path, help="HTML file to write, too")
    parser.add_argument("--dry-run", action="store_true", help="print the prompts as JSON lines and stop")
    return parser


def _read_types(text: str | None, columns: Sequence[str]) -> list[str] | str | None:
    """Read --cell-types. A name alone is a column: a misspelt one must not become the only type."""
    if text is None:
        return None
    if text.startswith("@"):
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    if "|" not in text:
        if text not in columns:
            msg = f"--cell-types: obs has no column {text!r}; it has {list(columns)}; write types as 'type 1|type 2'"
            raise ValueError(msg)
        return text
    return [name.strip() for name in text.split("|")]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of tl.annotate that are given."""
    names = (*_PLAIN, *_LISTS, "use_raw", "engine_options")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("model", "engine"):
        if (given := getattr(args, name)) is not None:
            options[name] = given if len(given) > 1 else given[0]
    if (prices := args.price_per_million_tokens) is not None:
        options["price_per_million_tokens"] = prices[0] if len(prices) == 1 else tuple(prices)
    for name, off in (("context", args.no_context), ("cache", args.no_cache)):
        if off and name in options:
            raise ValueError(f"--{name} and --no-{name} exclude each other; give one of them")
        if off:
            options[name] = None
    return options | {
        "shuffle_candidates": args.shuffle_candidates,
        "one_to_one": args.one_to_one,
        "back_off": args.back_off,
        "constrained": not args.no_constrained,
        "store_reasoning": not args.no_reasoning,
    }


def _calibration(path: Path, key: str) -> Any:
    from scverse_plugin import _files

    if not path.exists():
        raise FileNotFoundError(f"--calibration: there is no file {path}")
    found = _files.read_object(path).uns.get(key, {}).get("calibration")
    if found is None:
        raise ValueError(f"--calibration: {path} has no calibrated run {key!r}; annotate it with --truth COLUMN first")
    return found


def _calibrate(adata: Any, key: str, truth: str) -> None:
    """Calibrate; what cannot be calibrated is kept all the same."""
    import scverse_plugin

    try:
        scverse_plugin.tl.calibrate(adata, key, truth=truth)
    except ValueError as error:
        print(f"not calibrated: {error}", file=sys.stderr)
        return
    found = adata.uns[key]["calibration"]
    print(
        f"calibrated on {found['n']} groups, {found['n_right']} right: expected calibration error "
        f"{found['ece_before']:.3f} before, {found['ece_after']:.3f} after; AUROC {found['auroc']:.3f}",
        file=sys.stderr,
    )


def run(args: argparse.Namespace) -> None:
    """Run the command; what cannot be kept at the end is refused before anything is asked."""
    from scverse_plugin import _files
    from scverse_plugin._report import check_path

    _files.check_input(args.input)
    if args.dry_run:
        _dry_run(args)
        return
    _files.check_output(args.output)
    if args.report is not None:
        check_path(args.report)
    if args.ontology:
        load_ontology()
    with held(args.output, "output"):
        _annotate(args)


def _read(args: argparse.Namespace) -> tuple[AnnData, list[str] | str | None, dict[str, Any]]:
    """Read the object, the types and the other parameters of tl.annotate."""
    from scverse_plugin import _files

    adata, options = _files.read_object(args.input), _options(args)
    if args.truth is not None and args.truth not in adata.obs.columns:
        raise ValueError(f"--truth: obs has no column {args.truth!r}; it has {list(map(str, adata.obs.columns))}")
    if args.calibration is not None:
        options["calibration"] = _calibration(args.calibration, options.get("key_added", "cello1"))
    return adata, _read_types(args.cell_types, list(map(str, adata.obs.columns))), options


def _dry_run(args: argparse.Namespace) -> None:
    import scverse_plugin

    adata, types, options = _read(args)
    prompts: Any = scverse_plugin.tl.annotate(adata, types, dry_run=True, **{"model": "none", **options})
    for prompt in prompts:
        print(json.dumps(prompt))
    price = "" if prompts.max_price is None else f", price at most {prompts.max_price:.2f}"
    print(
        f"{prompts.n_puzzles} puzzles, about {prompts.prompt_tokens} tokens of prompts, "
        f"at most {prompts.max_answer_tokens} of answers{price}",
        file=sys.stderr,
    )


def _annotate(args: argparse.Namespace) -> None:
    import scverse_plugin
    from scverse_plugin import _files

    adata, types, options = _read(args)
    key = options.get("key_added", "cello1")
    _files.check_storable(adata, args.output)
    scverse_plugin.tl.annotate(adata, types, **options)
    if args.truth is not None:
        _calibrate(adata, key, args.truth)
    if args.ontology:
        scverse_plugin.tl.ontology_ids(adata, key)
    _files.write_object(adata, args.output)
    if args.report is not None:
        scverse_plugin.report(adata, args.report, key)
    table = scverse_plugin.get.cello1_df(adata, key)
    columns = ["label", "support", "runner_up", "margin", "votes", "failures", "status"]
    columns += ["agreement"] * ("agreement" in table) + ["backed_off_from"] * bool(
        (table["backed_off_from"] != "").any()
    )
    print(_files.visible(table[columns].head(100).to_string()))
