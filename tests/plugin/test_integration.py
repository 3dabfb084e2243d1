"""Real vLLM and a real server, with a tiny untrained model; the examples with the trained one where there is one."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import scverse_plugin
from recipe.cello1.engines.protocol import EngineError
from scverse_plugin._commands.serve import serve_command
from scverse_plugin.get import cello1_df
from tests.helpers.processes import ROOT, environment, free_port, kill_group, served
from tests.helpers.toy_adata import TYPES, toy

# One group: what vLLM has answered in process is made once.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800), pytest.mark.xdist_group("plugin")]
OPTIONS = {"n_top_genes": 3, "n_votes": 6, "max_tokens": 120, "min_support": 0, "puzzle_size": 3, "progress": False}
OPTIONS["support"] = "votes"  # what a server can give as well
LENGTH = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("vllm")
    from tests.helpers.toy_model import build_toy_model

    return str(build_toy_model(tmp_path_factory.mktemp("model"), context=LENGTH))


@pytest.fixture(scope="module")
def in_process(model):
    adata = toy()
    scverse_plugin.tl.annotate(
        adata, TYPES, groupby="leiden", model=model, engine_options={"max_model_len": LENGTH}, **OPTIONS
    )
    return adata


def serve(model, port, folder):
    command = serve_command(Path(model), port=port, name="toy", more=["--max-model-len", str(LENGTH)])
    return served(command, folder / "server.log")


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
    with serve(model, port, tmp_path) as (url, server):
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
            kill_group(server)

        killer = threading.Thread(target=kill_after, args=(3,), daemon=True)
        killer.start()
        with pytest.raises(EngineError, match=r"are kept in .*run the same call again, it asks only what is missing"):
            scverse_plugin.tl.annotate(toy(), TYPES, base_url=url, **long)
        killer.join()
    before = cache.read_bytes()
    done = before.count(b"\n")
    assert done >= 3
    with serve(model, port, tmp_path) as (url, _):
        scverse_plugin.tl.annotate(adata, TYPES, base_url=url, **long)
    traces = cello1_df(adata, table="traces")
    assert done <= traces["cached"].sum() < len(traces)
    # What was there stays, and no puzzle is asked twice.
    assert cache.read_bytes().startswith(before)
    keys = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    assert len(set(keys)) == len(keys) > done


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Model and data of the main job on blood cells (CELLO1_EMBEDDED, or outputs/embedded), or an untrained one."""
    folder = Path(os.environ.get("CELLO1_EMBEDDED", ROOT / "outputs" / "embedded"))
    if (folder / "model" / "config.json").is_file() and (folder / "data" / "manifest.json").is_file():
        return folder / "model", folder / "data"
    folder = tmp_path_factory.mktemp("embedded")
    cells, data, model = folder / "cells", folder / "data", folder / "model"
    options = ["--sizes", "3-5", "--top-genes", "12", "--suspension", "any", "--test-donors", "part_5"]
    for command in (
        ["cells", "pbmc", "--out", cells],
        ["prepare", cells, "--out", data, "--per-size", "0", *options],
        ["tiny-model", "--data", data / "train" / "train_data.json", "--out", model],
    ):
        words = [sys.executable, "-m", "recipe.cello1", *map(str, command)]
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment())
        assert found.returncode == 0, found.stderr
    return model, data


def test_example_script(embedded, tmp_path):
    pytest.importorskip("vllm")
    model, data = embedded
    command = [sys.executable, "examples/annotate_pbmc.py", "--model", str(model), "--data", str(data)]
    found = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert found.returncode == 0, found.stderr
    assert "| consensus of puzzles |" in found.stdout and (tmp_path / "report.html").is_file()


def test_notebook(embedded, tmp_path):
    pytest.importorskip("vllm")
    import nbclient
    import nbformat

    model, data = embedded
    notebook = nbformat.read(ROOT / "examples" / "annotate_pbmc.ipynb", as_version=4)
    variables = {
        "CELLO1_MODEL": str(model),
        "CELLO1_DATA": str(data),
        "CELLO1_REPORT": str(tmp_path / "report.html"),
    }
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    # Under pytest a kernel has no real standard output, which vLLM needs; in Jupyter it has.
    plain = {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}
    client.execute(env={**plain, **variables})
    assert (tmp_path / "report.html").is_file()
