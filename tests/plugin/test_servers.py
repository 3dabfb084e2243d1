"""Servers as they are, through ``tl.annotate``; and the page that begins with one."""

import json
import shlex
import threading

import anndata as ad
import pytest

import scverse_plugin
from recipe.cello1.__main__ import main
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.task.answer import parse_answer
from recipe.cello1.task.prompt import parse_user
from scverse_plugin.get import cello1_df
from tests.helpers.readme import blocks
from tests.helpers.stub_server import Server, completion, error
from tests.helpers.toy_adata import TYPES, by_marker, toy
from tests.recipe.engines.test_odd_replies import odd_replies

PAGE = "scverse_plugin/README.md"


def shaped(text, n):
    """The n-th answer in one of the shapes that servers give."""
    parsed = parse_answer(text)
    cells = {f"cell_{i}": name for i, name in enumerate(parsed.items, start=1)}
    answer = f"<answer>{' | '.join(parsed.items)}</answer>"
    return (
        text,
        f"```json\n{json.dumps({'reasoning': 'in JSON', **cells})}\n```",  # fenced
        f"I think so.\n{answer}",  # no <think>
        completion(answer, reasoning_content="in a field of its own"),
        completion(answer, reasoning="in another field"),
    )[n % 5]


@pytest.mark.parametrize("concurrency", [1, 2, 32])
def test_refusals_and_shapes_lose_no_answer(concurrency):
    first = threading.Barrier(min(concurrency, 20))

    def reply(body, n):
        if n < first.parties:
            first.wait(20)  # all are under way before the first refusal comes
        if refused := [name for name in ("max_tokens", "temperature") if name in body]:  # all of them at once
            instead = "; use 'max_completion_tokens' instead" if "max_tokens" in refused else ""
            return error(400, f"Unsupported parameters with this model: {', '.join(refused)}{instead}")
        return shaped(by_marker(parse_user(body["messages"][-1]["content"])), n)

    adata = toy(n_per_group=30)
    with Server(reply) as server:
        scverse_plugin.tl.annotate(
            adata,
            TYPES,
            groupby="leiden",
            n_votes=20,
            cells_per_group=20,
            engine="openai",
            model="m",
            base_url=server.url,
            max_concurrency=concurrency,
            engine_options={"retries": 0},
            cache=None,
            progress=False,
        )
    found = cello1_df(adata)
    assert adata.uns["cello1"]["checks"]["n_errors"] == 0 and (found["failures"] == 0).all()
    assert found["label"].tolist() == TYPES and (found["support"] == 1).all()
    reasoning = set(cello1_df(adata, table="traces")["reasoning"])
    assert {"in JSON", "I think so.", "in a field of its own", "in another field"} <= reasoning
    assert all("max_completion_tokens" in body for body in server.bodies[-5:])


def test_odd_replies_are_never_kept(tmp_path):
    odd = list(odd_replies(60, seed=2))
    asked = []

    def annotate(reply):
        adata, cache = toy(n_per_group=30), tmp_path / "cache.jsonl"
        options = dict(engine="openai", model="m", engine_options={"retries": 0, "longest_wait": 1}, cache=cache)
        with Server(reply) as server:
            scverse_plugin.tl.annotate(
                adata,
                TYPES,
                groupby="leiden",
                n_votes=40,
                base_url=server.url,
                on_error="skip",
                progress=False,
                **options,
            )
        asked.append(len(server.bodies))
        return adata.uns["cello1"]["checks"]["n_errors"], read_items(cache) if cache.exists() else []

    failed, kept = annotate(lambda body, n: odd[n])
    assert failed == asked[0] > 20 and kept == []
    failed, kept = annotate(lambda body, n: by_marker(parse_user(body["messages"][-1]["content"])))
    assert failed == 0 and len(kept) == asked[1] == asked[0]


def test_the_page_leads_to_a_report_in_two_commands(tmp_path, monkeypatch):
    """What the first recipe of the page says, word for word, with the address of a stub."""
    block = next(block.text for block in blocks(PAGE) if "11434" in block.text)
    lines = block.replace("\\\n", " ").splitlines()
    install, pull, annotate = map(shlex.split, lines)
    assert install == ["pip", "install", ".[annotate]"] and pull[:2] == ["ollama", "pull"]
    assert pull[2] == annotate[annotate.index("--model") + 1]
    adata = toy(types=["B cell", "NK cell", "monocyte"])
    adata.write_h5ad(tmp_path / "in.h5ad")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def reply(body, n):
        return by_marker(parse_user(body["messages"][-1]["content"]))

    with Server(reply, models=[pull[2]]) as server:
        words = [server.url if word == "http://127.0.0.1:11434/v1" else word for word in annotate]
        assert words != annotate and words[0] == "cello1"
        assert main(words[1:]) == 0
    found = ad.read_h5ad("out.h5ad")
    assert found.obs["cello1"].astype(str).tolist() == adata.obs["truth"].astype(str).tolist()
    assert "monocyte" in (tmp_path / "out.html").read_text()
