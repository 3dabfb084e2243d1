r"""The answer format: ``<think>...</think>`` newline ``<answer>type 1 | type 2 | ...</answer>``.

This module owns the tags and the separator; prompt, scorer, constrained decoding and voting take them from here.
:func:`parse_answer` reads what the published reward reads (source: the Cell-o1 reward function, whose rule is line
based), except where that reading is not the answer inside the tags; ``task.scoring`` lists those cases.

The reading rule, for a text that is exactly ``<think>..</think>\n<answer>..</answer>`` with one trailing newline at
most and each of the four tags exactly once:

1. The rest of the line that opens with ``<answer>``, if it is not blank, is the answer.
2. If it is blank, the answer is the first line inside the tags that holds a ``|``, whatever the reasoning holds.
3. Items are separated by ``|``; surrounding white space and empty items are dropped.

A line ends where ``str.splitlines`` ends it (U+2028, vertical tab and so on included). Everything is plain substring
search, so that the time is linear in the length of the text whatever it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from recipe.cello1.task.text import normal_form, shown

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
SEPARATOR_MARK = "|"
SEPARATOR = " | "

THINK_TO_ANSWER = f"{THINK_CLOSE}\n{ANSWER_OPEN}"
_RUN = SEPARATOR_MARK * 2
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines ends a line; all are white space


class Reason(StrEnum):
    """Why a response is not a legal answer. ``OK`` is the empty string, so that a legal answer has a false reason."""

    OK = ""
    NOT_TEXT = "not_text"  # None, bytes or any other object
    EMPTY = "empty"  # nothing, or only white space
    UNFINISHED = "unfinished"  # stops before the last tag, usually the length limit
    MISSING_TAG = "missing_tag"
    REPEATED_TAG = "repeated_tag"
    TEXT_OUTSIDE = "text_outside"  # something before <think> or after </answer>
    BAD_JOINT = "bad_joint"  # not exactly one newline between </think> and <answer>, or tags out of order
    EMPTY_ANSWER = "empty_answer"
    NO_SEPARATOR = "no_separator"  # several cells, but no "|" in the answer
    CONTRADICTION = "contradiction"  # a second, different list inside <answer>
    WRONG_COUNT = "wrong_count"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What :func:`parse_answer` found.

    Attributes
    ----------
    items
        The types in cell order; empty when the text is malformed.
    reasoning
        The text between the think tags, verbatim; empty when there is no complete pair.
    ok
        Whether the text has the format and an answer could be read.
    reason
        ``Reason.OK`` or why not.
    separated
        Whether the answer holds a ``|``. An answer for several cells must; one for a single cell need not.
    """

    items: tuple[str, ...]
    reasoning: str
    ok: bool
    reason: Reason
    separated: bool = False


def split_types(text: str) -> tuple[str, ...]:
    """Split ``type 1 | type 2`` into its types, in normal form: white space trimmed, empty items dropped.

    Parameters
    ----------
    text
        One line of types.

    Returns
    -------
    The types in order.
    """
    text = normal_form(text)
    # A megabyte of separators would make a million empty parts; the rest is done in C for the same reason.
    if _RUN in text:
        text = text.replace(SEPARATOR_MARK * 64, SEPARATOR_MARK)
        while _RUN in text:
            text = text.replace(_RUN, SEPARATOR_MARK)
    return tuple(filter(None, map(str.strip, filter(None, text.split(SEPARATOR_MARK)))))


def join_types(types: Sequence[str]) -> str:
    """Join types as the answer has them: ``type 1 | type 2``.

    Parameters
    ----------
    types
        Types in cell order.

    Returns
    -------
    One line.
    """
    return SEPARATOR.join(types)


def type_fault(name: object) -> str:
    """Say what keeps a name from being a cell type in a puzzle.

    Parameters
    ----------
    name
        The candidate name.

    Returns
    -------
    An empty string for a usable name, else the fault in words.
    """
    fault = text_fault(name)
    if fault or not isinstance(name, str):
        return fault
    if SEPARATOR_MARK in name:
        return f"contains {SEPARATOR_MARK!r}, which separates the types of an answer"
    if name != name.strip():
        return "has white space around it"
    for tag in TAGS:
        if tag in name:
            return f"contains the tag {tag}"
    return ""


def text_fault(text: object) -> str:
    """Say what keeps a text from standing on one line of a prompt.

    Parameters
    ----------
    text
        The candidate text.

    Returns
    -------
    An empty string for a usable text, else the fault in words.
    """
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not a str"
    if not normal_form(text).strip():
        return "is empty"
    if len(text.splitlines()) != 1 or text.splitlines()[0] != text:
        return "contains a line break"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate, which UTF-8 cannot hold"
    return ""


def check_types(name: str, types: Iterable[str]) -> None:
    """Check that types can stand side by side in answers.

    Parameters
    ----------
    name
        What they are called in messages.
    types
        The types.

    Raises
    ------
    ValueError
        If one is unusable or stands twice; scoring ignores case, so case does not tell types apart.
    """
    seen: dict[str, str] = {}
    for label in types:
        if fault := type_fault(label):
            raise ValueError(f"{name}: the type {shown(label)} {fault}; rename it")
        key = normal_form(label).lower()
        if (other := seen.get(key)) is not None:
            twins = other != label and normal_form(other) == normal_form(label)
            alike = f"they look alike: {other!a}, {label!a}" if twins else "case is ignored"
            raise ValueError(f"{name} holds both {shown(other)} and {shown(label)} ({alike}); give each type once")
        seen[key] = label


def format_answer(types: Sequence[str], reasoning: str = "") -> str:
    r"""Write an answer in the format that :func:`parse_answer` reads.

    Parameters
    ----------
    types
        Types in cell order.
    reasoning
        Text for the think tags, taken verbatim.

    Returns
    -------
    ``<think>reasoning</think>\n<answer>type 1 | type 2</answer>``

    Raises
    ------
    ValueError
        If there are no types, a type cannot stand in an answer, or the reasoning contains one of the tags.
    """
    if isinstance(types, str):
        raise ValueError(f"types must be a sequence of names, got the str {types!r}; split it with split_types first")
    if len(types) == 0:
        raise ValueError("types is empty; an answer names one type for each cell")
    for position, name in enumerate(types, start=1):
        if fault := type_fault(name):
            raise ValueError(f"types: the type of cell {position}, {name!r}, {fault}; rename it")
    for tag in TAGS:
        if tag in reasoning:
            raise ValueError(f"reasoning contains the tag {tag}, so the answer could not be read back; remove it")
    return f"{THINK_OPEN}{reasoning}{THINK_TO_ANSWER}{join_types(types)}{ANSWER_CLOSE}"


def parse_answer(text: object) -> ParsedAnswer:
    """Read a response. Never raises; linear in the length of the text.

    Parameters
    ----------
    text
        The response of a model. Anything that is not a ``str`` is malformed (``Reason.NOT_TEXT``).

    Returns
    -------
    The types in cell order with the reasoning, or the reason why the response is malformed. The number of types is not
    judged here, nor whether they are candidates.
    """
    if not isinstance(text, str):
        return ParsedAnswer((), "", False, Reason.NOT_TEXT)
    joint = _plain_joint(text)
    if joint < 0:
        if reason := _layout_fault(text):
            return ParsedAnswer((), _reasoning_of(text), False, reason)
        joint = text.find(THINK_TO_ANSWER)
    reasoning = text[len(THINK_OPEN) : joint]
    items, separated, reason = _read(text[joint + len(THINK_TO_ANSWER) : text.rindex(ANSWER_CLOSE)])
    return ParsedAnswer(() if reason else items, reasoning, not reason, reason, separated)


def _plain_joint(text: str) -> int:
    """Find ``</think>`` in a text whose only ``<`` are those of four tags in place; -1 for any other text."""
    if not text.startswith(THINK_OPEN):
        return -1
    joint = text.find("<", len(THINK_OPEN))
    if joint < 0 or not text.startswith(THINK_TO_ANSWER, joint):
        return -1
    close = text.find("<", joint + len(THINK_TO_ANSWER))
    if close < 0 or not text.startswith(ANSWER_CLOSE, close):
        return -1
    rest = len(text) - close - len(ANSWER_CLOSE)
    return joint if rest == 0 or (rest == 1 and text[-1] == "\n") else -1


def _layout_fault(text: str) -> Reason:
    """Return why ``text`` is not exactly the two tagged blocks, or ``Reason.OK``."""
    counts = [text.count(tag) for tag in TAGS]
    if counts == [1, 1, 1, 1]:
        if not text.startswith(THINK_OPEN) or not text.endswith((ANSWER_CLOSE, ANSWER_CLOSE + "\n")):
            return Reason.TEXT_OUTSIDE
        return Reason.OK if THINK_TO_ANSWER in text else Reason.BAD_JOINT
    if not text or text.isspace():
        return Reason.EMPTY
    if max(counts) > 1:
        return Reason.REPEATED_TAG
    # <think> first and the later tags lacking from the end on: the response was cut.
    if text.startswith(THINK_OPEN) and sorted(counts, reverse=True) == counts:
        return Reason.UNFINISHED
    return Reason.MISSING_TAG


def _reasoning_of(text: str) -> str:
    """Return the text between the first think tag and the next closing one, for display of malformed responses."""
    start = text.find(THINK_OPEN)
    end = text.find(THINK_CLOSE, start + 1) if start >= 0 else -1
    return text[start + len(THINK_OPEN) : end] if end >= 0 else ""


def _read(inside: str) -> tuple[tuple[str, ...], bool, Reason]:
    """Read the items from what stands inside the answer tags."""
    filled = inside.lstrip()
    if not filled:
        return (), False, Reason.EMPTY_ANSWER
    blank = inside[: len(inside) - len(filled)]
    at = filled.find(SEPARATOR_MARK)
    if any(mark in blank for mark in _LINE_BREAKS) and at >= 0:
        line, further = _line_from(filled, at)  # the first line is that of the tag, and it is blank
    else:
        line, further = _line_from(filled, 0)
    return _checked(split_types(line), line, further)


def _line_from(text: str, at: int) -> tuple[str, str]:
    """Return the line of ``text`` that position ``at`` is in, and what follows it (from its line break on)."""
    start = max([text.rfind(mark, 0, at) for mark in _LINE_BREAKS]) + 1
    ends = [end for mark in _LINE_BREAKS if (end := text.find(mark, at)) >= 0]
    end = min(ends) if ends else len(text)
    return text[start:end], text[end:]


def _checked(items: tuple[str, ...], line: str, further: str) -> tuple[tuple[str, ...], bool, Reason]:
    """Refuse further lines that hold other items; remarks without ``|`` are ignored, as in the published code."""
    separated = SEPARATOR_MARK in line
    if not items:
        return (), separated, Reason.EMPTY_ANSWER
    if not further:
        return items, separated, Reason.OK
    # A list that ends with "|" goes on in the next line.
    if line.rstrip().endswith(SEPARATOR_MARK) and further.replace(SEPARATOR_MARK, "").strip():
        return (), separated, Reason.CONTRADICTION
    if SEPARATOR_MARK in further:
        known = [item.lower() for item in split_types(line)]
        for other in dict.fromkeys(further.splitlines()):  # each different line once: repetition stays cheap
            if SEPARATOR_MARK in other and (found := split_types(other)) and [x.lower() for x in found] != known:
                return (), separated, Reason.CONTRADICTION
    return items, separated, Reason.OK
