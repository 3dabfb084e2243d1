"""What is said before anything is asked: how much, how dear, and what is sent where."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scanpy import logging as logg
from tqdm.auto import tqdm

from recipe.cello1.engines.protocol import EngineBase
from recipe.cello1.formats.atomic import check_place
from recipe.cello1.task.text import visible
from scverse_plugin._files import user_cache
from scverse_plugin.adata._context import AUTO
from scverse_plugin.method._ask import Cache
from scverse_plugin.method._engines import public_address
from scverse_plugin.tl._options import Options, safe_name

CHARACTERS_PER_TOKEN = 3  # symbols of genes are cut into more tokens than words are

Messages = list[dict[str, str]]


class Prompts(list[Messages]):
    """The prompts of a dry run, and what they would take."""

    n_puzzles: int
    prompt_tokens: int  # estimated from the length of the texts
    max_answer_tokens: int  # the most there can be: puzzles times max_tokens
    max_price: float | None  # of both, with price_per_million_tokens

    def __init__(self, prompts: Sequence[Messages], options: Options, n_puzzles: int) -> None:
        super().__init__(prompts)
        self.n_puzzles = n_puzzles
        length = sum(len(message["content"]) for prompt in prompts for message in prompt)
        self.prompt_tokens = round(length / CHARACTERS_PER_TOKEN * n_puzzles / len(prompts))
        self.max_answer_tokens = self.n_puzzles * options.max_tokens
        self.max_price = None
        if options.price_per_million_tokens is not None:
            of_prompt, of_answer = options.prices()
            self.max_price = (self.prompt_tokens * of_prompt + self.max_answer_tokens * of_answer) / 1e6

    def check(self, allowed: int | None) -> None:
        """Check that so many puzzles may be asked."""
        if allowed is not None and self.n_puzzles > allowed:
            raise ValueError(f"max_puzzles={allowed}, but this run asks {self.n_puzzles}; raise it, or lower n_votes")


def address(options: Options) -> str:
    """Return where prompts go; empty for a model in this process."""
    if not isinstance(options.engine, str):
        return str(getattr(options.engine, "base_url", "") or "")
    if options.engine != "openai":
        return ""
    return options.base_url or os.environ.get("OPENAI_BASE_URL", "")


def is_here(url: str) -> bool:
    """Say whether an address is this machine."""
    host = urlsplit(url).hostname or ""
    if not url or host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def journal(options: Options) -> Path | None:
    """Return the file that answers are kept in: one for each model, unless the caller names another."""
    if options.cache is None:
        return None
    if options.cache != AUTO:
        path = Path(options.cache)
        if path.suffix == ".jsonl":  # else refused where it is read
            check_place(path, "cache")
        return path
    engine = options.engine
    if isinstance(engine, str):
        name, model = engine, str(options.model)
    elif isinstance(engine, EngineBase):
        name, model = engine.name, engine.model
    else:  # what a caller's own engine would answer another time is not known
        return None
    mark = hashlib.sha256("\n".join([name, model, address(options)]).encode()).hexdigest()[:8]
    path = user_cache() / f"{safe_name(model)}-{mark}.jsonl"
    try:
        check_place(path, "cache")
    except ValueError as error:
        logg.warning(f"answers are not kept: {error}")
        return None
    return path


def announce(
    prompts: Prompts, options: Options, columns: Sequence[str], kept: Sequence[Cache | None], note: str = ""
) -> None:
    """Say what is about to happen, in one line."""
    urls = list(dict.fromkeys(filter(None, map(address, options.each()))))
    models = f" of {len(kept)} models" if len(kept) > 1 else ""
    parts = [
        f"cello1 asks {prompts.n_puzzles} puzzles{models}: about {prompts.prompt_tokens:,} tokens of prompts, "
        f"at most {prompts.max_answer_tokens:,} of answers"
    ]
    if prompts.max_price is not None:
        parts.append(f"price at most {prompts.max_price:.2f}")
    parts += [note] if note else []
    if urls:
        to = " and ".join(map(public_address, urls))
        parts.append(f"sent to {to}: {', '.join(['gene lists', *_metadata(options, columns)])}")
    if files := [f"{cache.path}{_filled(cache)}" for cache in kept if cache is not None]:
        parts.append(f"answers are kept in {', '.join(files)}")
    tell("; ".join(parts), options)


def _filled(cache: Cache) -> str:
    return f" ({cache.size:,} there; what is among them is not asked again)" if cache.size else ""


def tell(line: str, options: Options) -> None:
    """Say something that is no warning: beside the progress bar, or in the log."""
    if options.progress:
        tqdm.write(visible(line), file=sys.stderr)
    else:
        logg.info(visible(line))


def _metadata(options: Options, columns: Sequence[str]) -> list[str]:
    if columns:
        return [f"donor metadata ({', '.join(columns)})"]
    given: Any = options.context
    return ["your context"] if given and given != AUTO else ["no donor metadata"]
