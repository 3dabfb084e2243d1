"""Load: memory of predict and its resume over many puzzles, writers of one journal, constrained tokens at their worst.

    python benchmarks/bench_load.py [predict|journal|constrained]

A made-up engine answers at once, so that what is measured is ours: reading puzzles, asking, keeping answers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from recipe.cello1.formats.atomic import JsonListWriter, append_jsonl, read_lines  # noqa: E402

PREDICT = """
import resource, sys
from recipe.cello1.engines.protocol import Completion, EngineBase
from recipe.cello1.inference import predict

class Fake(EngineBase):
    name, model, fingerprint, constraint = "fake", "m", "", ""
    def generate(self, requests, sampling):
        for position, _ in enumerate(requests):
            yield position, Completion("<think>" + "because " * 200 + "</think>", "stop", 200, 2000)

predict.start_engines = lambda *args, **options: Fake()
parser = predict.build_parser()
args = parser.parse_args(["--model", "m", "--data", sys.argv[1], "--out", sys.argv[2]])
assert predict.run(args) is None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def bench_predict(n: int, folder: Path) -> None:
    """Answer n puzzles of 10 cells, then start again on a file from which a tenth of the answers is missing."""
    rng = np.random.default_rng(0)
    genes = np.array([f"GENE{i}" for i in range(20_000)])
    types = [f"cell type number {i}" for i in range(10)]
    data, out = folder / "puzzles.json", folder / "predictions.jsonl"
    with JsonListWriter(data, None) as writer:
        for index in range(n):
            cells = genes[rng.integers(0, len(genes), (10, 50))]
            lines = "\n".join(f"Cell {i}: {', '.join(row)}" for i, row in enumerate(cells, start=1))
            user = f"Context: Donor {index}. \n\n{lines}\n\nMatch the cells above to one of the following cell types:\n"
            writer.write({"user_msg": user + "\n".join(types), "assistant_msg": " | ".join(types)})
    print(f"{n} puzzles, {data.stat().st_size >> 20} MiB")

    def run(name: str) -> None:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PREDICT, str(data), str(out)], check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        peak = int(done.stdout.split()[-1]) / 1024
        print(f"{name}: {seconds:.0f} s, peak {peak:.0f} MiB, {out.stat().st_size >> 20} MiB of answers", flush=True)

    run("predict")
    with open(out, "rb") as file, open(folder / "part.jsonl", "wb") as part:
        part.writelines(line for number, line in enumerate(file) if number % 10)
    (folder / "part.jsonl").replace(out)
    run("resume")


def _append(path: Path, writer: int, n: int, size: int) -> None:
    for number in range(n):
        append_jsonl(path, {"key": [writer, number], "text": f"{writer % 10}" * (size * (number % 10 + 1) // 10)})


def bench_journal(n: int, size: int, folder: Path) -> None:
    """Append to one file from 8 processes, and look for what is lost or cut."""
    path = folder / "journal.jsonl"
    workers = [multiprocessing.Process(target=_append, args=(path, writer, n // 8, size)) for writer in range(8)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    seen, cut = set(), 0
    for _, _, record in read_lines(path):
        writer, number = record["key"]
        seen.add((writer, number))
        cut += record["text"] != f"{writer % 10}" * (size * (number % 10 + 1) // 10)
    print(f"8 writers, {n} records up to {size} characters: {n - len(seen)} lost, {cut} cut, {seconds:.0f} s")


def bench_constrained(size: int = 150_000, n_types: int = 60) -> None:
    """Take the time of each token under 60 types of which each begins like another."""
    import torch

    from recipe.cello1.engines.constrained import Cursor, Matching, Vocabulary, mask_logits

    rng = np.random.default_rng(0)
    marks = "CD4-positive CD8-positive alpha-beta gamma-delta FOXP3-positive IgG-negative CD16-positive".split()
    types: list[str] = []
    for name in ("T cell", "B cell", "natural killer cell", "monocyte"):
        for _ in range(n_types // 4):
            types.append(name)
            name += f", {rng.choice(marks)}"
    text = " | ".join(types)
    tokens = {bytes((byte,)) for byte in range(256)}
    tokens |= {text[i : i + length].encode() for i in range(len(text)) for length in range(2, 9)}
    while len(tokens) < size:
        words = rng.integers(97, 123, size=(size - len(tokens), 8), dtype=np.uint8)
        tokens |= {b" " * (i % 2) + word.tobytes()[: 3 + (i + len(tokens)) % 6] for i, word in enumerate(words)}
    vocabulary = Vocabulary([b"", *sorted(tokens)], 0)
    logits = torch.from_numpy(rng.gumbel(size=(1, len(vocabulary.tokens))).astype(np.float32))
    spent, made = [], []
    for _ in range(3):
        began = time.thread_time()
        matching = Matching(vocabulary, [types[i] for i in rng.permutation(n_types)], n_types)
        made.append(time.thread_time() - began)
        cursor = Cursor(matching, matching.reserve + 100, opened=True)
        while not cursor.done:
            shifted = logits.roll(int(rng.integers(logits.shape[1])), dims=1)
            began = time.thread_time()
            mask_logits(shifted, {0: cursor})
            spent.append(time.thread_time() - began)
            token = int(shifted.argmax())
            began = time.thread_time()
            cursor.advance(token)
            spent[-1] += time.thread_time() - began
    milliseconds = np.array(spent) * 1e3
    print(
        f"{len(vocabulary.tokens)} tokens, {n_types} types: median {np.median(milliseconds):.3f} ms a token, "
        f"99% {np.quantile(milliseconds, 0.99):.2f}, worst {milliseconds.max():.2f}; "
        f"automaton {max(made) * 1e3:.1f} ms at most"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["predict", "journal", "constrained"])
    parser.add_argument("--n", type=int, default=100_000, help="puzzles (default %(default)s)")
    parser.add_argument("--records", type=int, default=4000, help="records of the journal (default %(default)s)")
    parser.add_argument("--size", type=int, default=1_000_000, help="characters of the longest one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if "predict" in args.what:
            bench_predict(args.n, Path(folder))
        if "journal" in args.what:
            bench_journal(args.records, args.size, Path(folder))
        if "constrained" in args.what:
            bench_constrained()


if __name__ == "__main__":
    main()
