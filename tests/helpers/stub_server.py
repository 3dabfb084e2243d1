"""A stub of an OpenAI-compatible server, on the loopback address; it needs nothing but the standard library."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Http(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class Server:
    """A stub of the API. ``reply(body, n)`` gives what to answer to the n-th chat request."""

    def __init__(self, reply=None, owner="somebody", models=("m",), models_status=200):
        self.reply = reply or (lambda body, n: "hello")
        self.owner, self.models, self.models_status = owner, models, models_status
        self.bodies, self.headers, self.times = [], [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def send(self, status, content, headers=()):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def do_GET(self):
                entries = [
                    {"id": name, "object": "model", "created": 0, "owned_by": stub.owner} for name in stub.models
                ]
                refused = {"error": {"message": f"bad key {self.headers['Authorization']}"}}
                self.send(
                    stub.models_status, {"object": "list", "data": entries} if stub.models_status < 300 else refused
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    n = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                    stub.times.append(time.monotonic())
                    stub.under_way += 1
                    stub.most_under_way = max(stub.most_under_way, stub.under_way)
                try:
                    reply = stub.reply(body, n)
                finally:
                    with stub.lock:
                        stub.under_way -= 1
                if isinstance(reply, tuple):
                    self.send(*reply)
                else:
                    self.send(200, reply if isinstance(reply, bytes | dict) else completion(reply))

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def completion(text, finish_reason="stop", logprobs=None, **message):
    content = None if logprobs is None else [{"token": "t", "logprob": p, "top_logprobs": []} for p in logprobs]
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, **message},
                "logprobs": None if content is None else {"content": content},
            }
        ],
        "usage": {"completion_tokens": 7, "prompt_tokens": 9, "total_tokens": 16},
    }


def error(status, message="busy", headers=()):
    return status, {"error": {"message": message}}, headers
