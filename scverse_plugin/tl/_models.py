"""One model or several, one after the other: what each of them answers to the same puzzles."""

from __future__ import annotations

import copy as copies
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scanpy import logging as logg

from recipe.cello1.engines.protocol import Engine, EngineError
from scverse_plugin._files import one_line
from scverse_plugin.method._ask import Cache, Reply, ask_puzzles, completion_seeds
from scverse_plugin.method._engines import engine_version, public_address
from scverse_plugin.method._plan import Draft
from scverse_plugin.method._readout import ReadOut, ask_out, check_readout, find_way
from scverse_plugin.method._solve import Solved, solve
from scverse_plugin.tl._options import Options
from scverse_plugin.tl._prepare import Prepared


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What one model has answered."""

    name: str
    solved: Solved
    # What there is to say of model and engine
    about: Mapping[str, str]


def wording(prepared: Prepared, options: Options) -> Any:
    """Return what tells equal questions; sampling answers the same question anew."""
    return None if options.temperature > 0 else prepared.puzzle


def ask_each(prepared: Prepared, each: Sequence[Options], kept: Sequence[Cache | None]) -> list[Answers]:
    """Ask one model after the other, each from the same random numbers."""
    found: list[Answers] = []
    files: list[str] = []
    names: list[str] = []
    for name in (options.name for options in each):
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    if len(each) > 1 and each[0].on_error == "raise":
        _check_all(each, names)
    for options, cache, name in zip(each, kept, names, strict=True):
        own = replace(prepared, rng=copies.deepcopy(prepared.rng))
        if len(each) == 1:
            return [_ask(own, options, cache, name)]
        try:
            found.append(_ask(own, options, cache, name))
        except Exception as error:
            msg = f"model {name}: {one_line(error)}"
            if options.on_error == "raise":
                raise EngineError(msg + _left(found, files)) from error
            logg.warning(f"{msg}; the labels are those of the other models")
        else:
            files += [str(cache.path)] if cache is not None else []
    if not found:
        raise EngineError(f"none of the models {', '.join(names)} has answered; the warnings say why")
    return found


def _check_all(each: Sequence[Options], names: Sequence[str]) -> None:
    """Check every model before the first is asked and paid."""
    for options, name in zip(each, names, strict=True):
        try:
            _support(options.check_start(), options)
        except Exception as error:
            raise EngineError(f"model {name}: {one_line(error)} (no model has been asked yet)") from error


def _left(found: Sequence[Answers], files: Sequence[str]) -> str:
    """Say what there is of the models that were asked before."""
    if not found:
        return ""
    names = ", ".join(answers.name for answers in found)
    if files:
        return f". The answers of {names} are kept in {', '.join(files)}: run the same call again when this is mended"
    return f". The answers of {names} had no journal (cache); with on_error='skip' they make the labels alone"


def _ask(prepared: Prepared, options: Options, kept: Cache | None, name: str) -> Answers:
    """Ask a model all rounds."""
    with options.opened() as running:
        constrain = options.constrained and bool(running.constraint)
        support = _support(running, options)
        if options.calibration is not None and (known := options.calibration.get("model")) not in (None, running.model):
            logg.warning(f"calibration: it is of the model {known}, here {running.model} answers")
        way: ReadOut | None = None
        common: dict[str, Any] = {"layout": options.prompt_layout, "sampling": options.sampling(), "cache": kept}
        common |= {"on_error": options.on_error, "progress": options.progress}

        def put(drafts: Sequence[Draft]) -> list[Reply]:
            nonlocal way
            puzzles = [prepared.puzzle(draft) for draft in drafts]
            seeds = completion_seeds(len(drafts), prepared.rng)
            if support == "readout":
                way = way or find_way(running, puzzles[0], options.prompt_layout)
                return ask_out(running, puzzles, way=way, seeds=seeds, **common)
            return ask_puzzles(running, puzzles, seeds=seeds, constrain=constrain, **common)

        words = wording(prepared, options)
        solved = solve(prepared.units, prepared.lists, prepared.size, options.n_votes, put, prepared.rng, words)
        about = {
            "engine": running.name,
            "engine_version": engine_version(running),
            "base_url": public_address(getattr(running, "base_url", None)),  # it may come from the environment
            "model": running.model,
            "fingerprint": running.fingerprint,
            "constraint": running.constraint if way == "soft" or (constrain and way is None) else "",
            "support": support,
            "readout": way or "",
        }
        return Answers(name, solved, about)


def _support(engine: Engine | type[Engine], options: Options) -> str:
    """Choose what support is made of, before anything is asked that costs."""
    support = options.support
    if support == "readout":
        check_readout(engine)
    elif support == "auto":
        support = "readout" if getattr(engine, "can_score", False) else "votes"
    fitted = options.calibration["support"] if options.calibration is not None else support
    if fitted != support:
        raise ValueError(
            f"calibration: it is made for the support of {fitted}, and here it is that of {support}; calibrate anew, "
            f"or ask with support={fitted!r}"
        )
    return support


def about_all(answers: Sequence[Answers]) -> dict[str, Any]:
    """Return what there is to say of the models: of several a list of each."""
    if len(answers) == 1:
        return dict(answers[0].about)
    return {name: [answer.about[name] for answer in answers] for name in answers[0].about}
