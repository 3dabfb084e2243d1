"""A language model as judge: how the name a model gave relates to the gold name, where the ontology does not know.

The judge sees the two names and nothing else, each pair once. What it fails to answer, or answers in other words than
asked for, is a failure of the judge: it is counted apart and says nothing about the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from recipe.cello1.answer import THINK_CLOSE
from recipe.cello1.engine import Engine, Failure, Request, Sampling
from recipe.cello1.ontology import Relation, normalise

VERDICTS = tuple(str(relation) for relation in Relation if relation is not Relation.UNKNOWN)
SYSTEM = """You compare names of cell types. You are given the right name of a cell and the name that was answered.
Reply with one word:
equivalent - both names mean the same cell type
broader - the answered type includes the right one, and more
narrower - the answered type is a subtype of the right one
lineage - neither includes the other, but both are close relatives of the same lineage
different - anything else"""
# Reasoning models think before the word.
SAMPLING = Sampling(max_tokens=4096)

Pair = tuple[str, str]  # answered, gold


class Verdicts(NamedTuple):
    """What the judge said.

    Attributes
    ----------
    found
        Pair -> one of ``VERDICTS``.
    failures
        Pair -> why there is no verdict.
    """

    found: dict[Pair, str]
    failures: dict[Pair, str]


def ask_judge(engine: Engine, pairs: Iterable[Pair]) -> Verdicts:
    """Have pairs of names judged.

    Parameters
    ----------
    engine
        The judge.
    pairs
        Answered name and gold name; repeated ones are asked once, equal ones not at all.

    Returns
    -------
    The verdicts and failures.
    """
    verdicts = Verdicts({}, {})
    asked: list[Pair] = []
    for pair in dict.fromkeys(pairs):
        if normalise(pair[0]) == normalise(pair[1]):
            verdicts.found[pair] = str(Relation.EQUIVALENT)
        else:
            asked.append(pair)
    for position, result in engine.generate(map(_request, asked), SAMPLING):
        pair = asked[position]
        if isinstance(result, Failure):
            verdicts.failures[pair] = result.error
        elif verdict := read_verdict(result.text):
            verdicts.found[pair] = verdict
        else:
            verdicts.failures[pair] = "the judge's reply is none of the words asked for"
    return verdicts


def _request(pair: Pair) -> Request:
    # One line each: what a model answered must not look like a part of the question.
    answered, gold = (" ".join(name.split())[:200] for name in pair)
    question = f"Right name: {gold}\nAnswered name: {answered}"
    return Request([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])


def read_verdict(reply: str) -> str:
    """Read the judge's reply.

    Parameters
    ----------
    reply
        What it said.

    Returns
    -------
    The verdict; empty if the last line (after the reasoning) names none, or several.
    """
    lines = reply.rpartition(THINK_CLOSE)[2].strip().splitlines()
    words = set(re.findall(r"[a-z]+", lines[-1].lower())) if lines else set()
    named = [verdict for verdict in VERDICTS if verdict in words]
    return named[0] if len(named) == 1 else ""
