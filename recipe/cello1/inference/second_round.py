"""Ask again where the answers to a puzzle disagree: the settled cells are fixed, only the open ones are left.

Takes predictions with several samples for each item, votes, and makes of the cells with little support a smaller puzzle
without the types that the others have taken. Its answers are kept beside the result, so that an interrupted command
goes on. Off unless called::

    python -m recipe.cello1.inference.second_round samples.jsonl --data test.json --model MODEL --out voted.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cello1.engines.options import add_asking, add_engines, engine_options, sampling_of
from recipe.cello1.engines.protocol import EngineError
from recipe.cello1.engines.start import start_engines
from recipe.cello1.formats.atomic import write_items
from recipe.cello1.formats.predictions import has_logprobs, read_predictions, record_weights
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.inference.vote import add_weighted, vote_records
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.voting import Answer, Consensus, consensus, read_answers


def open_cells(found: Consensus, min_support: float) -> list[int]:
    """Find the cells that the votes leave open.

    Parameters
    ----------
    found
        A consensus.
    min_support
        Cells with less support are open.

    Returns
    -------
    Their positions. None if a single one is open and no decoys are left: there is nothing to choose from then.
    """
    cells = np.flatnonzero(found.support < min_support).tolist()
    free = len(found.candidates) - (len(found.types) - len(cells))
    return cells if len(cells) > 1 or (cells and free > 1) else []


def second_puzzle(puzzle: Puzzle, found: Consensus, cells: Sequence[int]) -> Puzzle:
    """Make the smaller puzzle of the open cells: the types of the settled ones are taken off the candidates.

    Parameters
    ----------
    puzzle
        The puzzle.
    found
        Its consensus.
    cells
        The open cells, as :func:`open_cells` returned.

    Returns
    -------
    A puzzle of the open cells. It has gold only if the gold of the open cells is still among the candidates.

    Raises
    ------
    ValueError
        If ``cells`` is empty.
    """
    if not cells:
        msg = "cells is empty; there is nothing to ask again"
        raise ValueError(msg)
    settled = {name for i, name in enumerate(found.types) if i not in set(cells)}
    candidates = tuple(name for name in puzzle.candidates if name not in settled)
    gold = None if puzzle.answer is None else tuple(puzzle.answer[i] for i in cells)
    if gold is not None and not set(gold) <= set(candidates):
        gold = None
    return Puzzle(tuple(puzzle.cells[i] for i in cells), candidates, gold, puzzle.context, {"open_cells": list(cells)})


def merge_rounds(found: Consensus, cells: Sequence[int], second: Sequence[str]) -> Answer:
    """Put the answer to the smaller puzzle in its place.

    Parameters
    ----------
    found
        The first consensus.
    cells
        The open cells.
    second
        Their types.

    Returns
    -------
    The types of all cells.
    """
    types = list(found.types)
    for i, name in zip(cells, second, strict=True):
        types[i] = name
    return tuple(types)


class OpenPuzzle:
    """A puzzle with cells that the votes leave open.

    Parameters
    ----------
    index
        Position of the puzzle in its data set.
    puzzle
        The puzzle.
    found
        The consensus of the first round.
    cells
        The open cells.
    """

    def __init__(self, index: int, puzzle: Puzzle, found: Consensus, cells: Sequence[int]) -> None:
        self.index = index
        self.found = found
        self.cells = tuple(cells)
        self.smaller = second_puzzle(puzzle, found, cells)

    def settled(self, records: Sequence[Mapping[str, Any]], weighted: bool = False) -> dict[str, Any]:
        """Close the open cells.

        Parameters
        ----------
        records
            Predictions for the smaller puzzle, at least one.
        weighted
            Whether to weigh them by log-probability.

        Returns
        -------
        Keys of a voted record (see :func:`recipe.cello1.inference.vote.vote_records`) that change; nothing if no answer can be
        used, so that the first round stands.
        """
        answers = read_answers([record["prediction"] for record in records], self.smaller.n_cells)
        weights = record_weights(records) if weighted else None
        second = consensus(answers, self.smaller.candidates, self.smaller.n_cells, weights=weights)
        if not second.n_used:
            return {}
        types = merge_rounds(self.found, self.cells, second.types)
        details = self.found.cells()
        for i, cell in zip(self.cells, second.cells(), strict=True):
            details[i] = cell
        return {"prediction": format_answer(types), "cells": details, "open_cells": list(self.cells)}


def find_open(voted: Sequence[Mapping[str, Any]], puzzles: Sequence[Puzzle], min_support: float) -> list[OpenPuzzle]:
    """Find the puzzles to ask again.

    Parameters
    ----------
    voted
        What :func:`recipe.cello1.inference.vote.vote_records` returned, rule ``"consensus"``.
    puzzles
        The data set.
    min_support
        Cells with less support than this are open, 0 to 1.

    Returns
    -------
    The puzzles with open cells.

    Raises
    ------
    ValueError
        If ``min_support`` is out of range, or a record is not of the data set.
    """
    if not 0 <= min_support <= 1:
        msg = f"min_support must be between 0 and 1, got {min_support!r}"
        raise ValueError(msg)
    found = []
    for record in voted:
        if "voted" not in record:  # failures only
            continue
        index = record["index"]
        if not 0 <= index < len(puzzles) or len(record["cells"]) != puzzles[index].n_cells:
            msg = f"prediction {index} is not of this data set, which has {len(puzzles)} items"
            raise ValueError(msg)
        puzzle = puzzles[index]
        answers = [None if answer is None else tuple(answer) for answer in record["voted"]]
        first = consensus(answers, puzzle.candidates, puzzle.n_cells, weights=record.get("weights"))
        if first.n_used and (cells := open_cells(first, min_support)):
            found.append(OpenPuzzle(index, puzzle, first, cells))
    return found


def merge(
    voted: Sequence[Mapping[str, Any]],
    again: Sequence[OpenPuzzle],
    records: Sequence[Mapping[str, Any]],
    weighted: bool | None = None,
) -> list[dict[str, Any]]:
    """Put the answers of the second round in their places.

    Parameters
    ----------
    voted
        The first round.
    again
        The puzzles asked again.
    records
        Prediction records for their smaller puzzles; error records leave the first round as it was.
    weighted
        Whether to weigh the answers by log-probability; by default where every prediction has it.

    Returns
    -------
    The voted records; those that the second round has decided have ``open_cells``.

    Raises
    ------
    ValueError
        If ``weighted`` and a prediction has no log-probability.
    """
    weighted = has_logprobs(records) if weighted is None else weighted
    if weighted and records and not has_logprobs(records):
        msg = "weighted, but some predictions of the second round have no 'logprob'; ask with --logprobs"
        raise ValueError(msg)
    given: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        if "prediction" in record:
            given.setdefault(record["index"], []).append(record)
    changes = {puzzle.index: puzzle.settled(given[i], weighted) for i, puzzle in enumerate(again) if i in given}
    return [{**record, **changes.get(record["index"], {})} for record in voted]


def build_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Returns
    -------
    The parser.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipe.cello1.inference.second_round",
        description="Ask again where the answers to a puzzle disagree.",
    )
    parser.add_argument("predictions", type=Path, help="predictions with several samples for each item")
    parser.add_argument("--data", required=True, type=Path, help="the puzzles they answer")
    parser.add_argument("--out", required=True, type=Path, help="voted predictions, .jsonl")
    parser.add_argument("--min-support", type=float, default=0.75, help="cells with less are open (default 0.75)")
    add_weighted(parser)
    add_asking(parser, samples=8, temperature=1.0)
    add_engines(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments, ``sys.argv`` by default.

    Returns
    -------
    0, 1 if some puzzles could not be asked again, 2 if the run could not start.
    """
    args = build_parser().parse_args(argv)
    failed = 0
    try:
        if args.weighted and not args.logprobs:
            msg = "--weighted needs --logprobs, so that the second round can be weighed, too"
            raise ValueError(msg)
        sampling, options = sampling_of(args), engine_options(args)
        data = load_puzzles(args.data, args.variant, args.prompt_layout)
        voted = vote_records(read_predictions(args.predictions), weighted=args.weighted, variant=data.variant)
        again = find_open(voted, data.puzzles, args.min_support)
        records: list[dict[str, Any]] = []
        if again:
            kept = args.out.with_suffix(".round2.jsonl")
            with start_engines(args.engine, args.model, args.num_engines, **options) as engine:
                failed = predict(
                    engine,
                    [puzzle.smaller for puzzle in again],
                    kept,
                    sampling=sampling,
                    samples=args.samples,
                    seed=args.seed,
                    layout=data.layout,
                    variant=data.variant,
                    constrain=args.constrain,
                ).failed
            records = read_predictions(kept)
        merged = merge(voted, again, records, args.weighted)
        write_items(args.out, merged)
    except (ValueError, OSError, EngineError) as error:
        print(f"second_round: {error}", file=sys.stderr)
        return 2
    changed = sum("open_cells" in record for record in merged)
    print(f"second_round: {len(again)} of {len(voted)} puzzles asked again, {changed} settled, in {args.out}")
    if failed:
        print(f"second_round: {failed} answers failed; the same command tries them again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
