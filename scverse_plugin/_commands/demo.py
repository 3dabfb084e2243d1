"""Annotate scanpy's blood cells and open the report, without GPU, training or key.

The model of the main job answers if it is there, else recorded answers do (``demo_answers.json``, made by
``python examples/record_demo.py``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import webbrowser
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipe.cello1.engines.protocol import Completion, EngineBase, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import read_json

MODEL = Path("outputs/embedded/model")
ANSWERS = Path(__file__).with_name("demo_answers.json")
# As in the puzzles that the model of the main job is trained on.
OPTIONS: dict[str, Any] = {
    "n_top_genes": 12,
    "puzzle_size": 5,
    "n_candidates": 5,
    "max_tokens": 200,
    "n_votes": 10,
    "min_support": 0.3,
}


class Recorded(EngineBase):
    """Gives the answers that a model has given to the same prompts."""

    name, constraint = "recorded", ""

    def __init__(self, path: Path) -> None:
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        found = read_json(path)
        self.model, self._answers = str(found["model"]), found["answers"]

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Look answers up."""
        for position, request in enumerate(requests):
            text = self._answers.get(key_of(request))
            yield (
                position,
                Failure("this prompt is not among the recorded ones: scanpy or numpy draws other cells here")
                if text is None
                else Completion(text, "stop", len(text) // 3, sum(len(m["content"]) for m in request.messages) // 3),
            )


def key_of(request: Request) -> str:
    """Return what tells prompts apart."""
    text = json.dumps([dict(message) for message in request.messages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("cello1_demo"), help="folder for object and report")
    parser.add_argument("--model", type=Path, help=f"model folder; by default {MODEL} if it is there")
    parser.add_argument("--no-open", action="store_true", help="do not open the report in a browser")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    model = args.model or (MODEL if (MODEL / "config.json").is_file() else None)
    from scverse_plugin import _files
    from scverse_plugin._report import check_path

    target = args.out / "annotated.h5ad"
    _files.check_output(target, "out")
    page = check_path(args.out / "report.html")
    if model is None:
        with Recorded(ANSWERS) as engine:
            print(f"no model in {MODEL}: the answers are recorded ones ({engine.model})", file=sys.stderr)
            adata = annotate_demo(engine)
    else:
        with _started(model) as engine:
            adata = annotate_demo(engine)
    _show(adata, target, page, opens=not args.no_open)


def _show(adata: Any, target: Path, page: Path, *, opens: bool) -> None:
    import scverse_plugin
    from scverse_plugin import _files

    _files.write_object(adata, target)
    scverse_plugin.report(adata, page)
    table = scverse_plugin.get.cello1_df(adata)
    known = adata.obs.groupby("louvain", observed=True)["bulk_labels"].agg(lambda names: names.mode().iloc[0])
    table = table.assign(published=[str(known[name]) for name in table.index])
    print(_files.visible(table[["label", "published", "support", "runner_up", "status"]].to_string()))
    print("This shows how it works, not how good a model is: cells of its training may be among these.")
    print(f"object: {target}\nreport: {page}")
    if opens and _has_display():
        webbrowser.open(page.absolute().as_uri())


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _started(model: Path) -> EngineBase:
    name = "vllm" if find_spec("vllm") else "transformers"
    return start_engine(name, model, constrained=True)


def annotate_demo(engine: EngineBase) -> Any:
    """Label the clusters of scanpy's cells with the types that their publishers name."""
    import scanpy as sc

    import scverse_plugin

    adata = sc.datasets.pbmc68k_reduced()
    adata.obs["tissue"], adata.obs["disease"] = "blood", "normal"  # CELLxGENE's columns become the context
    types = adata.obs["bulk_labels"].cat.categories
    scverse_plugin.tl.annotate(adata, types, groupby="louvain", engine=engine, cache=None, **OPTIONS)
    return adata
