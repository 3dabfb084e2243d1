"""A real ``vllm serve`` with our logits processor, asked through the OpenAI engine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

import pytest

from recipe.cello1.engine import Request, Sampling, start_engine
from recipe.cello1.prompt import messages
from recipe.cello1.scoring import score_answer
from tests.recipe.toy_model import build_toy_model, toy_puzzles

PROCESSOR = "recipe.cello1.constrained_vllm:MatchingLogitsProcessor"


@contextmanager
def served(folder, log, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    }
    command = shutil.which("vllm", path=os.path.dirname(sys.executable)) or "vllm"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "toy", "--enforce-eager", *options]
    # A prompt cut in two makes vLLM turn a seeded request's random generator back, which CPU generators refuse.
    flags += ["--no-enable-chunked-prefill", "--dtype", "float32"]
    with open(log, "w") as output:
        server = subprocess.Popen(
            [command, "serve", str(folder), *flags], stdout=output, stderr=output, env=env, start_new_session=True
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            pass
        with suppress(ProcessLookupError):  # its engine would outlive it
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.integration
def test_served_answers_are_legal(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    build_toy_model(tmp_path / "model")
    puzzles = toy_puzzles(20, 4)
    asked = [Request(messages(p), i, p.candidates, p.n_cells) for i, p in enumerate(puzzles)]
    hot = Sampling(temperature=1.0, max_tokens=300, reasoning_budget=5, logprobs=True)
    with (
        served(tmp_path / "model", tmp_path / "server.log", "--logits-processors", PROCESSOR) as url,
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
