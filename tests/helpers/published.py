"""The published reward and evaluator, written anew from the description of what they do; see task/scoring.py."""

import re
from collections.abc import Iterable

from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN


def read_as_published(text: str) -> str | None:
    """The answer that the published code reads, ``None`` for a format it does not accept; written from its rules."""
    rule = re.fullmatch(
        r"<think>(?:(?!</?think>|</?answer>).)*</think>\n<answer>((?:(?!</?think>|</?answer>).)*)</answer>\n?",
        text,
        re.S,
    )
    if rule is None:
        return None
    lines = text.splitlines()
    opening = next(line for line in lines if ANSWER_OPEN in line)
    read = opening[opening.index(ANSWER_OPEN) + len(ANSWER_OPEN) :].strip()
    read = read.removesuffix(ANSWER_CLOSE).strip()
    if read == "":
        read = next((line.strip() for line in lines if "|" in line), "")
    return read if "|" in read else None


def listed(text: str) -> list[str]:
    return [item.strip() for item in text.split("|") if item.strip()]


def published_score(text: str, gold: str) -> float:
    """The verdict of the published reward."""
    read = read_as_published(text)
    if read is None:
        return -1
    given_, wanted = listed(read), listed(gold)
    if len(given_) != len(wanted) or len(set(given_)) < len(given_):
        return -1
    share = sum(a.lower() == b.lower() for a, b in zip(given_, wanted, strict=True)) / len(wanted)
    return (share + (share == 1)) / 2


def published_evaluation(text: str, gold: str) -> tuple[float, int, int, float]:
    """Partial accuracy, exact match, format and uniqueness of one answer by the published evaluator."""
    read = read_as_published(text)
    if read is None:
        return 0, 0, 0, 0
    items, wanted = listed(read), listed(gold)
    right = sum(a.lower() == b.lower() for a, b in zip(items, wanted, strict=False))
    unique = len(set(items)) / len(items) if items else 0
    return right / len(wanted), int(right == len(wanted)), 1, unique


def published_run(answers: Iterable[tuple[str, str]]) -> dict[str, float]:
    """What the published evaluator says of a run of texts and golds: accuracy over all cells, the rest by puzzle."""
    found = [(*published_evaluation(text, gold), len(listed(gold))) for text, gold in answers]
    cells = sum(n for *_, n in found)
    return {
        "partial_accuracy": sum(partial * n for partial, *_, n in found) / cells,
        "exact_match": sum(exact for _, exact, *_ in found) / len(found),
        "format_validity": sum(valid for _, _, valid, *_ in found) / len(found),
        "uniqueness": sum(unique for *_, unique, _ in found) / len(found),
    }
