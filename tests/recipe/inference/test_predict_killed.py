"""A run that is killed (SIGKILL) again and again ends with the file of an undisturbed one."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from recipe.cello1.formats.puzzle_files import write_puzzles
from tests.helpers.processes import environment
from tests.helpers.toy_model import toy_puzzles

KILLS = 20
# A greedy engine that takes its time and answers in another order in every process.
SCRIPT = r"""
import os, sys, time

import numpy as np

from recipe.cello1.__main__ import main
from recipe.cello1.engines.protocol import Completion, EngineBase
from recipe.cello1.inference import predict as command


class Slow(EngineBase):
    name, model, fingerprint, constraint = "slow", "m", "", ""

    def generate(self, requests, sampling):
        requests = list(requests)
        print("ready", flush=True)
        for position in np.random.default_rng(os.getpid()).permutation(len(requests)).tolist():
            time.sleep(float(sys.argv[2]))
            text = f"<think>{requests[position].messages[-1]['content']}</think>\u2028" * 20
            yield position, Completion(text, "stop", 1, 1)


command.start_engines = lambda *args, **options: Slow()
folder = sys.argv[1]
raise SystemExit(main(["predict", "--model", "m", "--data", f"{folder}/data.json", "--out", sys.argv[3]]))
"""


@pytest.mark.integration
@pytest.mark.parametrize("out", ["killed.jsonl", "killed"])
def test_twenty_kills_lose_and_repeat_nothing(tmp_path, out):
    write_puzzles(tmp_path / "data.json", toy_puzzles(500))
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(pause, name):
        arguments = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(pause), str(tmp_path / name)]
        return subprocess.Popen(
            arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def finish(name):
        process = start(0, name)
        process.communicate(timeout=300)
        assert process.returncode == 0

    rng = np.random.default_rng(0)
    whole = out.replace("killed", "whole")
    finish(whole)
    kills, grown = 0, [0]
    while kills < KILLS:
        process = start(0.004, out)
        if rng.random() < 0.9:
            process.stdout.readline()  # the others die while they start and look at what is there
        time.sleep(float(rng.uniform(0, 0.25)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        there = tmp_path / out
        grown.append(
            len(list(there.glob("*.json"))) if there.is_dir() else there.stat().st_size if there.exists() else 0
        )
    assert len(set(grown)) > 5  # they died in the middle of it
    finish(out)

    if out.endswith(".jsonl"):
        assert (tmp_path / out).read_bytes() == (tmp_path / whole).read_bytes()
        records = [json.loads(line) for line in (tmp_path / out).read_bytes().splitlines()]
        assert [record["index"] for record in records] == list(range(500))
    else:
        files = [sorted(path for path in (tmp_path / name).glob("*.json")) for name in (out, whole)]
        assert [path.name for path in files[0]] == [path.name for path in files[1]]
        assert len(files[0]) == 500
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
