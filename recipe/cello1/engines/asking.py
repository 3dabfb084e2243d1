"""The one loop that asks: predictions, teacher, judge and the plugin all put their requests to an engine here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm.auto import tqdm

from recipe.cello1.engines.protocol import Completion, Engine, Failure, Request, Sampling
from recipe.cello1.formats.provenance import digest

Key = TypeVar("Key", bound=Hashable)
NO_RESULT = Failure("the engine gave no result for this request")


@dataclass(slots=True)
class Asked:
    """What has come of it."""

    answered: int = 0
    # How often each error occurred
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """How many requests have no answer."""
        return self.errors.total()

    def note(self, result: object, bar: tqdm | None = None) -> None:
        """Count a result."""
        if isinstance(result, Failure):
            self.errors[result.error] += 1
        else:
            self.answered += 1
        if bar is not None:
            bar.set_postfix(failed=self.failed, refresh=False)
            bar.update()


def ask(
    engine: Engine,
    keys: Sequence[Key],
    request: Callable[[Key], Request],
    keep: Callable[[Key, Completion | Failure], None],
    sampling: Sampling,
    *,
    stop: Callable[[], bool] = lambda: False,
    bar: tqdm | None = None,
) -> Asked:
    """Ask for each key once until told to stop, and hand over what comes; what an engine leaves out has failed."""
    asked, taken, seen = Asked(), 0, bytearray(len(keys))

    def requests() -> Iterator[Request]:
        nonlocal taken
        for key in keys:
            if stop():
                return
            taken += 1
            yield request(key)

    def take(position: int, result: Completion | Failure) -> None:
        seen[position] = 1
        keep(keys[position], result)
        asked.note(result, bar)

    if keys:
        for position, result in engine.generate(requests(), sampling):
            take(position, result)
        for position in range(taken if stop() else len(keys)):
            if not seen[position]:
                take(position, NO_RESULT)
    return asked


def request_key(engine: Engine, request: Request, sampling: Sampling) -> str:
    """Return what two requests share only if they ask the same of the same model in the same way."""
    what = {
        "engine": engine.name,
        "model": engine.model,
        "fingerprint": engine.fingerprint,
        "server": str(getattr(engine, "base_url", "") or ""),
        "constraint": engine.constraint if request.n_answers else "",
        "sampling": sampling.as_dict(),
        "seed": request.seed,
        "candidates": list(request.candidates),
        "n_answers": request.n_answers,
        **({"prefix": request.prefix} if request.prefix else {}),
        "messages": [dict(message) for message in request.messages],
    }
    return digest(what, 40)
