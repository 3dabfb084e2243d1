"""Real vLLM and a real server, with a tiny untrained model, or with the trained one where the main job has left it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import scverse_plugin
from recipe.cello1.engine import EngineError
from scverse_plugin._cli import serve_command
from scverse_plugin.get import cello1_df
from tests.plugin.toy import TYPES, toy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
OPTIONS = {"n_top_genes": 3, "n_votes": 6, "max_tokens": 120, "min_support": 0, "puzzle_size": 3, "progress": False}
LENGTH = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("vllm")
    from tests.recipe.toy_model import build_toy_model

    return str(build_toy_model(tmp_path_factory.mktemp("model"), context=LENGTH))


@pytest.fixture(scope="module")
def in_process(model):
    adata = toy()
    scverse_plugin.tl.annotate(
        adata, TYPES, groupby="leiden", model=model, engine_options={"max_model_len": LENGTH}, **OPTIONS
    )
    return adata


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(model, port):
    more = ["--max-model-len", str(LENGTH), "--enforce-eager", "--dtype", "float32", "--no-enable-chunked-prefill"]
    command = serve_command(Path(model), port=port, name="toy", more=more)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    run = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]
    server = subprocess.Popen(
        run, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 900
        while True:
            assert server.poll() is None, "the server has stopped"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the server does not come up"
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", server
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            pass
        kill(server)


def kill(server):
    """Kill the server with its engine, which would outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_vllm_in_process_gives_legal_answers(in_process):
    traces = cello1_df(in_process, table="traces")
    assert (traces["status"] == "ok").all()
    assert in_process.uns["cello1"]["params"]["constraint"] == "exact"
    for answer, candidates in zip(traces["answer"], traces["candidates"], strict=True):
        assert len(set(answer)) == len(answer) and set(answer) <= set(candidates)


def test_server_gives_the_same_labels_and_can_die(model, in_process, tmp_path):
    cache = tmp_path / "answers.jsonl"
    options = {"groupby": "leiden", "engine": "openai", "model": "toy", **OPTIONS}
    port = free_port()
    long = options | {"n_votes": 60, "max_concurrency": 1, "engine_options": {"retries": 0}, "cache": cache}
    with served(model, port) as (url, server):
        adata = toy()
        scverse_plugin.tl.annotate(adata, TYPES, base_url=url, **options)
        assert cello1_df(adata)["best"].tolist() == cello1_df(in_process)["best"].tolist()
        assert cello1_df(adata, table="traces")["answer"].tolist() == (
            cello1_df(in_process, table="traces")["answer"].tolist()
        )

        # Killed half way: what is done is kept.
        def kill_after(n):
            while not (cache.is_file() and cache.read_bytes().count(b"\n") >= n):
                time.sleep(0.005)
            kill(server)

        killer = threading.Thread(target=kill_after, args=(3,), daemon=True)
        killer.start()
        with pytest.raises(EngineError, match=r"are kept in .*run the same call again, it asks only what is missing"):
            scverse_plugin.tl.annotate(toy(), TYPES, base_url=url, **long)
        killer.join()
    before = cache.read_bytes()
    done = before.count(b"\n")
    assert done >= 3
    with served(model, port) as (url, _):
        scverse_plugin.tl.annotate(adata, TYPES, base_url=url, **long)
    traces = cello1_df(adata, table="traces")
    assert done <= traces["cached"].sum() < len(traces)
    # What was there stays, and no puzzle is asked twice.
    assert cache.read_bytes().startswith(before)
    keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    assert len(set(keys)) == len(keys) > done


@pytest.fixture(scope="module")
def embedded():
    """Model and data of the main job: CELLO1_EMBEDDED, or outputs/embedded."""
    folder = Path(os.environ.get("CELLO1_EMBEDDED", ROOT / "outputs" / "embedded"))
    found = folder / "model"
    if not (found / "config.json").is_file() or not (folder / "data" / "manifest.json").is_file():
        pytest.skip("the main job has not left a model: bash recipe/cello1/run_grpo.sh")
    return found, folder / "data"


def test_example_script_on_the_trained_model(embedded, tmp_path):
    pytest.importorskip("vllm")
    model, data = embedded
    command = [sys.executable, "examples/annotate_pbmc.py", "--model", str(model), "--data", str(data)]
    found = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 0, found.stderr
    assert "| consensus of puzzles |" in found.stdout and (tmp_path / "report.html").is_file()


def test_notebook_on_the_trained_model(embedded, tmp_path):
    pytest.importorskip("vllm")
    import nbclient
    import nbformat

    model, data = embedded
    notebook = nbformat.read(ROOT / "examples" / "annotate_pbmc.ipynb", as_version=4)
    environment = {
        "CELLO1_MODEL": str(model),
        "CELLO1_DATA": str(data),
        "CELLO1_REPORT": str(tmp_path / "report.html"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    # Under pytest a kernel has no real standard output, which vLLM needs; in Jupyter it has.
    plain = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    client.execute(env={**plain, **environment})
    assert (tmp_path / "report.html").is_file()
