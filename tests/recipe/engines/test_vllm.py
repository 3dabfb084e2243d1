import json

import pytest

from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.task.answer import parse_answer
from recipe.cello1.task.scoring import score_answer
from tests.helpers.processes import run_scenario
from tests.helpers.toy_model import build_toy_model, odd_puzzles, toy_puzzles

# One process for all of it: importing vLLM takes longest.
SCENARIO = r"""
import json, os, sys, time
from pathlib import Path

from recipe.cello1.engines.protocol import EngineError, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.inference.predict import predict
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.prompt import messages


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    folder = Path(sys.argv[1])
    puzzles = load_puzzles(folder / "data.json").puzzles
    found = {"resident": []}
    watched = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")
    before = [os.environ.get(name) for name in watched]
    greedy = Sampling(max_tokens=12)
    for model in ("a", "b", "a"):
        began = time.monotonic()
        with start_engine("vllm", folder / model) as engine:
            assert [os.environ.get(name) for name in watched] == before
            predict(engine, puzzles, folder / f"{model}.jsonl", sampling=greedy, progress=False)
            if model == "b":
                found["again"] = [
                    result.text
                    for _, result in sorted(
                        engine.generate([Request(messages(p)) for p in puzzles], greedy), key=lambda pair: pair[0]
                    )
                ]
                hot = Sampling(temperature=1.0, max_tokens=12, logprobs=True)
                sampled = lambda seeds: [
                    (r.text, r.logprob)
                    for _, r in sorted(
                        engine.generate([Request(messages(puzzles[0]), s) for s in seeds], hot), key=lambda p: p[0]
                    )
                ]
                found["sampled"] = [sampled([1, 2, 3]), sampled([3])]
                long = Request([{"role": "user", "content": "gene " * 5000}])
                results = dict(engine.generate([long, Request(messages(puzzles[0]))], greedy))
                found["long"] = [type(results[0]).__name__, results[0].error, results[1].text]
                # a caller that stops early leaves nothing behind
                for _ in engine.generate([Request(messages(p)) for p in puzzles], greedy):
                    break
                found["left"] = engine._llm.llm_engine.get_num_unfinished_requests()
                step = engine._llm.llm_engine.step

                def broken():
                    raise MemoryError("no room")

                engine._llm.llm_engine.step = broken
                found["broken"] = [
                    r.error for _, r in engine.generate([Request(messages(p)) for p in puzzles[:3]], greedy)
                ]
                engine._llm.llm_engine.step = step
        found["resident"].append(resident())
        print(f"{model}: {time.monotonic() - began:.1f} s", flush=True)
    began = time.monotonic()
    with start_engine("vllm", folder / "a", lora=str(folder / "lora")) as engine:
        results = dict(engine.generate([Request(messages(p)) for p in puzzles], greedy))
        found["lora"] = [results[i].text for i in range(len(puzzles))]
        found["lora_fingerprint"] = engine.fingerprint
    for model in ("merged", "a"):
        with start_engine("transformers", folder / model, device="cpu") as engine:
            results = dict(engine.generate([Request(messages(p)) for p in puzzles], greedy))
            found[f"transformers {model}"] = [results[i].text for i in range(len(puzzles))]
    print(f"adapter and transformers: {time.monotonic() - began:.1f} s", flush=True)
    try:
        list(engine.generate([], greedy))
    except EngineError as error:
        found["closed"] = str(error)
    try:
        start_engine("vllm", folder / "a", max_model_len=10**9)
    except EngineError as error:
        found["refused"] = str(error)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
"""


CONSTRAINED = r"""
import json, sys
from pathlib import Path

from recipe.cello1.engines.protocol import Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.inference.predict import predict
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.prompt import messages


def main():
    folder = Path(sys.argv[1])
    puzzles = load_puzzles(folder / "data.json").puzzles
    with start_engine("vllm", folder / "a", constrained=True) as engine:
        # Seeds for some only: vLLM on CPU draws them one by one.
        hot = Sampling(temperature=1.0, max_tokens=300, reasoning_budget=3)
        predict(engine, puzzles[:100], folder / "seeded.jsonl", sampling=hot, decode="constrained", progress=False)
        requests = [Request(messages(p), None, p.candidates, p.n_cells) for p in puzzles[100:]]
        found = {"texts": [text for _, text in sorted(
            (i, result.text) for i, result in engine.generate(requests, hot)
        )]}
        # free and constrained requests in one batch
        mixed = [Request(messages(puzzles[0])), requests[0]] * 4
        results = dict(engine.generate(mixed, Sampling(max_tokens=300, reasoning_budget=10)))
        found["mixed"] = [results[i].text for i in range(8)]
        short = dict(engine.generate([requests[0]], Sampling(max_tokens=10)))
        found["short"] = short[0].error
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
"""


def build_adapter(model, adapter, merged):
    """Write a random adapter of rank 4, and the model with it merged in."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    tuned.save_pretrained(adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(model).save_pretrained(merged)


@pytest.mark.integration
def test_real_vllm(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    for name, seed in (("a", 0), ("b", 1)):
        build_toy_model(tmp_path / name, seed=seed)
    build_adapter(tmp_path / "a", tmp_path / "lora", tmp_path / "merged")
    puzzles = toy_puzzles(8)
    write_puzzles(tmp_path / "data.json", puzzles)
    found = run_scenario(SCENARIO, tmp_path)
    records = {name: [json.loads(line) for line in open(tmp_path / f"{name}.jsonl")] for name in "ab"}
    assert [record["index"] for record in records["a"]] == list(range(8))
    assert all(record["tokens"] <= 12 and record["prompt_tokens"] > 12 for record in records["a"])
    assert {record["finish_reason"] for record in records["a"]} <= {"stop", "length"}
    texts = {name: [record["prediction"] for record in records[name]] for name in "ab"}
    assert texts["a"] != texts["b"]
    assert found["again"] == texts["b"]
    assert found["transformers a"] == texts["a"]
    assert found["lora"] == found["transformers merged"] != texts["a"]
    assert found["lora_fingerprint"] != records["a"][0]["fingerprint"]
    assert found["sampled"][0][2][0] == found["sampled"][1][0][0]  # the seed decides, not the batch
    assert len({text for text, _ in found["sampled"][0]}) == 3
    assert all(logprob < 0 for _, logprob in found["sampled"][0])
    assert found["long"][:1] == ["Failure"]
    assert "too long" in found["long"][1]
    assert found["long"][2] == texts["b"][0]
    assert found["left"] == 0
    assert found["broken"] == ["vLLM stopped: MemoryError: no room"] * 3
    assert max(found["resident"]) - found["resident"][0] < 200  # MiB: the KV cache alone has 1,024
    assert "is closed" in found["closed"]
    assert "vLLM cannot start" in found["refused"]


@pytest.mark.integration
def test_a_thousand_constrained_answers_of_a_random_model_are_legal(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    build_toy_model(tmp_path / "a")
    puzzles = odd_puzzles(1000)
    write_puzzles(tmp_path / "data.json", puzzles)
    found = run_scenario(CONSTRAINED, tmp_path)

    records = read_items(tmp_path / "seeded.jsonl")
    assert records[0]["sampling"]["constraint"] == "exact"
    texts = [record["prediction"] for record in records] + found["texts"]
    assert len(texts) == 1000
    for text, puzzle in zip(texts, puzzles, strict=True):
        score = score_answer(text, puzzle.answer, candidates=puzzle.candidates)
        assert (score.reason, score.in_candidates) == ("", True), text
    assert len({text.partition("<answer>")[2] for text in texts}) > 500  # the model chooses
    assert len(set(found["mixed"][0::2])) == len(set(found["mixed"][1::2])) == 1
    assert parse_answer(found["mixed"][1]).ok
    assert not parse_answer(found["mixed"][0]).ok
    assert "give more max_tokens" in found["short"]
