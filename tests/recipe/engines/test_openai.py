import argparse
import asyncio
import inspect
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from queue import SimpleQueue

import pytest

from recipe.cello1.engines.openai import OpenAIEngine
from recipe.cello1.engines.options import add_asking, add_engines, engine_options
from recipe.cello1.engines.protocol import CANDIDATES_ARG, EngineError, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.inference.predict import predict
from recipe.cello1.task.answer import format_answer, parse_answer
from recipe.cello1.task.prompt import messages
from tests.helpers.stub_server import Server, completion, error
from tests.helpers.toy_model import toy_puzzles

PUZZLES = toy_puzzles(6)
SAMPLING = Sampling(temperature=0.7, max_tokens=50)


def requests(n=6, constrain=False):
    return [
        Request(messages(p), i, *((p.candidates, p.n_cells) if constrain else ())) for i, p in enumerate(PUZZLES[:n])
    ]


@contextmanager
def engine_on(server, **options):
    with start_engine("openai", "m", base_url=server.url, **options) as engine:
        yield engine


def answers(server, asked=None, sampling=SAMPLING, **options):
    asked = requests() if asked is None else asked
    with engine_on(server, **options) as engine:
        found = dict(engine.generate(iter(asked), sampling))
    assert sorted(found) == list(range(len(asked)))
    return [found[i] for i in range(len(asked))]


class SlowToEnd(SimpleQueue):
    """Keeps the thread that fills it alive when its event loop is closed already."""

    def put(self, item):
        super().put(item)
        if item is None:
            time.sleep(0.3)


def test_the_end_of_the_loop_is_no_failure(monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai.SimpleQueue", SlowToEnd)
    with Server(lambda body, n: "x") as server:
        assert [a.text for a in answers(server, requests(2))] == ["x", "x"]


def test_requests_and_answers():
    with Server(lambda body, n: f"re: {body['messages'][-1]['content'].splitlines()[-1]} {body['seed']}") as server:
        found = answers(server)
    assert [a.text for a in found] == [f"re: {puzzle.candidates[-1]} {i}" for i, puzzle in enumerate(PUZZLES)]
    assert (found[0].tokens, found[0].prompt_tokens, found[0].finish_reason, found[0].logprob) == (7, 9, "stop", None)
    body = next(body for body in server.bodies if body["seed"] == 0)
    assert body["messages"] == messages(PUZZLES[0])
    assert {key: body[key] for key in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "m",
        "temperature": 0.7,
        "top_p": 1.0,
        "max_tokens": 50,
    }


def test_logprobs_are_summed():
    with Server(lambda body, n: completion("x", logprobs=[-0.5, -1.0])) as server:
        found = answers(server, requests(1), Sampling(logprobs=True))
    assert found[0].logprob == -1.5
    assert server.bodies[0]["logprobs"] is True
    assert "seed" in server.bodies[0]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_taken_out_by_the_server_is_put_back(name):
    reply = completion("\n\n<answer>B cell | T cell</answer>", **{name: "MS4A1 is high."})
    with Server(lambda body, n: reply) as server:
        text = answers(server, requests(1))[0].text
    assert text == "<think>MS4A1 is high.</think>\n<answer>B cell | T cell</answer>"
    with Server(lambda body, n: completion("a</think>\n<answer>b | c</answer>")) as server:
        assert parse_answer(answers(server, requests(1), think_opened=True)[0].text).ok
        assert not parse_answer(answers(server, requests(1))[0].text).ok


@pytest.mark.parametrize("content", [None, "", "\n"])
@pytest.mark.parametrize(
    ("said", "reason", "read"),
    [
        ("<think>a</think>\n<answer>B cell | T cell</answer>", "stop", "a"),
        ("<think>a</think>\n<answer>B cell | T cell</answer>\n", "stop", "a"),
        ('{"reasoning": "j", "cell_1": "B cell", "cell_2": "T cell"}', "stop", "j"),
        ('```json\n{"cell_1": "B cell", "cell_2": "T cell"}\n```', "stop", ""),
        ("<think>a</think>\n<answer>B cell | T cell</answer>", "length", None),  # may be what it thought of first
        ("It may be <answer>B cell | T cell</answer>, but no", "stop", None),
    ],
)
def test_an_answer_that_a_server_takes_for_reasoning_is_read(content, said, reason, read):
    reply = completion(content, reason, reasoning_content=said)
    asked = [replace(requests(1)[0], candidates=("B cell", "T cell"), n_answers=2)]
    with Server(lambda body, n: reply) as server:
        [found] = answers(server, asked, constrained=True)
    parsed = parse_answer(found.text)
    assert parsed.ok == (read is not None)
    if parsed.ok:
        assert (parsed.items, parsed.reasoning) == (("B cell", "T cell"), read)


def test_what_the_template_has_opened_is_put_before_answers_that_lack_it():
    texts = ["a</think>\n<answer>B</answer>", "<think>a</think>\n<answer>B</answer>", "cut of"]
    with Server(lambda body, n: texts[n]) as server:
        found = answers(server, requests(3), think_opened=True, concurrency=1)
    assert [answer.text for answer in found] == ["<think>" + texts[0], texts[1], "<think>" + texts[2]]


def test_the_command_reaches_every_option_of_the_engine():
    taken = set(inspect.signature(OpenAIEngine).parameters) - {"model", "constrained"}
    parser = argparse.ArgumentParser()
    add_asking(parser)
    add_engines(parser)
    flags = ["--base-url", "u", "--concurrency", "3", "--timeout", "4", "--retries", "5", "--longest-wait", "6"]
    args = parser.parse_args(["--model", "m", "--engine", "openai", *flags, "--server", "vllm", "--think-opened"])
    options = engine_options(args)
    assert set(options) == taken
    assert (options["longest_wait"], options["server"], options["think_opened"]) == (6.0, "vllm", True)
    assert engine_options(parser.parse_args(["--model", "m", "--engine", "openai"])) == {}


def test_key_comes_from_the_environment_and_is_never_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Server(lambda body, n: error(400, "you sent sk-very-secret")) as server:
        with engine_on(server) as engine:
            predict(engine, PUZZLES, tmp_path / "p.jsonl", sampling=SAMPLING, progress=False)
        assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
        written = (tmp_path / "p.jsonl").read_text()
        assert "secret" not in written
        assert "you sent ***" in written
    with Server(models_status=401) as server, pytest.raises(EngineError, match="refuses the key") as caught:
        answers(server)
    assert "secret" not in str(caught.value)


def test_no_key_is_needed_for_local_servers(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as server:
        assert answers(server, requests(1))[0].text == "hello"


def test_concurrency_is_bounded_and_used():
    def slow(body, n):
        time.sleep(0.05)
        return "x"

    with Server(slow) as server:
        answers(server, requests() * 4, concurrency=3)
    assert server.most_under_way == 3
    assert len(server.bodies) == 24


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_failures_that_pass_are_tried_again(status, monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._FIRST_DELAY", 0.01)
    with Server(lambda body, n: error(status) if n < 3 else "x") as server:
        assert answers(server, requests(1))[0].text == "x"
    assert len(server.bodies) == 4


@pytest.mark.slow
def test_retries_are_bounded(monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._FIRST_DELAY", 0.01)
    with Server(lambda body, n: error(503, "still busy")) as server:
        found = answers(server, requests(1), retries=2)
    assert len(server.bodies) == 3
    assert "still busy" in found[0].error
    assert "after 2 retries" in found[0].error


@pytest.mark.parametrize("as_date", [False, True])
@pytest.mark.slow
def test_retry_after_is_honoured_by_all_requests(as_date, monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._FIRST_DELAY", 0.01)

    def reply(body, n):
        wait = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
        return error(429, headers=[("Retry-After", wait)]) if n == 0 else "x"

    with Server(reply) as server:
        found = answers(server, requests(3), concurrency=1)
    assert [a.text for a in found] == ["x"] * 3
    assert server.times[1] - server.times[0] > 0.9


def test_too_long_a_wait_fails():
    with Server(lambda body, n: error(429, headers=[("Retry-After", "3600")])) as server:
        found = answers(server, requests(1), longest_wait=10)
    assert "asks to wait 3600 s" in found[0].error
    assert len(server.bodies) == 1


def test_one_bad_request_fails_alone():
    with Server(lambda body, n: error(400, "too long") if body["seed"] == 2 else "x") as server:
        found = answers(server)
    assert [isinstance(a, Failure) for a in found] == [False, False, True, False, False, False]
    assert "too long" in found[2].error


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_what_no_request_gets_past_stops_the_run(status):
    with Server(lambda body, n: error(status, "no such thing")) as server:
        found = answers(server, requests() * 10, concurrency=2)
    assert all("no such thing" in a.error for a in found)
    assert all(("set OPENAI_API_KEY" in a.error) == (status in (401, 403)) for a in found)
    assert len(server.bodies) <= 2


def test_a_spent_quota_is_not_asked_again_and_again():
    spent = (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, ())
    with Server(lambda body, n: spent) as server:
        found = answers(server, requests() * 10, concurrency=2)
    assert all("exceeded your current quota" in a.error for a in found) and len(server.bodies) <= 2


@pytest.mark.parametrize("status", [404, 405])
def test_a_page_in_place_of_an_api_is_said_so(status):
    with Server(lambda body, n: (status, b"<html>Method Not Allowed</html>", ())) as server:
        found = answers(server, requests(2), concurrency=1)
    assert re.search("no address of an API; most end with /v1", found[0].error)


def test_time_out(monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._FIRST_DELAY", 0.01)
    with Server(lambda body, n: time.sleep(1.5) or "x" if n == 0 else "x") as server:
        assert answers(server, requests(1), timeout=0.5)[0].text == "x"
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (b"<html>proxy</html>", "Error|reply"),
        ({"object": "chat.completion", "choices": []}, "no usable choices"),
        (completion("x", finish_reason="content_filter"), "content_filter"),
    ],
)
def test_odd_replies_are_failures(reply, match):
    with Server(lambda body, n: reply) as server:
        found = answers(server, requests(2), retries=0)
    assert all(isinstance(a, Failure) for a in found)
    assert re.search(match, found[0].error)


@pytest.mark.parametrize(
    "said",
    [
        "use 'max_completion_tokens' instead",
        "'max_tokens' is not supported with this model",
        'Unsupported parameter: "max_tokens"',
    ],
)
def test_the_other_name_of_the_limit(said):
    def reply(body, n):
        return "x" if "max_completion_tokens" in body else error(400, said)

    with Server(reply) as server:
        assert {a.text for a in answers(server, concurrency=1)} == {"x"}
    assert ["max_tokens" in body for body in server.bodies] == [True] + [False] * 6


@pytest.mark.parametrize("concurrency", [1, 2, 32])
@pytest.mark.slow
def test_refusals_are_learnt_by_every_request_under_way(concurrency, caplog):
    together = threading.Barrier(concurrency)

    def reply(body, n):
        if n < concurrency:
            together.wait(10)  # all are under way before the first refusal comes
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return error(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        if "seed" in body:
            return error(422, "seed: parameter is not supported")
        return "x"

    with Server(reply) as server, engine_on(server, concurrency=concurrency, retries=0) as engine:
        found = dict(engine.generate(requests() * 8, SAMPLING))
    assert {getattr(result, "text", result) for result in found.values()} == {"x"} and len(found) == 48
    assert engine.refused == {"max_tokens", "temperature", "seed"}
    assert server.bodies[-1]["max_completion_tokens"] == SAMPLING.max_tokens
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("`temperature` and `top_p` cannot both be specified for this model. Please use only one.", "top_p"),
        ("`temperature` is deprecated for this model.", "temperature"),
        ("This model does not support response format `json_schema`. See supported models.", "response_format"),
        ('Invalid JSON payload received. Unknown name "seed": Cannot find field.', "seed"),
        ("Invalid schema for response_format 'matching': more than 100 enum values", "response_format"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, "seed"),
        ({"error": "temperature is not supported"}, "temperature"),
        ({"object": "error", "message": "top_p is not supported"}, "top_p"),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_refusals_as_providers_word_them(said, refused, status):
    def reply(body, n):
        refusal = error(status, said) if isinstance(said, str) else (status, said)
        return refusal if refused in body else "x"

    asked = requests(4, constrain=True)
    with Server(reply) as server, engine_on(server, constrained="prefer", retries=0) as engine:
        found = dict(engine.generate(asked, SAMPLING))
        assert engine.refused == {refused}
    assert {getattr(result, "text", result) for result in found.values()} == {"x"}


@pytest.mark.parametrize(
    "said",
    ["temperature must be between 0 and 1", "max_tokens is too large: this model supports at most 4096 tokens"],
)
def test_a_bad_value_is_no_refusal_of_the_parameter(said):
    with Server(lambda body, n: error(400, said)) as server:
        found = answers(server, requests(1), retries=0)
    assert said in found[0].error and len(server.bodies) == 1


@pytest.mark.parametrize("body", [{"detail": "no room for 3000 tokens"}, {"error": "no room for 3000 tokens"}])
def test_what_a_server_says_is_told_in_whatever_shape(body):
    with Server(lambda asked, n: (400, body)) as server:
        assert "no room for 3000 tokens" in answers(server, requests(1), retries=0)[0].error
    failed = completion("")
    failed["choices"][0] |= {"finish_reason": "error", "error": {"message": "upstream is down"}}
    with Server(lambda asked, n: failed) as server:
        assert "upstream is down" in answers(server, requests(1), retries=0)[0].error


@pytest.mark.parametrize(
    ("said", "reason"),
    [("eos", "stop"), ("STOP", "stop"), ("eos_token", "stop"), ("end_turn", "stop"), ("MAX_TOKENS", "length")],
)
def test_other_words_for_the_end_of_an_answer(said, reason):
    with Server(lambda body, n: completion("x", finish_reason=said)) as server:
        assert {(a.text, a.finish_reason) for a in answers(server, requests(2), retries=0)} == {("x", reason)}


@pytest.mark.parametrize("thought", [[{"type": "text", "text": "LYZ is high."}], "LYZ is high."])
def test_content_in_parts(thought):
    parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "a | "}, {"type": "text", "text": "b"}]
    with Server(lambda body, n: completion(parts)) as server:
        assert answers(server, requests(1), retries=0)[0].text == "<think>LYZ is high.</think>\na | b"


@pytest.mark.parametrize(
    ("listed", "model"),
    [("models/m", "m"), ("m", "models/m"), ("m:latest", "m"), ("owner/m", "owner/m:nitro"), ("m:8b", "m:8b")],
)
def test_names_that_a_server_lists_in_another_form(listed, model):
    with Server(models=("other", listed)) as server:
        with start_engine("openai", model, base_url=server.url) as engine:
            assert dict(engine.generate(requests(1), SAMPLING))[0].text == "hello"
        assert server.bodies[0]["model"] == model
        for wrong in ("n", f"x{model}"):
            with pytest.raises(EngineError, match=f"has no '{wrong}'"):
                start_engine("openai", wrong, base_url=server.url)


def test_of_many_models_the_like_ones_are_shown():
    names = [f"vendor{i}/model-{i}" for i in range(40)]
    with Server(models=(*names, "zeta/qwen3-8b")) as server, pytest.raises(EngineError, match="it has zeta/qwen3-8b, "):
        start_engine("openai", "qwen3:8b", base_url=server.url)


def test_a_schema_that_is_refused_is_left_out_only_where_that_is_wanted():
    def reply(body, n):
        return error(400, "This response_format type is unavailable now") if "response_format" in body else "free"

    with Server(reply) as server:
        assert answers(server, requests(2, True), constrained="prefer")[0].text == "free"
        assert "unavailable" in answers(server, requests(2, True), constrained=True)[0].error


def test_fenced_json_and_the_reasoning_of_the_server():
    asked = requests(1, constrain=True)
    cells = {f"cell_{i}": name for i, name in enumerate(asked[0].candidates, start=1)}
    plain = json.dumps({"reasoning": "own", **cells})
    bare = f"Markers {{MS4A1}} say:\n```json\n{plain}\n```"
    within = json.dumps({"reasoning": "<think>own</think>", **cells})
    for text in (
        plain,
        f"Here it is:\n```json\n{plain}\n```",
        f"```\n{plain}\n```\nDone.",
        f"So:\n{plain}\nDone.",
        bare,
        within,
    ):
        with Server(lambda body, n, text=text: completion(text, reasoning="<think>first")) as server:
            (found,) = answers(server, asked, constrained=True)
        assert found.text == format_answer(asked[0].candidates, "first\n\nown")


@pytest.mark.parametrize("opened", ["<think>", ""])
def test_json_behind_the_reasoning_of_the_model(opened):
    asked = requests(1, constrain=True)
    cells = {f"cell_{i}": name for i, name in enumerate(asked[0].candidates, start=1)}
    text = f"{opened}\nMarkers {{MS4A1}}.\n</think>\n\n{json.dumps({'reasoning': 'own', **cells})}"
    with Server(lambda body, n: text) as server:
        (found,) = answers(server, asked, constrained=True)
    assert found.text == format_answer(asked[0].candidates, "Markers {MS4A1}.\n\nown")


def test_an_error_with_the_status_of_success_is_told():
    reply = {"error": {"message": "Provider returned error", "code": 502, "metadata": {"raw": "overloaded"}}}
    with Server(lambda body, n: reply) as server:
        assert "Provider returned error" in answers(server, requests(1), retries=0)[0].error


def test_constraint_on_vllm():
    def reply(body, n):
        types = body["vllm_xargs"][CANDIDATES_ARG]
        return format_answer(types)

    with Server(reply, owner="vllm") as server:
        with engine_on(server, constrained=True) as engine:
            assert engine.constraint == "exact"
        found = answers(server, requests(constrain=True), Sampling(reasoning_budget=99), constrained=True)
    assert all(parse_answer(a.text).ok for a in found)
    assert server.bodies[0]["vllm_xargs"]["cello1_reasoning_budget"] == 99
    assert server.bodies[0]["vllm_xargs"]["cello1_n_answers"] == 3


def test_a_server_that_does_not_constrain_is_found_out():
    texts = ["so, a and b", format_answer(("B cell", "B cell", "NK cell")), format_answer(("x", "y", "z"))]
    with Server(lambda body, n: texts[n % 3], owner="vllm") as server:
        found = answers(server, requests(constrain=True), constrained=True)
    assert all("did not keep to the constraint" in a.error for a in found)


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (("<think>a b", "length"), "no room for the whole answer; give more max_tokens"),
        (("a</think>\n<answer>x</answer>", "stop"), "lacks <think>, .* think_opened"),
        (("<think>a</think>\n<answer>x</answer>", "stop"), "--logits-processors"),
    ],
)
def test_an_illegal_answer_is_blamed_on_what_causes_it(reply, match):
    asked = [Request(messages(PUZZLES[0]), 1, PUZZLES[0].candidates, 3)]
    with Server(lambda body, n: completion(*reply), owner="vllm") as server:
        assert re.search(match, answers(server, asked, constrained=True)[0].error)


def test_constraint_on_other_servers():
    def reply(body, n):
        schema = body["response_format"]["json_schema"]["schema"]
        names = schema["properties"]["cell_1"]["enum"]
        cells = {f"cell_{i}": name for i, name in enumerate(names, start=1)}
        return json.dumps({"reasoning": "GNLY <answer> high", **cells}) if n else "no JSON"

    with Server(reply) as server:
        with engine_on(server, constrained=True) as engine:
            assert engine.constraint == "candidates"
        found = answers(server, requests(constrain=True), concurrency=1, constrained=True)
    assert found[0].text == "no JSON"
    parsed = parse_answer(found[1].text)
    assert parsed.ok
    assert parsed.items == PUZZLES[1].candidates
    assert parsed.reasoning == "GNLY  high"


def test_a_caller_that_stops_early_stops_the_requests():
    with Server(lambda body, n: time.sleep(0.05) or "x") as server, engine_on(server, concurrency=2) as engine:
        for _ in engine.generate(requests() * 50, SAMPLING):
            break
        asked = len(server.bodies)
        time.sleep(0.3)
        assert len(server.bodies) <= asked + 2 < 20
        assert threading.active_count() < 20
        assert len(dict(engine.generate(requests(2), SAMPLING))) == 2


def test_errors_of_the_callers_own_requests_reach_the_caller():
    def broken():
        yield requests(1)[0]
        raise KeyError("mine")

    with Server() as server, engine_on(server) as engine, pytest.raises(KeyError, match="mine"):
        list(engine.generate(broken(), SAMPLING))


def test_works_inside_a_running_event_loop():
    async def notebook():
        return answers(server, requests(2))

    with Server() as server:
        assert [a.text for a in asyncio.run(notebook())] == ["hello"] * 2


def test_predict_resumes_after_failures(tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._FIRST_DELAY", 0.01)
    down = True
    with (
        Server(lambda body, n: error(500) if down and n % 2 else "x") as server,
        engine_on(server, retries=0) as engine,
    ):
        first = predict(engine, PUZZLES, tmp_path / "p.jsonl", sampling=SAMPLING, progress=False)
        down = False
        second = predict(engine, PUZZLES, tmp_path / "p.jsonl", sampling=SAMPLING, progress=False)
    assert (first.failed, second.answered, second.failed) == (3, 3, 0)
    assert [record["prediction"] for record in read_items(tmp_path / "p.jsonl")] == ["x"] * 6


def test_start_refuses_what_cannot_work(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="base_url is missing"):
        start_engine("openai", "m")
    with pytest.raises(EngineError, match="cannot reach http://127.0.0.1:9/v1"):
        start_engine("openai", "m", base_url="http://127.0.0.1:9/v1")
    with Server(models=("a", "b")) as server, pytest.raises(EngineError, match="has no 'm'; it has a, b"):
        answers(server)
    with Server(models_status=404) as server:  # no list of models is no reason to stop
        assert answers(server, requests(1))[0].text == "hello"
    for option in ({"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"server": "tgi"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            start_engine("openai", "m", base_url="http://127.0.0.1:9/v1", **option)
    with Server() as server:
        engine = start_engine("openai", "m", base_url=server.url)
        engine.close()
        with pytest.raises(EngineError, match="is closed"):
            list(engine.generate([], SAMPLING))
