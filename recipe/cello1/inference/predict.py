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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.cello1.engines.asking import Asked, ask
from recipe.cello1.engines.options import add_asking, add_engines, engine_options, sampling_of
from recipe.cello1.engines.protocol import Completion, Decoding, Engine, Failure, Request, Sampling, sample_seed
from recipe.cello1.engines.start import start_engines
from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.formats.journal import FolderJournal, Journal
from recipe.cello1.formats.predictions import RUN_KEYS, check_prediction, error_record, prediction_record
from recipe.cello1.formats.provenance import check_same
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.inference.matrix import Reading, evidence_sampling, read_matrix
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


def predict(
    engine: Engine,
    puzzles: Sequence[Puzzle],
    out: str | Path,
    *,
    sampling: Sampling | None = None,
    samples: int = 1,
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
        How to sample; the default is greedy.
    samples
        Answers for each puzzle; with ``decode="matrix"`` pieces of evidence for each cell of it.
    seed
        Seed of the run; each completion has its own, made of this, its item and its number.
    layout
        Prompt layout.
    variant
        Task variant.
    decode
        ``"free"``: as the model answers. ``"constrained"``: each answer is a legal one-to-one matching; the engine must
        be started for that. ``"matrix"``: the probability of each candidate is read out for each cell, and the best
        one-to-one matching is the answer; see ``inference/matrix.py``.
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
        If there are no puzzles, ``samples`` is not positive, several greedy samples are asked for, the engine or the
        puzzles lack what ``decode`` needs, an item has keys of the record, ``out`` holds predictions of another model,
        data set or setting, or another run is writing to it.
    """
    sampling = sampling or Sampling()
    if not puzzles:
        msg = "puzzles is empty; there is nothing to predict"
        raise ValueError(msg)
    if samples < 1:
        msg = f"samples must be at least 1, got {samples}"
        raise ValueError(msg)
    if samples > 1 and sampling.temperature == 0:
        msg = f"samples is {samples}, but at temperature 0 all samples are the same; set a temperature, 0.7 for example"
        raise ValueError(msg)
    part, parts = shard
    if not 0 <= part < parts:
        msg = f"shard must be (i, n) with 0 <= i < n, got {shard}"
        raise ValueError(msg)
    _check_decoding(engine, puzzles, decode, sampling)
    how = {"decode": decode, "seed": seed, "constraint": engine.constraint if decode == "constrained" else ""}
    pieces = 1
    if decode == "matrix":
        sampling, pieces, samples = evidence_sampling(sampling), samples, 1
        how["pieces"] = pieces
    journal_type = _journal_type(Path(out), samples)
    run = {
        "engine": engine.name,
        "model": engine.model,
        "fingerprint": engine.fingerprint,
        "sampling": sampling.as_dict() | how,
        "prompt_layout": check_layout(layout),
    }
    nothing = Completion("", "", 0, 0, 0.0 if sampling.logprobs else None)

    def record(key: tuple[int, int], result: Completion | Reading | Failure) -> dict[str, Any]:
        return _record(result, puzzle_to_item(puzzles[key[0]], variant), *key, run)

    def request(key: tuple[int, int]) -> Request:
        own_seed = sample_seed(seed, *key) if sampling.temperature > 0 else None
        puzzle = puzzles[key[0]]
        legal = (puzzle.candidates, puzzle.n_cells) if decode == "constrained" else ()
        return Request(messages(puzzle, layout, variant), own_seed, *legal)

    # One puzzle's samples follow each other, so that its prompt is still in the prefix cache.
    mine = [(i, s) for i in range(part, len(puzzles), parts) for s in range(samples)]
    for index in range(part, len(puzzles), parts):
        record((index, 0), nothing)  # keys of an item that clash with its record's show before anything is asked
    with journal_type.held(out):
        journal = journal_type(out, partial(_key, puzzles, variant, run))
        journal.tidy()
        todo = [key for key in mine if key not in journal]
        kept = len(mine) - len(todo)
        with tqdm(
            total=len(mine), initial=kept, desc="predict", unit="item", disable=not progress, dynamic_ncols=True
        ) as bar:
            if decode == "matrix":
                asked = Asked()
                own = [(index, puzzles[index]) for index, _ in todo]
                for index, result in read_matrix(
                    engine, own, sampling, samples=pieces, seed=seed, layout=layout, variant=variant
                ):
                    journal.add((index, 0), record((index, 0), result))
                    asked.note(result, bar)
            else:
                asked = ask(
                    engine, todo, request, lambda key, result: journal.add(key, record(key, result)), sampling, bar=bar
                )
        journal.tidy(order=True)
    return Progress(len(mine), kept, asked.answered, asked.failed, asked.errors)


def _check_decoding(engine: Engine, puzzles: Sequence[Puzzle], decode: Decoding, sampling: Sampling) -> None:
    """Refuse a way of decoding for which the engine or the puzzles lack something."""
    if decode == "free":
        return
    short = next((i for i, puzzle in enumerate(puzzles) if len(puzzle.candidates) < puzzle.n_cells), None)
    if short is not None:
        msg = f"decode={decode!r} needs a candidate for each cell, and puzzle {short} has fewer; use decode='free'"
        raise ValueError(msg)
    if decode == "constrained" and not engine.constraint:
        msg = f"decode: the engine {engine.name!r} was not started for constrained answers (constrained=True)"
        raise ValueError(msg)
    if decode == "matrix" and not engine.can_score:
        msg = (
            f"decode='matrix' needs probabilities, and {engine.name!r} gives none; use the engine vllm or transformers"
        )
        raise ValueError(msg)
    if decode == "matrix" and sampling.logprobs:
        msg = "logprobs are of sampled answers; decode='matrix' gives probabilities of its own"
        raise ValueError(msg)


def _journal_type(out: Path, samples: int) -> type[Journal] | type[FolderJournal]:
    """Choose by the name: ``.jsonl`` is a file, a name without suffix a folder."""
    if out.suffix == ".jsonl" and not out.is_dir():
        return Journal
    # The suffix of a folder may be a part of a model's name (Qwen2.5-7B).
    if out.suffix == ".json" or out.is_file():
        msg = f"out: {out} must end in .jsonl, or be a folder for one JSON per item"
        raise ValueError(msg)
    if samples > 1:
        msg = f"out: a folder holds one prediction for each item, and {samples} samples are wanted; give a .jsonl file"
        raise ValueError(msg)
    return FolderJournal


def _key(
    puzzles: Sequence[Puzzle], variant: Variant, run: Mapping[str, Any], record: Any, where: str
) -> tuple[int, int] | None:
    """Check that a record is of this run; failures are tried again."""
    answered = check_prediction(record, where)
    check_same({name: record.get(name) for name in RUN_KEYS}, run, where)
    index, sample = record.get("index"), record.get("sample")
    item = puzzle_to_item(puzzles[index], variant) if type(index) is int and 0 <= index < len(puzzles) else None
    if item is None or any(record.get(name) != value for name, value in item.items()):
        msg = f"{where}: its item {index} is not the one of this data set; give another out, or remove it"
        raise ValueError(msg)
    if not isinstance(sample, int):
        msg = f"{where}: its sample must be an integer, got {sample!r}; give another out, or remove it"
        raise ValueError(msg)
    return (index, sample) if answered else None  # also samples that this run does not ask for


def _record(result: Any, item: Mapping[str, Any], index: int, sample: int, run: Mapping[str, Any]) -> dict[str, Any]:
    common = {"index": index, "sample": sample, **run}
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
    parser.add_argument("--limit", type=int, help="answer only the first LIMIT puzzles")
    add_asking(parser)
    add_engines(parser)
    return parser


AFTER_INTERRUPT = "; answers so far are kept: run the same command again to resume"


def run(args: argparse.Namespace) -> str | None:
    """Run the command."""
    sampling, options = sampling_of(args), engine_options(args)
    if args.limit is not None and args.limit < 1:
        msg = f"--limit must be at least 1, got {args.limit}"
        raise ValueError(msg)
    data = load_puzzles(args.data, args.variant, args.prompt_layout)
    out = args.out or args.folder / args.model.replace("/", "_")
    with start_engines(args.engine, args.model, args.num_engines, **options) as engine:
        puzzles = data.puzzles[: args.limit]
        legal = engine.constraint and all(puzzle.candidates for puzzle in puzzles)
        if engine.constraint == "candidates":
            print("note: this server can be held to the candidates, but may name a type twice", file=sys.stderr)
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
