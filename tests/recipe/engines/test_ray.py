import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from recipe.cello1.engines import start
from recipe.cello1.engines.protocol import Request, Sampling
from recipe.cello1.engines.ray import RayEngines, _gpus, _say, _Work
from recipe.cello1.engines.start import start_engines
from recipe.cello1.formats.puzzle_files import write_puzzles
from tests.helpers.processes import run_scenario
from tests.helpers.toy_model import build_toy_model, toy_puzzles


def test_number_of_engines():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        start_engines("vllm", "m", 0)
    with pytest.raises(ValueError, match="engine must be one of"):
        start_engines("tgi", "m", 2)
    with pytest.raises(FileNotFoundError, match="does not exist"):  # one engine needs no Ray
        start_engines("transformers", "/nowhere", 1)


@pytest.mark.parametrize(("n", "engines"), [(0, 2), (1, 2), (7, 2), (100, 3), (5000, 2)])
def test_shares_cover_all_work_once_and_shrink(n, engines):
    work = _Work([Request([], seed) for seed in range(n)], engines)
    shares = []
    while share := work.take():
        shares.append(share)
    assert [position for share in shares for position, _ in share] == list(range(n))
    assert all(request.seed == position for share in shares for position, request in share)
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes[:1]) <= max(8, -(-n // (2 * engines)))
    assert len(work.rest()) == 0


def test_stopped_work_is_not_handed_out():
    work = _Work([Request([])] * 100, 2)
    first = work.take()
    work.stop()
    assert work.take() == []
    assert work.rest() == range(len(first), 100)


def test_gpus_of_an_engine():
    assert _gpus("vllm", {"tensor_parallel_size": 4}) == 4
    assert _gpus("vllm", {}) == 1
    assert _gpus("transformers", {"device": "cpu"}) == _gpus("openai", {}) == 0


def test_errors_in_one_line():
    assert _say(ValueError("first\n  last \n")) == "ValueError: last"
    assert _say(ValueError()) == "ValueError: "


@pytest.mark.parametrize("address", [None, "ray.example:6379"])
def test_where_ray_is_started(address, tmp_path, monkeypatch):
    """On one machine by itself, whoever has a cluster there; never in a folder whose modules the workers would run."""
    seen = {}

    class Ray:
        @staticmethod
        def is_initialized():
            return False

        @staticmethod
        def init(**options):
            seen.update(options, folder=os.getcwd(), there=os.listdir())

        @staticmethod
        def cluster_resources():
            raise RuntimeError("enough")

        @staticmethod
        def shutdown():
            seen["left"] = seen.get("left", 0) + 1

    monkeypatch.setitem(sys.modules, "ray", Ray)
    monkeypatch.setattr(os, "environ", {"PATH": "x"} | ({"RAY_ADDRESS": address} if address else {}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise SystemExit")
    with pytest.raises(RuntimeError, match="enough"):
        RayEngines("transformers", "m", 2, lambda: None)
    assert os.getcwd() == str(tmp_path)
    assert seen["there"] == [] and not os.path.exists(seen["folder"]) and seen["left"] == 1
    assert (seen.get("address"), seen.get("_temp_dir")) == ((None, None) if address else ("local", seen["folder"]))
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == (None if address else "0")


def test_paths_for_engines_that_work_elsewhere(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(start, "RayEngines", lambda *args, **options: started.append((args, options)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    start_engines("vllm", "model", 2, lora="adapter")
    start_engines("openai", "some/model", 2, base_url="u")
    (here, options), (there, _) = started
    assert here[1] == "model" and here[3].args == ("vllm", str(tmp_path / "model"))
    assert options["lora"] == here[3].keywords["lora"] == str(tmp_path / "adapter")
    assert there[3].args == ("openai", "some/model")


def test_ray_ends_after_the_threads_that_ask_it():
    """A caller that stops early leaves one of them waiting; Ray ends the process of whoever asks it after its end."""
    order, gone = [], threading.Event()

    class Gone(Exception):
        pass

    def get(reference):
        if reference == "first":
            return 0, "answer"
        gone.wait(10)
        time.sleep(0.2)
        order.append("asked")
        raise Gone

    stream = SimpleNamespace(remote=lambda *_: ["first", "second"])
    actor = SimpleNamespace(run=SimpleNamespace(options=lambda **_: stream))
    engines = object.__new__(RayEngines)
    engines._actors, engines._threads, engines._started_ray, engines._folder = [actor], [], True, None
    engines._ray = SimpleNamespace(
        get=get,
        kill=lambda _: gone.set(),
        shutdown=lambda: order.append("ended"),
        exceptions=SimpleNamespace(RayActorError=Gone),
    )
    answers = engines.generate([Request([]), Request([])], Sampling())
    assert next(answers) == (0, "answer")
    engines.close()
    assert order == ["asked", "ended"]


SCENARIO = r"""
import json, sys, time
from pathlib import Path

from recipe.cello1.__main__ import main
from recipe.cello1.engines.protocol import EngineError, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engines
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.prompt import messages


def scenario():
    folder = Path(sys.argv[1])
    puzzles = load_puzzles(folder / "data.json").puzzles
    found = {}
    flags = ["predict", "--model", str(folder / "model"), "--data", str(folder / "data.json"), "--free"]
    flags += ["--max-tokens", "8"]
    found["rc"] = [
        main([*flags, "--out", str(folder / "one.jsonl")]),
        main([*flags, "--out", str(folder / "two.jsonl"), "--num-engines", "2"]),
    ]
    greedy = Sampling(max_tokens=8)
    with start_engines("transformers", folder / "model", 2, device="cpu") as engine:
        first = next(iter(engine.generate([Request(messages(p)) for p in puzzles], greedy)))  # a caller that stops
        found["first"] = first[0]
        engine._ray.kill(engine._actors[0])
        time.sleep(1)
        results = dict(engine.generate([Request(messages(p)) for p in puzzles], greedy))
        found["after a death"] = [
            sum(isinstance(result, Failure) for result in results.values()), len(results),
            next(result.error for result in results.values() if isinstance(result, Failure)),
        ]
    import ray

    found["ray left"] = ray.is_initialized()
    try:
        start_engines("transformers", folder / "nothing", 2)
    except EngineError as error:
        found["refused"] = str(error)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    scenario()
"""


@pytest.mark.integration
def test_two_engines_answer_like_one(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    pytest.importorskip("ray", reason="Ray is not installed")
    build_toy_model(tmp_path / "model")
    write_puzzles(tmp_path / "data.json", toy_puzzles(40))
    found = run_scenario(SCENARIO, tmp_path)
    assert found["rc"] == [0, 0]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    failed, total, error = found["after a death"]
    assert total == 40
    assert 0 < failed < 40  # what the dead engine had taken; the other did the rest
    assert "an engine has died" in error
    assert found["ray left"] is False
    assert "an engine cannot be started" in found["refused"]
    assert "does not exist" in found["refused"]
