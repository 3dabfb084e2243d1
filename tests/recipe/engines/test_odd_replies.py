"""Replies of strangers' servers: each odd one is a failure of its request, counted, retried, and never kept."""

import copy
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import time
from contextlib import suppress

import numpy as np
import pytest

from recipe.cello1.engines.openai import OpenAIEngine, _from_json, public_address
from recipe.cello1.engines.protocol import Completion, EngineError, Failure, Request, Sampling
from recipe.cello1.engines.start import start_engine
from recipe.cello1.formats.atomic import read_items
from recipe.cello1.inference.predict import predict
from tests.helpers.stub_server import Server, completion, error
from tests.helpers.toy_model import toy_puzzles

NUMBER = int(os.environ.get("CELLO1_ODD_REPLIES", "300"))
ODD = [None, [], [{"type": "text", "text": "x"}], 7, -1, 1.5, True, {}, {"a": 1}, "text", ""]
ODD += [math.nan, -math.inf, 1e999, 10**400, 2**63, "\ud800", "\0\ufeff", {"a": [[[[{}]]]]}]
# Where in a reply what is put, and which of the values above are in order there.
PLACES = {
    ("choices",): [],
    ("choices", 0): [],
    ("choices", 0, "message"): [],
    ("choices", 0, "message", "content"): [None, "text", "", "\ud800", "\0\ufeff", [{"type": "text", "text": "x"}]],
    ("choices", 0, "finish_reason"): [],
    ("choices", 0, "logprobs"): [None, {}, {"a": 1}, {"a": [[[[{}]]]]}],
    ("choices", 0, "logprobs", "content"): [None, []],
    ("choices", 0, "logprobs", "content", 0): [],
    ("choices", 0, "logprobs", "content", 0, "logprob"): [7, -1, 1.5, 2**63],
    ("usage",): [None, {}, {"a": 1}, {"a": [[[[{}]]]]}],
    ("usage", "completion_tokens"): [7],
    ("usage", "prompt_tokens"): [7],
}
WHOLE = [b"", b"<html>proxy</html>", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'"x"', b"9" * 5000, b"{}"]
WHOLE += [b'{"choices": [', b"\xef\xbb\xbf{}", b'{"choices":' * 20_000, json.dumps({}).encode("utf-16")]
HEADERS = ["Mon, 01 Jan 99999999999 00:00:00 GMT", "Mon, 99 Foo 0", "nan", "-5", "Tue", "1e-400"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._FIRST_DELAY", 0.0)


def odd_replies(n, seed=0):
    """By rule: one thing at a time, then two at a time, at random."""
    single = [
        (place, value)
        for place, right in PLACES.items()
        for value in ODD
        if not any(type(value) is type(ok) and value == ok for ok in right)
    ]
    rng = np.random.default_rng(seed)
    for number in range(n):
        kind = number % 8
        if kind == 6:
            yield WHOLE[rng.integers(len(WHOLE))]
        elif kind == 7:
            yield error(
                int(rng.choice([408, 429, 500, 503])), "x", [("Retry-After", HEADERS[rng.integers(len(HEADERS) - 2)])]
            )
        else:
            reply = completion("<answer>poison</answer>", logprobs=[-0.5, -0.25])
            for place, value in itertools.islice((single[i] for i in rng.permutation(len(single))), 1 + number % 2):
                _put(reply, place, value)
            yield json.dumps(reply).encode()


def _put(reply, place, value):
    with suppress(TypeError, KeyError, IndexError):
        for step in place[:-1]:
            reply = reply[step]
        reply[place[-1]] = copy.deepcopy(value)


@pytest.mark.slow
def test_odd_replies_end_no_run_and_are_never_kept(tmp_path):
    odd = list(odd_replies(NUMBER))
    puzzles = toy_puzzles(NUMBER)
    seen = set()

    def reply(body, n):
        text = body["messages"][-1]["content"]
        if text in seen:
            return "fine"
        seen.add(text)
        return odd[len(seen) - 1]

    with Server(reply) as server:
        with start_engine("openai", "m", base_url=server.url, retries=1, concurrency=4) as engine:
            done = predict(engine, puzzles, tmp_path / "p.jsonl", sampling=Sampling(logprobs=True), progress=False)
    assert (done.answered, done.failed) == (NUMBER, 0)
    assert len(server.bodies) == NUMBER + len(seen)
    assert {record["prediction"] for record in read_items(tmp_path / "p.jsonl")} == {"fine"}


@pytest.mark.slow
def test_without_retries_every_odd_reply_is_a_failure_with_a_reason():
    odd = list(odd_replies(200, seed=1))
    with Server(lambda body, n: odd[n]) as server:
        with start_engine("openai", "m", base_url=server.url, retries=0, concurrency=4, longest_wait=1) as engine:
            found = dict(engine.generate([Request([{"role": "user", "content": "x"}])] * 200, Sampling()))
    assert len(found) == 200
    assert all(isinstance(result, Failure) and 0 < len(result.error) < 1200 for result in found.values())


def test_what_is_in_order_is_taken():
    def read(**change):
        reply = completion("x", logprobs=[-1, -0.5]) | change
        return OpenAIEngine._read(engine, json.dumps(reply).encode(), Request([]))

    with Server() as server, start_engine("openai", "m", base_url=server.url) as engine:
        assert read() == Completion("x", "stop", 7, 9, -1.5)
        assert read(usage=None) == Completion("x", "stop", 1, 0, -1.5)


def test_a_slow_drip_is_cut_off_at_the_timeout(monkeypatch):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Drip(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_error(404)

        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.05)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    http.daemon_threads = True
    Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/v1"
    with start_engine("openai", "m", base_url=url, timeout=0.4, retries=1) as engine:
        began = time.monotonic()
        ((_, result),) = engine.generate([Request([{"role": "user", "content": "x"}])], Sampling())
    http.shutdown()
    http.server_close()
    assert result == Failure("no whole answer within 0.4 s (after 1 retries)")
    assert time.monotonic() - began < 4  # the drip takes 5 s


def test_redirects_to_another_host_are_not_followed():
    with Server() as other:
        target = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        with Server(lambda body, n: (307, b"", [("Location", target)])) as server:
            with start_engine("openai", "m", base_url=server.url, retries=0) as engine:
                ((_, result),) = engine.generate([Request([{"role": "user", "content": "secret"}])], Sampling())
    assert other.bodies == []
    assert "the server sends requests on to http://localhost" in result.error


def test_a_page_instead_of_the_list_of_models_and_odd_lists():
    for page in (b"<html>", b"[]", b'{"data": [1, null]}', b'{"data": [{"id": 5}]}', b'{"data": [{"id": ["m"]}, {}]}'):
        with Server(lambda body, n: "x") as server:
            server.http.RequestHandlerClass.do_GET = lambda handler, page=page: handler.send(200, page)
            if b'"id": 5' in page:
                with pytest.raises(EngineError, match="has no 'm'"):
                    start_engine("openai", "m", base_url=server.url)
                continue
            with start_engine("openai", "m", base_url=server.url) as engine:
                assert [r.text for _, r in engine.generate([Request([])], Sampling())] == ["x"]


def test_no_password_is_shown(capfd):
    assert public_address("https://me:pa%20ss@host:8/v1?key=1") == "https://host:8/v1"
    url = "http://me:pa%20ss@127.0.0.1:9/v1"
    with pytest.raises(EngineError, match="cannot reach http://127.0.0.1:9/v1") as caught:
        start_engine("openai", "m", base_url=url)
    with Server(lambda body, n: error(400, "bad me:pa ss and pa%20ss")) as server:
        with start_engine("openai", "m", base_url=server.url.replace("http://", "http://me:pa%20ss@")) as engine:
            ((_, result),) = engine.generate([Request([])], Sampling())
            shown = f"{caught.value} {result.error} {engine.base_url} {capfd.readouterr()}"
    assert "pa ss" not in shown and "pa%20ss" not in shown


# ------------------------------------------------------------------------------------------------- too much of a reply


def endless(handler, status=200):
    """Send for as long as anybody reads, of no length that is said."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.server.sent = 0
    with suppress(OSError):
        while handler.server.sent < 1 << 30:
            handler.wfile.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
            handler.server.sent += 0x4000
    handler.close_connection = True


def long(handler, status=200):
    handler.send(status, json.dumps(completion("x" * (1 << 17))).encode())


def without_length(handler, status=200):
    handler.send_response(status)
    handler.end_headers()
    with suppress(OSError):
        for _ in range(1 << 14):
            handler.wfile.write(b" " * 0x4000)
    handler.close_connection = True


def packed(encoding):
    def send(handler, status=200):
        assert handler.headers["Accept-Encoding"] == "identity"
        content = gzip.compress(gzip.compress(b" " * (1 << 26)))
        handler.send(status, content, [("Content-Encoding", encoding)])

    return send


TOO_LONG, PACKED = (
    "the server's reply is longer than 0 MiB",
    "the server's reply is packed ({}), which was not asked for",
)
TOO_MUCH = {
    "endless": (endless, TOO_LONG),
    "with a length": (long, TOO_LONG),
    "without a length": (without_length, TOO_LONG),
    "an endless error": (functools.partial(endless, status=500), TOO_LONG),
    "a long error": (functools.partial(long, status=400), TOO_LONG),
    "an endless refusal": (functools.partial(endless, status=401), TOO_LONG),
    "bomb": (packed("gzip"), PACKED.format("gzip")),
    "bomb in a bomb": (packed("gzip, gzip"), PACKED.format("gzip, gzip")),
    "another bomb": (packed("zstd"), PACKED.format("zstd")),
}


@pytest.mark.parametrize(("send", "said"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_a_reply_that_does_not_end_is_a_failure_of_its_request(send, said, monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._LONGEST_REPLY", 1 << 16)
    with Server(lambda body, n: "fine") as server:
        kept = server.http.RequestHandlerClass.do_POST

        def post(handler):
            asked = handler.rfile.read(int(handler.headers["Content-Length"]))
            if b"much" not in asked:
                handler.rfile = io.BytesIO(asked)
                return kept(handler)
            with server.lock:
                server.bodies.append(asked)
            return send(handler)

        server.http.RequestHandlerClass.do_POST = post
        requests = [Request([{"role": "user", "content": text}]) for text in ("much", "little")]
        with start_engine("openai", "m", base_url=server.url, retries=1, concurrency=2) as engine:
            found = dict(engine.generate(requests, Sampling()))
        assert len(server.bodies) == 3, "the request is tried again, the other is answered"
        assert getattr(server.http, "sent", 0) < 1 << 26, "what is sent on is not read"
    assert said in found[0].error and found[0].error.endswith("(after 1 retries)")
    assert found[1].text == "fine"


@pytest.mark.parametrize(("send", "said"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_a_list_of_models_that_does_not_end(send, said, monkeypatch):
    monkeypatch.setattr("recipe.cello1.engines.openai._LONGEST_REPLY", 1 << 16)
    with Server() as server:
        server.http.RequestHandlerClass.do_GET = lambda handler: send(handler)
        with pytest.raises(EngineError, match=f"^{re.escape(f'{server.url} cannot be used: {said}')}$"):
            start_engine("openai", "m", base_url=server.url)


def test_long_names_of_models_are_cut():
    with Server(models=["x" * 100_000] * 3) as server:
        with pytest.raises(EngineError, match="has no 'm'") as caught:
            start_engine("openai", "m", base_url=server.url)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["{" * 400_000, "```{" * 100_000, "} ```json\n" * 100_000, "```" + " " * 400_000])
def test_braces_without_end_are_read_once(text):
    """A search with .* between them takes as many steps as there are pairs of them: hours."""
    found = _from_json(text, Request([], ("a",), 1), "")
    assert found == (text, "")
