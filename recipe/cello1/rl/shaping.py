"""Optional shaped terms of the reward, added to the score of :mod:`recipe.cello1.task.scoring`; all are off by default.

Each term is a number that is added to the score; the score itself and its metrics stay what they are.

``overlong``
    Source: the soft over-long punishment of DAPO (arXiv 2503.14476, section 3.4). With ``L`` the longest response
    (``data.max_response_length``) and ``B`` the buffer, both in response tokens, a response of ``n`` tokens gets::

        factor * clip((L - B - n) / B, -1, 0)

    nothing up to ``L - B`` tokens, then linearly less, ``-factor`` at ``L`` tokens.

``reasoning``
    A guard against collapsed reasoning. Source: our own; the score does not look into the think tags, so that
    ``<think></think>`` is paid like an argument. An answer that is paid (``score > 0``) with ``w`` different words of
    reasoning, fewer than ``min_words``, gets::

        -share * score * (1 - w / min_words)

    Different words, so that repeating one is of no use. At most ``share <= 1`` of the pay is withheld, so that a right
    answer never is worth less than a wrong one. Texts without spaces between words count as one word.

``candidates``
    Credit for keeping to the candidate set. Source: our own; it grades what the published code pays -1 for whatever is
    wrong with it, in the spirit of format rewards (DeepSeek-R1, arXiv 2501.12948). An answer in valid format of ``k``
    items, ``c`` of them different candidates, for a puzzle of ``N`` cells gets::

        credit * c / max(k, N)

    which is the whole credit for N different candidates, right or wrong, and nothing for a malformed answer. Candidates
    and N are read from the question. By itself, the credit (at most 1) never makes an illegal answer worth a legal one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from recipe.cello1.task.answer import parse_answer
from recipe.cello1.task.prompt import Variant, parse_user
from recipe.cello1.task.scoring import Score

SHAPING_KEY = "cello1.shaping"
_PREFIX = "shaping_"  # of the terms among the reward's metrics


@dataclass(frozen=True, slots=True)
class Overlong:
    """Soft penalty for over-long responses.

    Attributes
    ----------
    buffer
        Length of the zone before the longest response in which the penalty grows, in tokens.
    factor
        Penalty for a response of full length.
    """

    buffer: int
    factor: float = 1.0

    def _term(self, n_tokens: int, max_tokens: int) -> float:
        """Compute the term."""
        room = (max_tokens - self.buffer - n_tokens) / self.buffer
        return self.factor * min(0.0, max(-1.0, room))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Guard against collapsed reasoning.

    Attributes
    ----------
    min_words
        Different words of reasoning from which on nothing is withheld.
    share
        Share of the score that is withheld where there is no reasoning at all, in (0, 1].
    """

    min_words: int
    share: float = 0.5

    def _term(self, score: float, text: str) -> float:
        """Compute the term."""
        if score <= 0:
            return 0.0
        words = len(set(parse_answer(text).reasoning.split()))
        return min(0.0, self.share * score * (words / self.min_words - 1))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Credit for keeping to the candidate set.

    Attributes
    ----------
    credit
        What an answer of N different candidates gets, in (0, 1].
    """

    credit: float

    def _term(self, score: Score, candidates: frozenset[str], n_cells: int) -> float:
        """Compute the term."""
        if not score.items:
            return 0.0
        named = len(candidates.intersection(map(str.lower, score.items)))
        return self.credit * named / max(len(score.items), n_cells)


@dataclass(frozen=True, slots=True)
class Shaping:
    """The terms that are on.

    Attributes
    ----------
    max_tokens
        Most tokens a response may have.
    overlong, reasoning, candidates
        The terms; ``None`` is off.
    """

    max_tokens: int = 0
    overlong: Overlong | None = None
    reasoning: Reasoning | None = None
    candidates: Candidates | None = None

    def __bool__(self) -> bool:
        return any((self.overlong, self.reasoning, self.candidates))

    def terms(
        self, score: Score, text: str, n_tokens: int, question: str | None = None, variant: Variant = "batch"
    ) -> dict[str, float]:
        """Compute the terms that are on.

        Parameters
        ----------
        score
            Verdict on the response.
        text
            The response.
        n_tokens
            Its tokens, the end of turn included.
        question
            User message of the puzzle; needed for the candidates.
        variant
            Task variant of the question.

        Returns
        -------
        ``shaping_<term>`` to what is added to the score; the same keys for every response.

        Raises
        ------
        ValueError
            If the candidates are needed and the question is missing, unreadable or lists none.
        """
        found: dict[str, float] = {}
        if self.overlong is not None:
            found[f"{_PREFIX}overlong"] = self.overlong._term(n_tokens, self.max_tokens)
        if self.reasoning is not None:
            found[f"{_PREFIX}reasoning"] = self.reasoning._term(score.score, text)
        if self.candidates is not None:
            found[f"{_PREFIX}candidates"] = self.candidates._term(score, *question_candidates(question, variant))
        return found


@lru_cache(maxsize=1024)  # all responses to a puzzle ask for the same one
def question_candidates(question: str | None, variant: Variant = "batch") -> tuple[frozenset[str], int]:
    """Read what may be answered from a question.

    Parameters
    ----------
    question
        User message of a puzzle.
    variant
        Task variant.

    Returns
    -------
    The candidate types in lower case, and the number of cells.

    Raises
    ------
    ValueError
        If there is no question, or it has no candidates.
    """
    if not question:
        raise ValueError(
            f"{SHAPING_KEY}.candidates reads the candidates from extra_info['question'], which the data lack; "
            "set it to null, or make the data with `python -m recipe.cello1 prepare`"
        )
    puzzle = parse_user(question, variant)
    if not puzzle.candidates:
        msg = f"{SHAPING_KEY}.candidates: the questions of variant {variant!r} list no candidates; set it to null"
        raise ValueError(msg)
    return frozenset(map(str.lower, puzzle.candidates)), puzzle.n_cells


_TERMS: dict[str, type] = {"overlong": Overlong, "reasoning": Reasoning, "candidates": Candidates}
_COUNTS = ("buffer", "min_words")
_SHARES = ("share", "credit")


def read_shaping(options: Mapping[str, Any] | None, max_tokens: int | None = None) -> Shaping:
    """Read the options of ``cello1.shaping``.

    Parameters
    ----------
    options
        For each term ``null`` or its settings: ``overlong: {buffer, factor}``, ``reasoning: {min_words, share}``,
        ``candidates: {credit}``. ``None`` turns all terms off.
    max_tokens
        ``data.max_response_length``; needed for ``overlong``.

    Returns
    -------
    The terms.

    Raises
    ------
    ValueError
        If a key is unknown or missing or a value is out of range, naming the key.
    """
    if options is None:
        return Shaping()
    if not isinstance(options, Mapping):
        raise ValueError(f"{SHAPING_KEY} must be null or a mapping of {', '.join(_TERMS)}, got {options!r}")
    _refuse_unknown(SHAPING_KEY, options, list(_TERMS))
    terms = {name: _read_term(name, options[name]) for name in _TERMS if options.get(name) is not None}
    overlong = terms.get("overlong")
    if overlong is not None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(
                f"{SHAPING_KEY}.overlong needs data.max_response_length, a positive number of tokens, "
                f"got {max_tokens!r}"
            )
        if overlong.buffer > max_tokens:
            raise ValueError(
                f"{SHAPING_KEY}.overlong.buffer is {overlong.buffer} tokens, but responses have "
                f"data.max_response_length={max_tokens} at most; make it smaller"
            )
    return Shaping(max_tokens=max_tokens or 0, **terms)


def _refuse_unknown(where: str, options: Mapping[str, Any], known: list[str]) -> None:
    if unknown := sorted(str(key) for key in options if key not in known):
        raise ValueError(f"{where}.{unknown[0]} is unknown; {where} has {', '.join(known)}")


def _read_term(name: str, options: Any) -> Any:
    where = f"{SHAPING_KEY}.{name}"
    term = _TERMS[name]
    known = [field.name for field in fields(term)]
    if not isinstance(options, Mapping):
        raise ValueError(f"{where} must be null or a mapping of {', '.join(known)}, got {options!r}")
    _refuse_unknown(where, options, known)
    if known[0] not in options:  # the first setting of each term has no default
        raise ValueError(f"{where}.{known[0]} is not set; {where} needs it")
    return term(**{key: _read_number(f"{where}.{key}", key, value) for key, value in options.items()})


def _read_number(where: str, key: str, value: Any) -> float:
    is_number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if key in _COUNTS:
        right, wanted = is_number and isinstance(value, int) and value >= 1, "a positive whole number"
    elif key in _SHARES:
        right, wanted = is_number and 0 < value <= 1, "above 0 and at most 1"
    else:
        right, wanted = is_number and value > 0, "a positive number"
    if not right:
        raise ValueError(f"{where} must be {wanted}, got {value!r}")
    return value
