"""Several engines side by side, on one machine or a Ray cluster, that share the work.

Each engine lives in an actor of its own. It takes a share of what is left whenever it has done its last one: half of
what would be its even share, so that the first shares are large (which batches well) and the last ones small (so that
all end together), whatever their speeds. Answers stream back one by one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np

from recipe.cello1.engines.protocol import Choice, Completion, EngineBase, EngineError, Failure, Request, Sampling
from recipe.cello1.formats.machine import RAY_ON_THIS_MACHINE
from recipe.cello1.formats.provenance import worker_variables

_LEAST_SHARE = 8
_LARGEST_SHARE = 1024
_LONGEST_END = 60.0  # seconds for a thread to see that its engine is gone

_Result = tuple[int, Completion | np.ndarray | Failure]


class _Worker:
    """One engine, in its actor."""

    def __init__(self, start: Callable[[], EngineBase]) -> None:
        self._engine = start()

    def facts(self) -> tuple[str, str, bool]:
        """Return what engines of this kind have in common; the first call also waits for its start."""
        return self._engine.fingerprint, self._engine.constraint, self._engine.can_score

    def run(self, method: str, *arguments: Any) -> Iterator[_Result]:
        """Let the engine do a share."""
        yield from getattr(self._engine, method)(*arguments)


class RayEngines(EngineBase):
    """Several engines of the same kind as Ray actors; see :func:`recipe.cello1.engines.start.start_engines`."""

    def __init__(self, engine: str, model: str, number: int, start: Callable[[], EngineBase], **options: Any) -> None:
        self.name = engine
        self.model = model
        self._actors: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._started_ray = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._alone = not os.environ.get("RAY_ADDRESS")
        if self._alone:
            os.environ.update({**RAY_ON_THIS_MACHINE, **os.environ})
        try:
            import ray
        except ImportError as error:
            raise EngineError(f"Ray cannot be imported ({error}); install ray, or use one engine") from error
        self._ray = ray
        if not ray.is_initialized():
            self._start_ray()
        try:
            self.fingerprint, self.constraint, self.can_score = self._start(start, number, _gpus(engine, options))
        except BaseException:
            self.close()
            raise

    def _start_ray(self) -> None:
        """Join or start a cluster; twice, since Ray gives a busy machine no more than half a minute to start."""
        # Sockets have long names, and the path of one may have 107 characters.
        parent = "/tmp" if os.access("/tmp", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="cello1-", dir=parent, ignore_cleanup_errors=True)
        options = {"address": "local", "_temp_dir": self._folder.name} if self._alone else {}
        for last in (False, True):
            try:
                # Ray's workers look for modules in this working directory first: not in one that may be a stranger's.
                with contextlib.chdir(self._folder.name):
                    self._ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **options)
            except Exception as error:  # Ray raises all kinds, and leaves processes behind
                self._ray.shutdown()
                if last:
                    raise EngineError(f"Ray cannot be started: {_say(error)}") from error
            else:
                self._started_ray = True
                return

    def _start(self, start: Callable[[], EngineBase], number: int, gpus: int) -> tuple[str, str, bool]:
        ray = self._ray
        total = ray.cluster_resources()
        needed = gpus if total.get("GPU", 0) else 0
        if needed * number > total.get("GPU", 0):
            msg = f"{number} engines need {needed * number} GPUs, Ray has {total.get('GPU', 0):.0f}; use fewer engines"
            raise EngineError(msg)
        # num_cpus=0: engines on the CPU share its cores whatever Ray counts; each is told its part of them.
        threads = max(1, (os.cpu_count() or 1) // number)
        environment = {} if needed else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        environment |= worker_variables()
        remote = ray.remote(_Worker).options(num_gpus=needed, num_cpus=0, runtime_env={"env_vars": environment})
        self._actors = [remote.remote(start) for _ in range(number)]
        try:
            facts = ray.get([actor.facts.remote() for actor in self._actors])
        except ray.exceptions.RayError as error:
            raise EngineError(f"an engine cannot be started: {_say(error)}") from None
        return facts[0]

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Any]:
        """Answer requests, as :meth:`recipe.cello1.engines.protocol.Engine.generate` says; not once it is closed."""
        return self._share("generate", requests, sampling)

    def score(self, choices: Iterable[Choice]) -> Iterator[Any]:
        """Compare texts, as :meth:`recipe.cello1.engines.protocol.Engine.score` says; not once it is closed."""
        return self._share("score", choices) if self.can_score else super().score(choices)

    def _share(self, method: str, items: Iterable[Any], *arguments: Any) -> Iterator[_Result]:
        if not self._actors:
            raise EngineError("the engines are closed; start others")
        work = _Work(list(items), len(self._actors))
        results: SimpleQueue[_Result | None] = SimpleQueue()
        threads = [
            threading.Thread(target=self._serve, args=(actor, work, results, method, *arguments), daemon=True)
            for actor in self._actors
        ]
        self._threads = [thread for thread in self._threads if thread.is_alive()] + threads
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                found = results.get()
                if found is None:
                    running -= 1
                else:
                    yield found
            # Only if every engine has died is there anything left.
            for position in work.rest():
                yield position, Failure("all engines have died; see Ray's logs")
        finally:
            work.stop()

    def _serve(
        self, actor: Any, work: _Work, results: SimpleQueue[_Result | None], method: str, *arguments: Any
    ) -> None:
        """Feed one engine until nothing is left."""
        try:
            while share := work.take():
                waiting = [position for position, _ in share]
                try:
                    own = [item for _, item in share]
                    stream = actor.run.options(num_returns="streaming").remote(method, own, *arguments)
                    for reference in stream:
                        offset, result = self._ray.get(reference)
                        position = share[offset][0]
                        waiting.remove(position)
                        results.put((position, result))
                        if work.stopped:
                            return
                except self._ray.exceptions.RayActorError as error:  # dead: its work fails, the others go on
                    for position in waiting:
                        results.put((position, Failure(f"an engine has died: {_say(error)}")))
                    return
                except Exception as error:  # raised in the actor
                    for position in waiting:
                        results.put((position, Failure(_say(error))))
        finally:
            results.put(None)

    def close(self) -> None:
        """Stop the engines, and Ray if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        # A caller may have stopped early, and Ray ends the process of any thread that asks it after its own end.
        for thread in self._threads:
            thread.join(_LONGEST_END)
        if self._started_ray:
            self._started_ray = False
            self._ray.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


class _Work:
    """What is left to do, handed out in shares."""

    def __init__(self, items: list[Any], engines: int) -> None:
        self._items = items
        self._engines = engines
        self._next = 0
        self._lock = threading.Lock()
        self.stopped = False

    def take(self) -> list[tuple[int, Any]]:
        """Return the next share; empty if there is none."""
        with self._lock:
            left = len(self._items) - self._next
            if self.stopped or not left:
                return []
            size = min(left, _LARGEST_SHARE, max(_LEAST_SHARE, -(-left // (2 * self._engines))))
            start = self._next
            self._next += size
            return [(position, self._items[position]) for position in range(start, start + size)]

    def rest(self) -> range:
        """Return what nobody has taken."""
        return range(self._next, len(self._items))

    def stop(self) -> None:
        """Hand out nothing more."""
        self.stopped = True


def _gpus(engine: str, options: dict[str, Any]) -> int:
    if engine == "openai" or options.get("device") == "cpu":
        return 0
    return int(options.get("tensor_parallel_size") or 1)


def _say(error: BaseException) -> str:
    """Put the last line of an error into one line: Ray's messages hold whole tracebacks."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    return f"{type(cause).__name__}: {lines[-1]}"
