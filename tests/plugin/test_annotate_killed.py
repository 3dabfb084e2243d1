"""A run through a server that is killed (SIGKILL) again and again ends with the result of an undisturbed one."""

import re
import time

import anndata as ad
import pytest

from recipe.cello1.formats.atomic import read_items
from recipe.cello1.task.prompt import parse_user
from tests.helpers.kills import KILLS, kill_scenario
from tests.helpers.stub_server import Server
from tests.helpers.toy_adata import by_marker, toy

PUZZLES = 30
SCENARIO = """
import contextlib, openai, recipe.cello1.engines.openai, scverse_plugin  # once for all

url = (folder / "url").read_text()


def annotate(name, *more):
    options = ["--groupby", "leiden", "--cell-types", "truth", "--temperature", "1", "--max-concurrency", "1"]
    server = ["--engine", "openai", "--model", "m", "--base-url", url, "--no-constrained"]
    place = ["-o", str(folder / f"{name}.h5ad"), "--cache", str(folder / f"{name}.jsonl"), "--n-votes", "PUZZLES"]
    return lambda: main(["annotate", str(folder / "in.h5ad"), *place, *options, *server, *more])


def look():
    path = folder / "killed.jsonl"
    return path.read_bytes().count(b"\\n") if path.exists() else 0


with contextlib.redirect_stdout(None):
    annotate("none", "--dry-run")()
seconds = finish(annotate("whole"))
found = kill_often(annotate("killed"), 0.35 * seconds, look)
finish(annotate("killed"))
(folder / "found.json").write_text(json.dumps([found, at_once(annotate("both"))]))
""".replace("PUZZLES", str(PUZZLES))


@pytest.mark.integration
def test_twenty_kills_lose_and_repeat_nothing(tmp_path):
    toy(n_per_group=5, donors=1).write_h5ad(tmp_path / "in.h5ad")

    def reply(body, n):
        time.sleep(0.005)
        puzzle = parse_user(body["messages"][-1]["content"])
        return by_marker(puzzle).replace("<think>", f"<think>seed {body['seed']} ")

    with Server(reply) as server:
        (tmp_path / "url").write_text(server.url)
        kept, codes = kill_scenario(SCENARIO, tmp_path)
        asked = [body["seed"] for body in server.bodies]
    assert kept == sorted(kept) and len(set(kept)) >= 3  # they died in the middle of it
    assert len(set(asked)) == PUZZLES
    assert codes == [0, 1]  # of two at once one works, and one does not
    assert len(asked) <= 3 * PUZZLES + len(kept)  # only what was under way is asked again
    texts = [record["text"] for record in read_items(tmp_path / "killed.jsonl")]
    assert sorted(re.search(r"seed (\d+)", text)[1] for text in texts) == sorted(map(str, set(asked)))
    assert texts and len(kept) >= KILLS
    whole, *others = [ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("whole", "killed", "both")]
    traces = whole.uns["cello1"]["traces"].drop(columns="cached")
    for found in others:
        assert found.obs.equals(whole.obs) and found.uns["cello1"]["groups"].equals(whole.uns["cello1"]["groups"])
        assert found.uns["cello1"]["traces"].drop(columns="cached").equals(traces)
