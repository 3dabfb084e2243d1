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
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any

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
from recipe.cello1.task.answer import TAGS, THINK_CLOSE, THINK_OPEN, format_answer, parse_answer

_KEY_VARIABLE = "OPENAI_API_KEY"
_URL_VARIABLE = "OPENAI_BASE_URL"
_CONNECT_TIMEOUT = 15.0  # seconds
_FIRST_DELAY = 0.5  # seconds; doubles with each try
_LONGEST_DELAY = 60.0


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
        constrained: bool = False,
        server: str = "auto",
        think_opened: bool = False,
    ) -> None:
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("timeout", timeout, 1e-3),
            ("retries", retries, 0),
        ):
            if value < least:
                msg = f"{name} must be at least {least}, got {value}"
                raise ValueError(msg)
        if server not in ("auto", "vllm", "other"):
            msg = f"server must be auto, vllm or other, got {server!r}"
            raise ValueError(msg)
        self.base_url = base_url or os.environ.get(_URL_VARIABLE, "")
        if not self.base_url:
            msg = f"base_url is missing; give the address of the server (http://host:8000/v1) or set {_URL_VARIABLE}"
            raise ValueError(msg)
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
        self._think_opened = think_opened
        self._limit_name = "max_tokens"
        self._rng = np.random.default_rng(0)  # spreads the retries
        self._closed = False
        kind = self._check_server()
        self._on_vllm = kind == "vllm" if server == "auto" else server == "vllm"
        self.constraint = "" if not constrained else "exact" if self._on_vllm else "candidates"

    def _client(self) -> Any:
        # Local servers need no key, but the client insists on one.
        key = os.environ.get(_KEY_VARIABLE) or "none"
        return self._openai.AsyncOpenAI(
            api_key=key,
            base_url=self.base_url,
            timeout=self._openai.Timeout(self.timeout, connect=min(_CONNECT_TIMEOUT, self.timeout)),
            max_retries=0,  # done here, together for all requests
        )

    def _check_server(self) -> str:
        """Ask for the list of models: the plain mistakes (address, key, name) show before any work is done."""

        async def ask() -> Any:
            async with self._client() as client:
                return await client.models.list()

        openai = self._openai
        try:
            models = _in_thread(ask).data
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            msg = f"{self.base_url} refuses the key ({self._say(error)}); set {_KEY_VARIABLE}"
            raise EngineError(msg) from None
        except openai.APIConnectionError as error:
            cause = f": {error.__cause__}" if error.__cause__ else ""
            msg = f"cannot reach {self.base_url} ({self._say(error)}{cause}); is the server running?"
            raise EngineError(msg) from None
        except openai.APIError:
            return "other"  # not every server has the list
        if models and self.model not in {entry.id for entry in models}:
            names = sorted(entry.id for entry in models)
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            msg = f"model: {self.base_url} has no {self.model!r}; it has {shown}"
            raise EngineError(msg)
        return "vllm" if any(getattr(entry, "owned_by", "") == "vllm" for entry in models or ()) else "other"

    def _say(self, error: BaseException) -> str:
        """Put an error into one line without the key."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        key = os.environ.get(_KEY_VARIABLE)
        return text.replace(key, "***") if key else text

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer requests, as :meth:`recipe.cello1.engines.protocol.Engine.generate` says; not once it is closed."""
        if self._closed:
            msg = "the engine is closed; start another"
            raise EngineError(msg)
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
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._limit_name: sampling.max_tokens,
        }
        if request.seed is not None:
            body["seed"] = request.seed
        if sampling.logprobs:
            body["logprobs"] = True
        if request.n_answers and self._on_vllm:
            body["extra_body"] = {"vllm_xargs": constraint_args(request, sampling)}
        elif request.n_answers:
            body["response_format"] = _schema(request)
        return body

    def _read(self, reply: Any, request: Request) -> Completion | Failure:
        if not getattr(reply, "choices", None):
            return Failure("the server's reply has no choices")
        choice = reply.choices[0]
        if choice.finish_reason not in ("stop", "length"):
            return Failure(f"the server ended the answer for the reason {choice.finish_reason!r}")
        text = choice.message.content or ""
        if request.n_answers and not self._on_vllm:
            text = _from_json(text, request)
        # Servers with a reasoning parser take the reasoning out of the text.
        reasoning = getattr(choice.message, "reasoning_content", None) or getattr(choice.message, "reasoning", None)
        if isinstance(reasoning, str) and reasoning and THINK_OPEN not in text:
            text = f"{THINK_OPEN}{reasoning}{THINK_CLOSE}\n{text.lstrip()}"
        elif self._think_opened and THINK_OPEN not in text:
            text = THINK_OPEN + text
        if request.n_answers and self._on_vllm and not _is_legal(text, request):
            return Failure(_why_illegal(text, choice.finish_reason))
        usage = reply.usage
        logprob = None
        if choice.logprobs is not None and choice.logprobs.content:
            logprob = float(sum(token.logprob for token in choice.logprobs.content))
        return Completion(
            text=text,
            finish_reason=choice.finish_reason,
            tokens=usage.completion_tokens if usage else len(text.split()),
            prompt_tokens=usage.prompt_tokens if usage else 0,
            logprob=logprob,
        )


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
        tries = 0
        while True:
            if self._hopeless:
                return Failure(self._hopeless)
            await self._pause()
            try:
                reply = await client.chat.completions.create(**engine._body(request, self.sampling))
                return engine._read(reply, request)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                self._hopeless = engine._say(error)
            except openai.BadRequestError as error:
                # Newer OpenAI models want another name for the same thing.
                if engine._limit_name == "max_tokens" and "max_completion_tokens" in str(error):
                    engine._limit_name = "max_completion_tokens"
                    continue
                return Failure(engine._say(error))
            except openai.APIError as error:
                status = getattr(error, "status_code", None)
                may_pass = (
                    isinstance(error, openai.APIConnectionError)
                    or status in (408, 409, 429)
                    or (status is not None and status >= 500)
                )
                if not may_pass or tries >= engine.retries:
                    return Failure(engine._say(error) + (f" (after {tries} retries)" if tries else ""))
                asked = _retry_after(getattr(getattr(error, "response", None), "headers", {}))
                if asked > engine.longest_wait:
                    return Failure(f"{engine._say(error)} (the server asks to wait {asked:.0f} s)")
                delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**tries) * engine._rng.uniform(0.5, 1.0)
                if asked:
                    self._not_before = max(self._not_before, time.monotonic() + asked)
                tries += 1
                await asyncio.sleep(delay)
            except Exception as error:  # a reply that is no reply: the server's doing, and this item's alone
                return Failure(engine._say(error))

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
    except ValueError:
        return 0.0


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


def _from_json(text: str, request: Request) -> str:
    """Write structured output as the answer it stands for; what is not such output stays as it is."""
    try:
        found = json.loads(text)
        types = [found[f"cell_{i}"] for i in range(1, request.n_answers + 1)]
        reasoning = str(found.get("reasoning", ""))
        for tag in TAGS:
            reasoning = reasoning.replace(tag, "")
        return format_answer(types, reasoning)
    except (ValueError, TypeError, KeyError, AttributeError):
        return text
