"""Any server with an OpenAI-compatible chat API: ``vllm serve``, Ollama, cloud services.

The key is read from the environment (``OPENAI_API_KEY``), and neither kept in records nor shown in messages.

Constrained answers: a vLLM server started with
``--logits-processors`` and ``protocol.LOGITS_PROCESSOR`` gives exactly legal ones, as in process;
an answer that is not legal all the same means that the server does not constrain, and is a failure. Other servers are
asked for structured output (a JSON schema with one field for each cell), which their APIs allow at most to keep to the
candidates: a type may come twice. ``constraint`` says which of the two it is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from recipe.cello1.engines.protocol import (
    Completion,
    EngineBase,
    EngineError,
    Failure,
    Request,
    Sampling,
    constraint_args,
)
from recipe.cello1.task.answer import ANSWER_CLOSE, TAGS, THINK_CLOSE, THINK_OPEN, format_answer, parse_answer

logger = logging.getLogger(__name__)
_KEY_VARIABLE = "OPENAI_API_KEY"
_URL_VARIABLE = "OPENAI_BASE_URL"
_CONNECT_TIMEOUT = 15.0  # seconds
_FIRST_DELAY = 0.5  # seconds; doubles with each try
_LONGEST_DELAY = 60.0
_MOST_TOKENS = 1 << 40  # of a prompt or answer: sums of them fit into any integer
_LONGEST_ERROR = 1000  # characters of what a server says
_LONGEST_REPLY = 1 << 24  # bytes
_FENCES = re.compile(r"```(?:json)?\s*(?=\{)"), re.compile(r"(?<=\})\s*```")
# Parameters that some servers do not take, and what they say then.
_UNSUPPORTED = ("support", "unavailable", "not allowed", "not permitted", "unrecognized", "unknown", "deprecated")
# A limit may also be refused for being too high, so that the name beside one of the words above is not enough.
_NO_MAX_TOKENS = tuple(
    f"max_tokens is {sign}" for sign in ("not supported", "unsupported", "not allowed", "deprecated")
)
# Some take temperature or top_p, but not both: then temperature stays.
_REFUSALS = {
    "max_tokens": ("max_completion_tokens", "parameter: max_tokens", *_NO_MAX_TOKENS),
    "top_p": (*_UNSUPPORTED, "cannot both"),
    "response_format": (*_UNSUPPORTED, "invalid schema"),  # of too many names, for example
} | dict.fromkeys(("temperature", "seed"), _UNSUPPORTED)
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
# Other words for the two reasons that leave an answer.
_ENDS = dict.fromkeys(("eos", "eos_token", "end_turn", "stop_sequence"), "stop")
_ENDS |= dict.fromkeys(("max_tokens", "model_length"), "length")


class _RefusedError(ValueError):
    """A reply that is too long to be read, or could be."""


class OpenAIEngine(EngineBase):
    """A server with an OpenAI-compatible chat API."""

    name = "openai"
    fingerprint = ""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        concurrency: int = 32,
        timeout: float = 1200.0,
        retries: int = 6,
        longest_wait: float = 600.0,
        constrained: bool | Literal["prefer"] = False,
        server: str = "auto",
        think_opened: bool = False,
    ) -> None:
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("timeout", timeout, 1e-3),
            ("retries", retries, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if server not in ("auto", "vllm", "other"):
            raise ValueError(f"server must be auto, vllm or other, got {server!r}")
        self._url = base_url or os.environ.get(_URL_VARIABLE, "")
        self.base_url = public_address(self._url)
        if not self._url:
            msg = f"base_url is missing; give the address of the server (http://host:8000/v1) or set {_URL_VARIABLE}"
            raise ValueError(msg)
        if not self._url.lower().startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")
        try:
            import openai
        except ImportError as error:
            msg = f"the package openai cannot be imported ({error}); install it with pip install openai"
            raise EngineError(msg) from error
        self._openai = openai
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.longest_wait = longest_wait
        self.refused: set[str] = set()  # parameters that this server does not take
        self._prefer = constrained == "prefer"  # rather a free answer than none where the server cannot constrain
        self._think_opened = think_opened
        self._rng = np.random.default_rng(0)  # spreads the retries
        self._closed = False
        kind = self._check_server()
        self._on_vllm = kind == "vllm" if server == "auto" else server == "vllm"
        self.constraint = "" if not constrained else "exact" if self._on_vllm else "candidates"

    def _client(self) -> Any:
        async def check(response: Any) -> None:
            """Look at where a reply leads to, and read it as far as it may go, before anything else does."""
            if response.has_redirect_location:
                target = response.url.join(response.headers["location"])
                if target.host != response.url.host or (response.url.scheme, target.scheme) == ("https", "http"):
                    msg = f"the server sends requests on to {public_address(str(target))}, which is not followed"
                    raise ValueError(msg)
            packed = response.headers.get("content-encoding", "identity").strip().lower()
            if packed not in ("", "identity"):  # a small one may unpack to anything
                raise _RefusedError(f"the server's reply is packed ({packed:.40}), which was not asked for")
            content = bytearray()
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > _LONGEST_REPLY:
                    raise _RefusedError(f"the server's reply is longer than {_LONGEST_REPLY >> 20} MiB")
            response._content = bytes(content)  # where httpx's aread() puts and finds it

        openai = self._openai
        timeout = openai.Timeout(self.timeout, connect=min(_CONNECT_TIMEOUT, self.timeout))
        return openai.AsyncOpenAI(
            # Local servers need no key, but the client insists on one.
            api_key=os.environ.get(_KEY_VARIABLE) or "none",
            base_url=self._url,
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=timeout, event_hooks={"response": [check]}, headers={"Accept-Encoding": "identity"}
            ),
            max_retries=0,  # done here, together for all requests
        )

    def _check_server(self) -> str:
        """Ask for the list of models: the plain mistakes (address, key, name) show before any work is done."""

        async def ask() -> bytes:
            async with self._client() as client, asyncio.timeout(self.timeout):
                return (await client.models.with_raw_response.list()).content

        openai = self._openai
        try:
            models = json.loads(_in_thread(ask))["data"]
            owners = {str(entry["id"]): entry.get("owned_by") for entry in models}
            names = sorted(owners)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EngineError(self._why(error)) from None
        except (openai.APIConnectionError, TimeoutError) as error:
            raise EngineError(f"cannot reach {self.base_url} ({self._say(error)}); is the server running?") from None
        except _RefusedError as error:
            raise EngineError(f"{self.base_url} cannot be used: {error}") from None
        except (openai.APIError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "other"  # not every server has the list, some show a page there
        if names and not any(_is_listed(self.model, name) for name in names):
            near = get_close_matches(self.model, names, n=10, cutoff=0.5) if len(names) > 10 else names
            some = ", ".join(name[:200] for name in near or names[:10]) + (", ..." if len(names) > 10 else "")
            raise EngineError(f"model: {self.base_url} has no {self.model!r}; it has {some}")
        return "vllm" if "vllm" in owners.values() else "other"

    def _say(self, error: BaseException) -> str:
        """Put an error and its cause into one line without key and password."""
        text = f"{type(error).__name__}: {_said(error)}" + (f": {error.__cause__}" if error.__cause__ else "")
        parts = urlsplit(self._url)
        for secret in (os.environ.get(_KEY_VARIABLE), self._url, parts.password, unquote(parts.password or "")):
            if secret:
                text = text.replace(secret, self.base_url if secret == self._url else "***")
        return " ".join(text.split())[:_LONGEST_ERROR]

    def _why(self, error: Any) -> str:
        """Say what no request gets past, and what helps."""
        said = self._say(error)
        if isinstance(error, self._openai.AuthenticationError | self._openai.PermissionDeniedError):
            return f"{self.base_url} refuses the key ({said}); set {_KEY_VARIABLE}"
        if error.status_code in (404, 405) and not isinstance(error.body, dict):
            return f"{said}: {self.base_url} seems to be no address of an API; most end with /v1"
        return said

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer requests, as :meth:`recipe.cello1.engines.protocol.Engine.generate` says; not once it is closed."""
        if self._closed:
            raise EngineError("the engine is closed; start another")
        run = _Run(self, requests, sampling)
        run.start()
        try:
            while (found := run.results.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            run.stop()

    def close(self) -> None:
        """Refuse further requests; connections are closed after each run."""
        self._closed = True

    # ------------------------------------------------------------------------------------------------- one request

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_tokens" in self.refused else "max_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            limit: sampling.max_tokens,
        }
        if sampling.stop:
            body["stop"] = [sampling.stop]
        if request.seed is not None:
            body["seed"] = request.seed
        if sampling.logprobs:
            body["logprobs"] = True
        if request.n_answers and self._on_vllm:
            body["extra_body"] = {"vllm_xargs": constraint_args(request, sampling)}
        elif request.n_answers:
            body["response_format"] = _schema(request)
        return {name: value for name, value in body.items() if name not in self.refused}

    def _learn(self, error: Any, body: Mapping[str, Any]) -> bool:
        """Find out which parameter of a request is refused, whoever else has found it out meanwhile."""
        text = re.sub(r"[\\\"'`]", "", _said(error).lower())
        for name, signs in _REFUSALS.items():
            if name == "response_format" and not self._prefer:
                continue  # an answer that was to be constrained must not come free without a word
            named = name in text or name.replace("_", " ") in text or name == "max_tokens"
            if name in body and named and any(sign in text for sign in signs):
                if name not in self.refused:
                    self.refused.add(name)
                    instead = "max_completion_tokens in its place" if name == "max_tokens" else "its default"
                    logger.warning("%s refuses %s; going on with %s", self.base_url, name, instead)
                return True
        return False

    def _read(self, content: bytes, request: Request) -> Completion | Failure:
        """Read a reply; whatever is odd about it raises ``ValueError``."""
        whole = _json(content)
        if isinstance(whole, dict) and whole.get("error") and not whole.get("choices"):
            raise ValueError(f"the server says {json.dumps(whole['error'])}")
        choice = _part(_part(whole, "choices", list)[:1] or [None], "choices", dict)
        reason = _part(choice, "finish_reason", str).lower()
        reason = _ENDS.get(reason, reason)
        if reason not in ("stop", "length"):
            why = f": {json.dumps(choice['error'])}" if choice.get("error") else ""
            msg = f"the server ended the answer for the reason {reason!r}{why}"
            if reason == "content_filter":  # it would do so again
                return Failure(msg)
            raise ValueError(msg)
        message = _part(choice, "message", dict)
        if isinstance(parts := message.get("content"), list) and parts:
            thoughts, texts = zip(*map(_texts, parts), strict=True)
            message = {"reasoning": "".join(thoughts), **message, "content": "".join(texts)}
        # Servers with a reasoning parser take the reasoning out of the text.
        own = [message[key] for key in ("reasoning_content", "reasoning") if isinstance(message.get(key), str)]
        reasoning = next(filter(None, own), "")
        nothing = "" if reasoning or "content" in message else None
        text = _part(message, "content", str, nothing)
        if reason == "stop" and not text.strip() and reasoning.rstrip().endswith((ANSWER_CLOSE, "}", "```")):
            text, reasoning = reasoning, ""  # its parser has found no end of the reasoning, and taken all for that
        for tag in TAGS:
            reasoning = reasoning.replace(tag, "")
        if request.n_answers and not self._on_vllm:
            text, reasoning = _from_json(text, request, reasoning)
        if reasoning and THINK_OPEN not in text:
            text = f"{THINK_OPEN}{reasoning}{THINK_CLOSE}\n{text.lstrip()}"
        elif self._think_opened and THINK_OPEN not in text:
            text = THINK_OPEN + text
        if request.n_answers and self._on_vllm and not _is_legal(text, request):
            return Failure(_why_illegal(text, reason))
        usage = _part(whole, "usage", dict, {})
        counts = [
            _part(usage, name, int) if name in usage else other
            for name, other in (("completion_tokens", len(text.split())), ("prompt_tokens", 0))
        ]
        tokens = _part(_part(choice, "logprobs", dict, {}), "content", list, [])
        logprob = sum(float(_part(token, "logprob", float)) for token in tokens) if tokens else None
        if min(counts) < 0 or max(counts) > _MOST_TOKENS or not math.isfinite(logprob or 0.0):
            raise ValueError(f"the server's reply has the counts {counts!r:.80} and the log-probability {logprob}")
        return Completion(text, reason, counts[0], counts[1], logprob)


class _Run:
    """One call of ``generate``: an event loop in a thread of its own, which puts its results into a queue."""

    def __init__(self, engine: OpenAIEngine, requests: Iterable[Request], sampling: Sampling) -> None:
        self.engine = engine
        self.sampling = sampling
        self.waiting = enumerate(requests)
        # (position, result), or what the caller's own iterator raised; None at the end
        self.results: SimpleQueue[Any] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="cello1-openai", daemon=True)
        self._not_before = 0.0  # the server has asked for a pause
        self._hopeless = ""  # what no request will get past

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        if self._thread.is_alive() and self._loop is not None and self._work is not None:
            with suppress(RuntimeError):  # the loop has come to its end by itself just now
                self._loop.call_soon_threadsafe(self._work.cancel)
        self._thread.join()

    def _main(self) -> None:
        try:
            asyncio.run(self._all())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # from the caller's requests; raised in the caller's thread
            self.results.put(error)
        finally:
            self._ready.set()
            self.results.put(None)

    async def _all(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.current_task()
        self._ready.set()
        async with self.engine._client() as client:
            # The first error of any ends it; the event loop takes the others with it.
            await asyncio.gather(*(self._worker(client) for _ in range(self.engine.concurrency)))

    async def _worker(self, client: Any) -> None:
        for position, request in self.waiting:  # shared: each request is taken once
            self.results.put((position, await self._ask(client, request)))

    async def _ask(self, client: Any, request: Request) -> Completion | Failure:
        engine, openai = self.engine, self.engine._openai
        if request.prefix:
            return Failure("a server cannot start an answer with a given prefix; use the engine vllm or transformers")
        tries = 0
        while not self._hopeless:
            await self._pause()
            body = engine._body(request, self.sampling)
            asked = 0.0
            try:
                async with asyncio.timeout(engine.timeout):  # for the whole reply, however slowly it drips
                    reply = await client.chat.completions.with_raw_response.create(**body)
                return engine._read(reply.content, request)
            except TimeoutError:
                fault = f"no whole answer within {engine.timeout:g} s"
            except openai.APIStatusError as error:
                fault, status = engine._say(error), error.status_code
                if status in (400, 422) and engine._learn(error, body):
                    continue
                if status in (401, 402, 403, 404, 405) or error.code in _NO_CREDIT:
                    self._hopeless = engine._why(error)
                    break
                if status not in (408, 409, 429) and status < 500:
                    return Failure(fault)
                asked = _retry_after(error.response.headers)
                if asked > engine.longest_wait:
                    return Failure(f"{fault} (the server asks to wait {asked:.0f} s)")
            except Exception as error:  # no connection, or a reply that is no reply: the server's doing
                fault = engine._say(error)
            if tries >= engine.retries:
                return Failure(fault + (f" (after {tries} retries)" if tries else ""))
            self._not_before = max(self._not_before, time.monotonic() + asked) if asked else self._not_before
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**tries) * engine._rng.uniform(0.5, 1.0)
            tries += 1
            await asyncio.sleep(delay)
        return Failure(self._hopeless)

    async def _pause(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)


def _in_thread(ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine where no event loop runs already, as it does in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(ask())).result()


def _retry_after(headers: Mapping[str, str]) -> float:
    """Read how many seconds the server asks to wait; 0 if it does not."""
    text = headers.get("retry-after")
    if not text:
        return 0.0
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):  # a year of a thousand digits, for example
        return 0.0


def public_address(url: str | None) -> str:
    """Remove from an address what may be secret: user, password, query."""
    if not url:
        return ""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"the server's reply is not JSON: {content[:80]!r}") from None


def _part(whole: Any, key: str, kind: type, default: Any = None) -> Any:
    """Take a part of a reply that must be of some kind; where there is a default, it may be lacking."""
    found = whole.get(key) if isinstance(whole, dict) else whole[0] if isinstance(whole, list) else None
    if found is None and default is not None:
        return default
    if kind is float and type(found) is int:
        return found
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"the server's reply has no usable {key}, but {found!r:.80}")
    return found


def _texts(part: Any) -> tuple[str, str]:
    """Return what a part of a content holds of reasoning and of text; some servers send a list of parts."""
    kind = _part(part, "type", str)
    if kind == "thinking":
        found = part.get(kind)
        return ("".join(_texts(each)[1] for each in found) if isinstance(found, list) else _part(part, kind, str)), ""
    return "", _part(part, "text", str)


def _is_listed(model: str, name: str) -> bool:
    """Say whether a listed model is the one that is meant: some names are listed with a prefix, or a tag."""
    name = name.removeprefix("models/")
    return model in (name, f"models/{name}", name.removesuffix(":latest")) or model.rpartition(":")[0] == name


def _said(error: BaseException) -> str:
    """Return what an error says; where its text lacks what the server says, all of that."""
    body = getattr(error, "body", None)
    if not body or (isinstance(body, dict) and isinstance(body.get("message"), str)):
        return str(error)
    return f"{error} - {body[:200] if isinstance(body, str) else json.dumps(body)}"


def _is_legal(text: str, request: Request) -> bool:
    parsed = parse_answer(text)
    items = {item.lower() for item in parsed.items}
    candidates = {name.lower() for name in request.candidates}
    return parsed.ok and len(parsed.items) == len(items) == request.n_answers and items <= candidates


def _why_illegal(text: str, finish_reason: str) -> str:
    """Say what is the likely cause of an illegal answer that was to be constrained."""
    if finish_reason == "length":
        return "there was no room for the whole answer; give more max_tokens, or a longer context to the server"
    if THINK_CLOSE in text and THINK_OPEN not in text:
        return "the answer lacks <think>, which the server's chat template may write; say so with think_opened"
    return (
        "the server did not keep to the constraint; start it with --logits-processors "
        "recipe.cello1.engines.constrained.vllm_processor:MatchingLogitsProcessor"
    )


def _schema(request: Request) -> dict[str, Any]:
    """Return a JSON schema for the reasoning and the type of each cell."""
    cells = [f"cell_{i}" for i in range(1, request.n_answers + 1)]
    name = {"type": "string", "enum": list(request.candidates)}
    schema = {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}} | dict.fromkeys(cells, name),
        "required": ["reasoning", *cells],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "matching", "strict": True, "schema": schema}}


def _object_in(text: str) -> str:
    """Find the object in a text: between fences, else from the first brace to the last; in one pass, unlike ``.*``."""
    opening, closing = _FENCES
    ends = [end.start() for end in closing.finditer(text)]
    if (begin := opening.search(text)) and ends and ends[-1] > begin.end():
        return text[begin.end() : ends[-1]]
    return text[text.find("{") : text.rfind("}") + 1] if "{" in text else ""


def _from_json(text: str, request: Request, reasoning: str) -> tuple[str, str]:
    """Write structured output, in whatever company, as the answer it stands for, with all reasoning; else leave it."""
    for thought, _, rest in (text.rpartition(THINK_CLOSE), ("", "", text)):
        try:
            found = json.loads(_object_in(rest) or rest)
            types = [found[f"cell_{i}"] for i in range(1, request.n_answers + 1)]
            said = [reasoning, thought, str(found.get("reasoning", ""))]
            for tag in TAGS:
                said = [part.replace(tag, "").strip() for part in said]
            return format_answer(types, "\n\n".join(filter(None, said))), ""
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
    return text, reasoning
