import numpy as np
import pytest
import torch

from recipe.cello1.engines.local import cpu_dtype
from recipe.cello1.engines.protocol import EngineError, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.engines.transformers import _keep_nucleus
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.answer import parse_answer
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.scoring import score_answer
from tests.helpers.toy_model import build_toy_model, odd_puzzles, toy_puzzles

PUZZLES = toy_puzzles(6)
GREEDY = Sampling(max_tokens=10)
HOT = Sampling(temperature=1.0, max_tokens=10, logprobs=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    with start_engine("transformers", folder, batch_size=4, constrained=True, device="cpu") as engine:
        yield engine


def asked(puzzles=PUZZLES, seeds=None, constrain=False):
    return [
        Request(messages(p), None if seeds is None else seeds[i], *((p.candidates, p.n_cells) if constrain else ()))
        for i, p in enumerate(puzzles)
    ]


def prompt_ids(engine, puzzle):
    return engine._tokenizer.apply_chat_template(messages(puzzle), add_generation_prompt=True, return_dict=False)


def answers(engine, requests, sampling):
    found = dict(engine.generate(iter(requests), sampling))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def test_greedy_is_what_the_model_finds_likeliest(engine):
    (found,) = answers(engine, asked(PUZZLES[:1]), GREEDY)
    ids = prompt_ids(engine, PUZZLES[0])
    written = []
    for _ in range(10):
        with torch.inference_mode():
            written.append(int(engine._model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    assert found.text == engine._tokenizer.decode(written)
    assert (found.tokens, found.finish_reason, found.prompt_tokens, found.logprob) == (10, "length", len(ids), None)


def test_answers_do_not_depend_on_the_batch(engine):
    together = answers(engine, asked(), GREEDY)
    alone = [answers(engine, [request], GREEDY)[0] for request in asked()]
    assert [a.text for a in together] == [a.text for a in alone]


def test_seed_decides_and_not_the_batch_or_the_global_generator(engine):
    first = answers(engine, asked(seeds=range(6)), HOT)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    again = answers(engine, asked(PUZZLES[3:5], seeds=[3, 4]), HOT)
    assert [a.text for a in again] == [a.text for a in first[3:5]]
    assert torch.equal(torch.random.get_rng_state(), state)
    other = answers(engine, asked(seeds=range(10, 16)), HOT)
    assert all(a.text != b.text for a, b in zip(first, other, strict=True))


def test_logprobs_are_those_of_the_model(engine):
    (found,) = answers(engine, asked(PUZZLES[:1]), Sampling(max_tokens=5, logprobs=True))
    ids = prompt_ids(engine, PUZZLES[0])
    total = 0.0
    for _ in range(5):
        with torch.inference_mode():
            logprobs = engine._model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total += float(logprobs.max())
        ids = [*ids, int(logprobs.argmax())]
    assert found.logprob == pytest.approx(total, abs=1e-3)


def test_draws_follow_the_distribution(engine, monkeypatch):
    monkeypatch.setattr(engine, "batch_size", 100)
    with torch.inference_mode():
        logits = engine._model(torch.tensor([prompt_ids(engine, PUZZLES[0])])).logits[0, -1].double()
    p, logprobs = logits.div(0.3).softmax(-1).numpy(), logits.log_softmax(-1).numpy()
    sampling = Sampling(temperature=0.3, max_tokens=1, logprobs=True)
    found = answers(engine, [Request(messages(PUZZLES[0]), seed) for seed in range(400)], sampling)
    # The mean log-probability (at temperature 1) of draws at temperature 0.3.
    expected = p @ logprobs
    deviation = float(np.sqrt(p @ (logprobs - expected) ** 2) / np.sqrt(400))
    assert np.mean([a.logprob for a in found]) == pytest.approx(expected, abs=4 * deviation)


def test_nucleus():
    scores = torch.log(torch.tensor([[0.5, 0.1, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]]))
    kept = torch.isfinite(_keep_nucleus(scores, 0.7))
    assert kept.tolist() == [[True, False, True, False], [True, False, False, False]]


def test_constrained_answers_are_legal(engine):
    sampling = Sampling(temperature=1.0, max_tokens=200, reasoning_budget=5)
    for result, puzzle in zip(answers(engine, asked(seeds=range(6), constrain=True), sampling), PUZZLES, strict=True):
        score = score_answer(result.text, puzzle.answer, candidates=puzzle.candidates)
        assert (score.reason, score.in_candidates) == ("", True)
        assert result.finish_reason == "stop"


@pytest.mark.integration
def test_a_thousand_constrained_answers_are_legal(engine, monkeypatch):
    monkeypatch.setattr(engine, "batch_size", 250)
    puzzles = odd_puzzles(1000)
    sampling = Sampling(temperature=1.0, max_tokens=300, reasoning_budget=2)
    for result, puzzle in zip(answers(engine, asked(puzzles, range(1000), True), sampling), puzzles, strict=True):
        score = score_answer(result.text, puzzle.answer, candidates=puzzle.candidates)
        assert (score.reason, score.in_candidates) == ("", True), result.text


def test_free_and_constrained_in_one_batch(engine):
    requests = [*asked(PUZZLES[:2]), *asked(PUZZLES[2:4], constrain=True)]
    found = answers(engine, requests, Sampling(max_tokens=150, reasoning_budget=4))
    assert [parse_answer(result.text).ok for result in found] == [False, False, True, True]


def test_what_cannot_be_answered_fails_alone(engine):
    long = Request([{"role": "user", "content": "gene " * 3000}])
    tight = asked(PUZZLES[:1], constrain=True)[0]
    found = answers(engine, [long, asked()[0], tight], GREEDY)
    assert "too long" in found[0].error
    assert found[1].text == answers(engine, asked()[:1], GREEDY)[0].text
    assert "give more max_tokens" in found[2].error


def test_memory_running_out_halves_the_batch(engine, monkeypatch):
    expected = [a.text for a in answers(engine, asked(seeds=range(6)), HOT)]
    sizes = []
    generate = engine._model.generate

    def tight(ids, **options):
        sizes.append(len(ids))
        if len(ids) > 1:
            for processor in options["logits_processor"]:  # some way into the batch
                processor(ids, torch.zeros(len(ids), engine._model.config.vocab_size))
            raise torch.OutOfMemoryError("no room")
        return generate(ids, **options)

    monkeypatch.setattr(engine._model, "generate", tight)
    assert [a.text for a in answers(engine, asked(seeds=range(6)), HOT)] == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1, 2, 1, 1]


def test_failures_are_recorded_not_raised(engine, monkeypatch, tmp_path):
    def broken(ids, **options):
        raise RuntimeError("kernel\nfault")

    monkeypatch.setattr(engine._model, "generate", broken)
    done = predict(engine, PUZZLES, tmp_path / "p.jsonl", sampling=GREEDY, progress=False)
    assert (done.failed, done.errors) == (6, {"RuntimeError: kernel fault": 6})
    assert all("prediction" not in record for record in read_items(tmp_path / "p.jsonl"))


def test_constraint_needs_to_be_asked_for(folder):
    with start_engine("transformers", folder, device="cpu") as engine:
        (found,) = answers(engine, asked(PUZZLES[:1], constrain=True), GREEDY)
        assert found == Failure("the engine was not started for constrained answers; start it with constrained=True")
    with pytest.raises(EngineError, match="is closed"):
        list(engine.generate([], GREEDY))


def test_what_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="transformers cannot load"):
        start_engine("transformers", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        start_engine("transformers", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        start_engine("transformers", tmp_path, lora=str(tmp_path))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        start_engine("transformers", tmp_path, batch_size=0)


def test_lora_changes_the_answers(folder, engine, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=2.0)
    adapted.save_pretrained(tmp_path / "lora")
    plain = [a.text for a in answers(engine, asked(), GREEDY)]
    with start_engine("transformers", folder, lora=str(tmp_path / "lora"), device="cpu") as other:
        assert [a.text for a in answers(other, asked(), GREEDY)] != plain
        assert other.fingerprint != engine.fingerprint


@pytest.mark.parametrize(
    ("stored", "has_bf16", "used"),
    [
        ("float32", True, "float32"),
        ("float32", False, "float32"),
        ("bfloat16", True, "auto"),
        ("bfloat16", False, "float32"),
    ],
)
def test_engines_agree_on_the_number_format_of_a_cpu(tmp_path, monkeypatch, stored, has_bf16, used):
    """Left to itself vLLM makes float32 models bfloat16, so that it would answer otherwise than transformers."""
    from transformers import Qwen2Config

    Qwen2Config(dtype=stored).save_pretrained(tmp_path)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    assert cpu_dtype(str(tmp_path)) == used
