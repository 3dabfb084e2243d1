"""Make the recorded answers of ``cello1 demo``: ``python examples/record_demo.py``.

Without a model they are written by rules, and say so: for each cell the type most of whose marker genes lead its list,
over the puzzle one to one. With ``--model`` a model's answers are recorded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

from recipe.cello1.engines.protocol import Completion, EngineBase, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import atomic_write
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import parse_user
from scverse_plugin._commands.demo import ANSWERS, annotate_demo, key_of

MARKERS = {
    "CD14+ Monocyte": "LYZ S100A8 S100A9 CST3 FCN1 CD14 S100A6 S100A4 LGALS1 FTL",
    "CD19+ B": "CD79A CD79B MS4A1 CD74 HLA-DRA HLA-DQA1 HLA-DRB1 CD37 IGJ",
    "CD34+": "SOX4 STMN1 CD34 PRSS57 CYTL1 SPINK2 NPM1 HNRNPA1 EGFL7",
    "CD4+/CD25 T Reg": "IL32 FOXP3 CTLA4 CD3D TIGIT LTB RPS24",
    "CD4+/CD45RA+/CD25- Naive T": "CCR7 LEF1 CD3D LDHB NPM1 RPS24 CD7",
    "CD4+/CD45RO+ Memory": "IL7R CD3D S100A4 LTB IL32 ANXA1",
    "CD56+ NK": "GNLY NKG7 GZMB PRF1 CST7 CTSW FGFBP2 CCL5",
    "CD8+ Cytotoxic T": "CD8A GZMK NKG7 CCL5 CD3D CST7 GZMA IL32",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8B CD8A CCR7 CD3D RPS24 LEF1",
    "Dendritic": "FCER1A CD74 HLA-DRA HLA-DPA1 HLA-DPB1 HLA-DQA1 CST3 GSTP1 CLEC10A CD1C",
}


class Rules(EngineBase):
    """Answers by marker genes; no model."""

    name, model, fingerprint, constraint = "rules", "rules of marker genes, no model", "", "exact"

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Answer."""
        for position, request in enumerate(requests):
            puzzle = parse_user(request.messages[-1]["content"])
            found = [[_markers(cell, name) for name in puzzle.candidates] for cell in puzzle.cells]
            weights = np.array(
                [
                    [sum(1 / (2 + cell.index(gene)) for gene in genes) for genes in row]
                    for cell, row in zip(puzzle.cells, found, strict=True)
                ]
            )
            _, chosen = linear_sum_assignment(-weights)
            lines = [
                f"Cell {i}: {', '.join(found[i - 1][j]) or 'no marker of its own'} -> {puzzle.candidates[j]}"
                for i, j in enumerate(chosen.tolist(), start=1)
            ]
            text = format_answer([puzzle.candidates[j] for j in chosen], "\n".join(lines))
            yield position, Completion(text, "stop", 0, 0)


def _markers(cell: Sequence[str], name: str) -> list[str]:
    return [gene for gene in MARKERS[name].split() if gene in cell]


class Recorder(EngineBase):
    """Keeps what another engine answers."""

    name = "recorder"

    def __init__(self, engine: EngineBase) -> None:
        self._engine, self.model, self.answers = engine, engine.model, dict[str, str]()
        self.fingerprint, self.constraint = engine.fingerprint, engine.constraint

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """Pass on, and keep."""
        asked = list(requests)
        for position, result in self._engine.generate(asked, sampling):
            if isinstance(result, Completion):
                self.answers[key_of(asked[position])] = result.text
            yield position, result


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="model folder; without it rules answer")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    parser.add_argument("--out", type=Path, default=ANSWERS, help="the .json file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Record."""
    args = build_parser().parse_args(argv)
    with start_engine(args.engine, args.model, constrained=True) if args.model else Rules() as engine:
        recorder = Recorder(engine)
        annotate_demo(recorder)
    name = args.model.name if args.model else Rules.model
    found = {"model": name, "answers": recorder.answers}
    atomic_write(args.out, json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(f"{len(recorder.answers)} answers: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
