"""A real ``vllm serve`` with our logits processor, asked through the OpenAI engine."""

import pytest

from recipe.cello1.engines.protocol import LOGITS_PROCESSOR, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.template_limits import LIMIT_TEMPLATES
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.scoring import score_answer
from tests.helpers.processes import free_port, served
from tests.helpers.toy_model import build_toy_model, toy_puzzles

HOSTILE = "{% if 'boom' in messages[0].content %}{{ 7 ** (10**9) }}{% endif %}{{ 'a'|center(LENGTH) if nothing }}"


@pytest.mark.integration
def test_a_server_renders_within_bounds(tmp_path, monkeypatch):
    """Also where a template waits for its hour, or reckons when it is only looked at."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = build_toy_model(tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(HOSTILE.replace("LENGTH", str(10**11)) + template.read_text())
    command = ["vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(free_port())]
    command += ["--served-model-name", "toy"]
    monkeypatch.setenv(LIMIT_TEMPLATES, "1")
    asked = [Request([{"role": "user", "content": text}]) for text in ("hello", "boom", "again")]
    with (
        served(command, tmp_path / "server.log") as (url, _),
        start_engine("openai", "toy", base_url=url, timeout=60, retries=0) as engine,
    ):
        found = [dict(engine.generate([request], Sampling(max_tokens=3)))[0] for request in asked]
    assert found[0].tokens == 3
    assert all("it makes or moves more than" in reply.error for reply in found[1:]), "it is stopped once and for all"


@pytest.mark.integration
def test_served_answers_are_legal(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    build_toy_model(tmp_path / "model")
    puzzles = toy_puzzles(20, 4)
    asked = [Request(messages(p), i, p.candidates, p.n_cells) for i, p in enumerate(puzzles)]
    hot = Sampling(temperature=1.0, max_tokens=300, reasoning_budget=5, logprobs=True)
    command = ["vllm", "serve", str(tmp_path / "model"), "--host", "127.0.0.1", "--port", str(free_port())]
    command += ["--served-model-name", "toy", "--logits-processors", LOGITS_PROCESSOR]
    with (
        served(command, tmp_path / "server.log") as (url, _),
        start_engine("openai", "toy", base_url=url, constrained=True) as engine,
    ):
        assert engine.constraint == "exact"  # it has found out that this is vLLM
        found = dict(engine.generate(asked, hot))
        greedy = Sampling(max_tokens=20)
        free = dict(engine.generate([Request(messages(p)) for p in puzzles], greedy))
        again = dict(engine.generate(asked, hot))
        bad = dict(engine.generate([Request(messages(puzzles[0]), 0, ("a", "b"), 3)], hot))
    for i, puzzle in enumerate(puzzles):
        score = score_answer(found[i].text, puzzle.answer, candidates=puzzle.candidates)
        assert (score.reason, score.in_candidates) == ("", True), found[i]
        assert found[i].logprob < 0
        assert free[i].tokens == 20  # untouched by the processor
    assert [found[i].text for i in range(20)] == [again[i].text for i in range(20)]  # the seed decides
    assert "cello1_n_answers must be an integer between 1 and" in bad[0].error
