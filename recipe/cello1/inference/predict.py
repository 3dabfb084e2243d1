"""Answer puzzles with a model.

The output is JSONL, one record for each item and sample (``index``, ``sample``), written as it gets done. Started again
with the same arguments, the command goes on where it was: what is there stays, what failed is tried again. When all is
done the file is put in order, so that it does not depend on how often the run was interrupted.

    python -m recipe.cello1 predict --model MODEL --data test.json --out predictions.jsonl

The flags of the published script work too: item j goes to shard j mod n, into one JSON per item::

    python -m recipe.cello1 predict --llm_name MODEL --dataset test.json --folder predictions --n 4 --i 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipe.cello1.engines.asking import Asked, ask
from recipe.cello1.engines.options import (
    READ_OUT,
    add_asking,
    add_engines,
    engine_options,
    sampling_defaults,
    sampling_of,
)
from recipe.cello1.engines.protocol import Completion, Decoding, Engine, Failure, Request, Sampling, sample_seed
from recipe.cello1.engines.read_out import Reading, read_out, read_out_sampling
from recipe.cello1.engines.start import start_engines
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.journal import FolderJournal, Journal
from recipe.cello1.formats.predictions import RUN_KEYS, check_prediction, error_record, prediction_record
from recipe.cello1.formats.provenance import check_same
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.prompt import Layout, Variant, check_layout, messages
from recipe.cello1.task.puzzle import Puzzle


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has done.

    Attributes
    ----------
    total
        Completions wanted: puzzles times samples.
    kept
        Of these, found in the file at the start.
    answered
        Answered now.
    failed
        Failed now; they stand in the file as error records and are tried again next time.
    errors
        How often each error occurred.
    """

    total: int
    kept: int
    answered: int
    failed: int
    errors: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What is the same for all answers of a run."""

    engine: Engine
    puzzles: Sequence[Puzzle]
    sampling: Sampling
    # Of a read-out, which gives one answer made of them
    samples: int
    seed: int
    layout: Layout
    variant: Variant
    decode: Decoding

    def facts(self) -> dict[str, Any]:
        """Say how the answers were made, under the ``RUN_KEYS``."""
        engine, averaged = self.engine, self.decode in READ_OUT
        sampling = read_out_sampling(self.decode, self.sampling, engine.can_score).as_dict()
        held = engine.constraint if self.decode in ("constrained", "soft") else ""
        how = {"decode": self.decode, "seed": self.seed, "constraint": held}
        return {
            "engine": engine.name,
            "model": engine.model,
            "fingerprint": engine.fingerprint,
            "sampling": sampling | how | ({"pieces": self.samples} if averaged else {}),
            "prompt_layout": check_layout(self.layout),
        }

    def request(self, key: tuple[int, int]) -> Request:
        """Ask for one answer."""
        puzzle = self.puzzles[key[0]]
        own_seed = sample_seed(self.seed, *key) if self.sampling.temperature > 0 else None
        legal = (puzzle.candidates, puzzle.n_cells) if self.decode == "constrained" else ()
        return Request(messages(puzzle, self.layout, self.variant), own_seed, *legal)

    def item(self, index: int) -> dict[str, Any]:
        """Give the item that a record repeats."""
        return puzzle_to_item(self.puzzles[index], self.variant)

    def ask(self, todo: Sequence[tuple[int, int]], keep: Callable[[tuple[int, int], Any], None], bar: tqdm) -> Asked:
        """Get what is to be answered and hand it over as it comes."""
        if self.decode not in READ_OUT:
            return ask(self.engine, todo, self.request, keep, self.sampling, bar=bar)
        asked = Asked()
        own = [(index, self.puzzles[index]) for index, _ in todo]
        write = partial(messages, layout=self.layout, variant=self.variant)
        for index, result in read_out(
            self.engine, own, self.sampling, self.decode, samples=self.samples, seed=self.seed, write=write
        ):
            keep((index, 0), result)
            asked.note(result, bar)
        return asked


def predict(
    engine: Engine,
    puzzles: Sequence[Puzzle],
    out: str | Path,
    *,
    sampling: Sampling | None = None,
    samples: int | None = None,
    seed: int = 0,
    layout: Layout = "system",
    variant: Variant = "batch",
    decode: Decoding = "free",
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Progress:
    """Answer puzzles and keep the answers in a file, going on from what it already holds.

    Parameters
    ----------
    engine
        What answers.
    puzzles
        What to answer.
    out
        The ``.jsonl`` file of records, or a folder for one ``<index>.json`` per item (the published layout).
    sampling
        How to sample; by default greedy, for ``soft`` at temperature 1.
    samples
        Answers for each puzzle, by default 1. A read-out makes one answer of as many, by default 4 unless greedy.
    seed
        Seed of the run; each completion has its own, made of this, its item and its number.
    layout
        Prompt layout.
    variant
        Task variant.
    decode
        ``"free"``: as the model answers. ``"constrained"``: held to legal one-to-one matchings, for which the engine
        must be started. ``"matrix"``, ``"soft"``: the probability of each candidate is read out for each cell, and the
        best matching is the answer; see ``engines/read_out.py``.
    shard
        ``(i, n)``: answer only the items j with j mod n = i. The others of the n may run elsewhere, each with an
        ``.jsonl`` of its own, or all with the same folder.
    progress
        Whether to show a progress bar.

    Returns
    -------
    What was done.

    Raises
    ------
    ValueError
        If a parameter or an item cannot be used, ``out`` holds predictions of another model, data set or setting, or
        another run is writing to it.
    """
    temperature, samples = sampling_defaults(decode, sampling.temperature if sampling else None, samples)
    run = _Run(engine, puzzles, sampling or Sampling(temperature), samples, seed, layout, variant, decode)
    _check(run, shard)
    answers = 1 if decode in READ_OUT else samples
    journal_type, facts = _journal_type(Path(out), answers), run.facts()
    mine = range(shard[0], len(puzzles), shard[1])
    for index in mine:  # keys of an item that clash with its record's show before anything is asked
        _record(_nothing(run), run.item(index), index, 0, facts)
    # One puzzle's samples follow each other, so that its prompt is still in the prefix cache.
    keys = [(index, sample) for index in mine for sample in range(answers)]
    with journal_type.held(out, shard):
        journal = journal_type(out, partial(_key, run, facts))
        journal.tidy()
        todo = [key for key in keys if key not in journal]
        kept = len(keys) - len(todo)

        def keep(key: tuple[int, int], result: Any) -> None:
            journal.add(key, _record(result, run.item(key[0]), *key, facts))

        shown: dict[str, Any] = {"desc": "predict", "unit": "item", "disable": not progress, "dynamic_ncols": True}
        with tqdm(total=len(keys), initial=kept, **shown) as bar:
            asked = run.ask(todo, keep, bar)
        journal.tidy(order=True)
    return Progress(len(keys), kept, asked.answered, asked.failed, asked.errors)


def _check(run: _Run, shard: tuple[int, int]) -> None:
    """Refuse a run that cannot be done."""
    decode, sampling = run.decode, run.sampling
    if not run.puzzles:
        raise ValueError("puzzles is empty; there is nothing to predict")
    if run.samples < 1:
        raise ValueError(f"samples must be at least 1, got {run.samples}")
    if run.samples > 1 and sampling.temperature == 0 and run.decode != "matrix":
        msg = f"samples is {run.samples}, but at temperature 0 all samples are the same; set a temperature, like 0.7"
        raise ValueError(msg)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}")
    if decode == "free":
        return
    short = next((i for i, puzzle in enumerate(run.puzzles) if len(puzzle.candidates) < puzzle.n_cells), None)
    if short is not None:
        msg = f"decode={decode!r} needs a candidate for each cell, and puzzle {short} has fewer; use decode='free'"
        raise ValueError(msg)
    if decode == "constrained" and not run.engine.constraint:
        msg = f"decode: the engine {run.engine.name!r} was not started for constrained answers (constrained=True)"
        raise ValueError(msg)
    if decode in READ_OUT and sampling.logprobs:
        raise ValueError(f"logprobs are of sampled answers; decode={decode!r} gives probabilities of its own")


def _nothing(run: _Run) -> Completion | Reading:
    """Give a result that has the keys of the run's results."""
    if run.decode in READ_OUT:
        return Reading(("-",), np.ones((1, 1)), 0, 0)
    return Completion("", "", 0, 0, 0.0 if run.sampling.logprobs else None)


def _journal_type(out: Path, samples: int) -> type[Journal] | type[FolderJournal]:
    """Choose by the name: ``.jsonl`` is a file, a name without suffix a folder."""
    if out.suffix == ".jsonl" and not out.is_dir():
        return Journal
    # The suffix of a folder may be a part of a model's name (Qwen2.5-7B).
    if out.suffix == ".json" or out.is_file():
        raise ValueError(f"out: {out} must end in .jsonl, or be a folder for one JSON per item")
    if samples > 1:
        msg = f"out: a folder holds one prediction for each item, and {samples} samples are wanted; give a .jsonl file"
        raise ValueError(msg)
    return FolderJournal


def _key(run: _Run, facts: Mapping[str, Any], record: Any, where: str) -> tuple[int, int] | None:
    """Check that a record is of this run; failures are tried again."""
    answered = check_prediction(record, where)
    check_same({name: record.get(name) for name in RUN_KEYS}, facts, where)
    index, sample = record.get("index"), record.get("sample")
    item = run.item(index) if type(index) is int and 0 <= index < len(run.puzzles) else None
    if item is None or any(record.get(name) != value for name, value in item.items()):
        raise ValueError(f"{where}: its item {index} is not the one of this data set; choose another out, or remove it")
    if not isinstance(sample, int):
        raise ValueError(f"{where}: its sample must be an integer, got {sample!r}; choose another out, or remove it")
    return (index, sample) if answered else None  # also samples that this run does not ask for


def _record(result: Any, item: Mapping[str, Any], index: int, sample: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    common = {"index": index, "sample": sample, **facts}
    if isinstance(result, Failure):
        return error_record(item, result.error, **common)
    if isinstance(result, Reading):
        common |= result.facts()
    elif result.logprob is not None:
        common["logprob"] = result.logprob
    return prediction_record(
        item,
        result.text,
        finish_reason="stop" if isinstance(result, Reading) else result.finish_reason,
        tokens=result.tokens,
        prompt_tokens=result.prompt_tokens,
        **common,
    )


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        description="Answer puzzles with a model; resumes what was interrupted.",
    )
    parser.add_argument("--data", "--dataset", required=True, type=Path, help="puzzles: .json, .jsonl or .parquet")
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", type=Path, help="prediction records: .jsonl, or a folder for one JSON per item")
    out.add_argument("--folder", type=Path, help="one JSON per item in FOLDER/MODEL (the published layout)")
    parser.add_argument("--n", type=int, default=1, help="number of shards")
    parser.add_argument("--i", type=int, default=0, help="this shard: items j with j mod N = I")
    add_asking(parser)
    add_engines(parser)
    return parser


AFTER_INTERRUPT = "; answers so far are kept: run the same command again to resume"


def run(args: argparse.Namespace) -> str | None:
    """Run the command."""
    sampling, options = sampling_of(args), engine_options(args)
    data = load_puzzles(args.data, args.variant, args.prompt_layout)
    out = args.out or args.folder / args.model.replace("/", "_")
    with start_engines(args.engine, args.model, args.num_engines, **options) as engine:
        puzzles = data.puzzles[: args.limit]
        legal = engine.constraint and all(puzzle.candidates for puzzle in puzzles)
        if engine.constraint == "candidates":
            print("note: this server can be held to the candidates, but may name a type twice", file=sys.stderr)
        if args.decode in READ_OUT and not engine.can_score:
            print("note: this server gives no probabilities; each sample is a vote", file=sys.stderr)
        done = predict(
            engine,
            puzzles,
            out,
            sampling=sampling,
            samples=args.samples,
            seed=args.seed,
            layout=data.layout,
            variant=data.variant,
            decode=args.decode or ("constrained" if legal else "free"),
            shard=(args.i, args.n),
        )
    print(f"{done.kept + done.answered} of {done.total} answers: {out}")
    if not done.failed:
        return None
    worst, count = max(done.errors.items(), key=lambda entry: entry[1])
    return f"{done.failed} requests failed, {count} of them with: {worst}; run the same command again to retry them"
