"""Prefix, stop and score of the engines."""

import numpy as np
import pytest
import torch

from recipe.cello1.engines.protocol import Choice, EngineBase, EngineError, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engine, start_engines
from recipe.cello1.formats.chat_template import with_prefix
from recipe.cello1.task.prompt import messages
from tests.helpers.toy_model import TYPES, build_toy_model, toy_puzzles

PUZZLES = toy_puzzles(3)
OPTIONS = (*(f" {name}" for name in TYPES), "\n", " T cell, CD8-positive, alpha-beta")
PREFIX = "<think>\nCell 1: ACTB ->"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    with start_engine("transformers", folder, batch_size=4, constrained=True, device="cpu") as engine:
        yield engine


def ids_of(engine, puzzle, text):
    prompt = engine._tokenizer.apply_chat_template(messages(puzzle), add_generation_prompt=True, tokenize=False)
    return engine._tokenizer(prompt + text, add_special_tokens=False)["input_ids"]


def plain(engine, puzzle, prefix, options):
    """The same by one forward pass for each text, from the tokens that all have in common."""
    texts = [ids_of(engine, puzzle, prefix + option) for option in options]
    start = next(i for i in range(len(texts[0])) if len({tuple(ids[: i + 1]) for ids in texts}) > 1)
    totals = []
    for ids in texts:
        with torch.inference_mode():
            logprobs = engine._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        totals.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))))
    return totals


def test_scores_are_the_probabilities_of_the_texts(engine):
    found = dict(engine.score(Choice(messages(puzzle), PREFIX, OPTIONS) for puzzle in PUZZLES))
    assert sorted(found) == [0, 1, 2]
    for i, puzzle in enumerate(PUZZLES):
        assert found[i].dtype == np.float64
        np.testing.assert_allclose(found[i], plain(engine, puzzle, PREFIX, OPTIONS), rtol=1e-4)


def test_scores_do_not_depend_on_what_else_is_asked(engine):
    (alone,) = [value for _, value in engine.score([Choice(messages(PUZZLES[0]), PREFIX, OPTIONS)])]
    among = dict(engine.score([Choice(messages(PUZZLES[0]), PREFIX + " x" * n, OPTIONS) for n in (0, 3, 9)]))
    np.testing.assert_allclose(alone, among[0], rtol=1e-4)


def test_what_cannot_be_scored_stops_no_other(engine):
    good = Choice(messages(PUZZLES[0]), PREFIX, OPTIONS)
    bad = Choice(messages(PUZZLES[0]), PREFIX, (" a", " a"))
    long = Choice(messages(PUZZLES[0]), PREFIX + " x" * 5000, OPTIONS)
    found = dict(engine.score([bad, good, long]))
    assert isinstance(found[0], Failure)
    assert isinstance(found[1], np.ndarray)
    assert "too long" in found[2].error


def test_a_completion_goes_on_from_its_prefix(engine):
    (done,) = [c for _, c in engine.generate([Request(messages(PUZZLES[0]), prefix=PREFIX)], Sampling(max_tokens=5))]
    ids = ids_of(engine, PUZZLES[0], PREFIX)
    written = []
    for _ in range(5):
        with torch.inference_mode():
            written.append(int(engine._model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    assert done.text == engine._tokenizer.decode(written)
    assert done.prompt_tokens == len(ids)


def test_a_prefix_takes_the_place_of_what_the_template_opens():
    assert with_prefix("user: x\nassistant:\n", "<think>\nCell") == "user: x\nassistant:\n<think>\nCell"
    assert with_prefix("assistant:\n<think>\n\n", "<think>\nCell") == "assistant:\n<think>\nCell"
    assert with_prefix("assistant:\n<think>\n", "Cell") == "assistant:\n<think>\nCell"
    assert with_prefix("assistant:\n<think>\n", "") == "assistant:\n<think>\n"


def test_a_completion_ends_before_the_text_to_stop_at(engine):
    requests = [Request(messages(puzzle), seed) for seed, puzzle in enumerate(PUZZLES)]
    free = dict(engine.generate(requests, Sampling(temperature=1.0, max_tokens=40)))
    stop = free[0].text[12:14]
    held = dict(engine.generate(requests, Sampling(temperature=1.0, max_tokens=40, stop=stop)))
    for i in range(3):
        assert held[i].text == free[i].text.partition(stop)[0]
        if stop in free[i].text:
            assert held[i].finish_reason == "stop"
            assert held[i].tokens < free[i].tokens


def test_a_constrained_answer_takes_no_prefix(engine):
    request = Request(messages(PUZZLES[0]), None, PUZZLES[0].candidates, 3, prefix=PREFIX)
    ((_, found),) = engine.generate([request], Sampling(max_tokens=200))
    assert "prefix" in found.error


def test_an_engine_without_probabilities_says_so():
    class Plain(EngineBase):
        name, model, fingerprint, constraint = "plain", "", "", ""

        def generate(self, requests, sampling):
            yield from ()

    assert not Plain().can_score
    with pytest.raises(EngineError, match="use vllm or transformers"):
        Plain().score([])


def test_records_of_old_have_no_stop():
    assert "stop" not in Sampling().as_dict()
    assert Sampling(stop="->").as_dict()["stop"] == "->"


@pytest.mark.integration
def test_vllm_gives_the_same_numbers(folder, engine):
    choices = [Choice(messages(puzzle), PREFIX, OPTIONS) for puzzle in PUZZLES]
    request = Request(messages(PUZZLES[0]), prefix=PREFIX)
    with start_engine("vllm", folder, max_model_len=1024) as other:
        found = dict(other.score(choices))
        ((_, done),) = other.generate([request], Sampling(max_tokens=5))
        stop = done.text[3:5]
        ((_, held),) = other.generate([request], Sampling(max_tokens=5, stop=stop))
    expected = dict(engine.score(choices))
    for i in range(3):
        np.testing.assert_allclose(found[i], expected[i], atol=0.05)
    ((_, same),) = engine.generate([request], Sampling(max_tokens=5))
    assert done.text == same.text
    assert held.text == done.text.partition(stop)[0]
    assert held.finish_reason == "stop"


@pytest.mark.integration
def test_engines_side_by_side_score_too(folder, engine):
    choices = [Choice(messages(puzzle), PREFIX, OPTIONS) for puzzle in PUZZLES]
    with start_engines("transformers", folder, 2, device="cpu") as engines:
        assert engines.can_score
        found = dict(engines.score(choices))
    for i, expected in engine.score(choices):
        np.testing.assert_allclose(found[i], expected, rtol=1e-4)
