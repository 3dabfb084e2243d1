r"""The prompt format: a puzzle as chat messages, and back.

This module owns the task instruction and the layout of the user message; nothing else spells them out. Both are the
published CellPuzzles format, byte for byte, because released models are trained on it::

    Context: <donor sentences> \n\nCell 1: G1, G2, ...\nCell 2: ...\n\nMatch the cells above to one of the
    following cell types:\n<types, one a line>

(one blank before the first empty line). Four task variants share one code path: a batch of cells or one single cell,
candidates given or open-ended. The single-cell ones are those of the PraMamba fork of the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN, SEPARATOR, THINK_CLOSE, THINK_OPEN
from recipe.cello1.task.puzzle import GENE_SEPARATOR, Puzzle
from recipe.cello1.task.text import shown

Layout = Literal["system", "user", "user_current", "inference"]
LAYOUTS: tuple[Layout, ...] = ("system", "user", "user_current", "inference")
# What stands between question and instruction where both are one user message.
_ONE_MESSAGE: dict[Layout, str] = {"user": " ", "user_current": " ", "inference": "\n"}
Variant = Literal["batch", "batch_open", "single", "single_open"]

_ROLE = "You are an expert assistant specialized in cell type annotation."
_BATCH = (
    "You will be given a batch of N cells from the same donor, where each cell represents a unique cell type. "
    "For each cell, the top expressed genes are provided in descending order of expression. "
    "Using both the gene expression data and donor information, determine the correct cell type for each cell."
)
_BATCH_CANDIDATES = (
    "You will also receive a list of N candidate cell types, and each candidate must be assigned to exactly one cell. "
    "Ensure that you consider all cells and candidate types together, rather than annotating each cell individually."
)
# Not published: what is true of a puzzle with candidates to spare, which only an annotation has.
_SPARE_CANDIDATES = (
    "You will also receive a list of candidate cell types, more than there are cells: "
    "each cell must be assigned to exactly one candidate, and each candidate to at most one cell. "
    "Ensure that you consider all cells and candidate types together, rather than annotating each cell individually."
)
_SINGLE = "You will be given information about a single cell, including the top expressed genes in descending order."
_SINGLE_CANDIDATES = "You will also receive a list of candidate cell types to choose from."
_SINGLE_TASK = "Using the gene expression data and donor information, determine the correct cell type for this cell"
_TAGS = (
    f"Include your detailed reasoning within {THINK_OPEN} and {THINK_CLOSE} tags, "
    f"and provide your final answer within {ANSWER_OPEN} and {ANSWER_CLOSE} tags."
)
_BATCH_ANSWER = (
    f"The final answer should be a single string listing the assigned cell types in order, separated by '{SEPARATOR}'."
)
_SINGLE_ANSWER = "The final answer should be a single cell type name"
# The first upload of the published code had this sentence in every instruction; its backslash and n are literal.
_EXACT_FORMAT = f'You must output exactly "{THINK_OPEN}...{THINK_CLOSE}\\n{ANSWER_OPEN}...{ANSWER_CLOSE}."'


@dataclass(frozen=True, slots=True)
class _Task:
    """The texts of one variant: the sentences of its instruction, and the fixed parts of its user message."""

    opening: tuple[str, ...]
    closing: str
    question: str
    numbered: bool
    candidates: bool
    context_end: str = " "  # the published puzzles have a blank between the last sentence and the line break
    label: str = "Cell"


VARIANTS: dict[Variant, _Task] = {
    "batch": _Task(
        opening=(_ROLE, _BATCH, _BATCH_CANDIDATES),
        closing=_BATCH_ANSWER,
        question="Match the cells above to one of the following cell types:",
        numbered=True,
        candidates=True,
    ),
    "batch_open": _Task(
        opening=(_ROLE, _BATCH),
        closing=_BATCH_ANSWER,
        question="Name the cell type of each cell above.",
        numbered=True,
        candidates=False,
    ),
    "single": _Task(
        opening=(_ROLE, _SINGLE, _SINGLE_CANDIDATES, f"{_SINGLE_TASK} from the candidate list."),
        closing=f"{_SINGLE_ANSWER} from the candidate list.",
        question="Match the cell above to one of the following cell types:",
        numbered=False,
        candidates=True,
        context_end="",
    ),
    "single_open": _Task(
        opening=(_ROLE, _SINGLE, f"{_SINGLE_TASK}."),
        closing=f"{_SINGLE_ANSWER}.",
        question=(
            "Determine the correct cell type for the cell above based on the gene expression pattern and donor context."
        ),
        numbered=False,
        candidates=False,
        context_end="",
    ),
}

# Not published: what is true of clusters, of which two may be of one type.
_NAMES = (
    "Name types as the Cell Ontology does, as precisely as the genes allow; "
    "write 'unknown' where they do not tell the type."
)
Evidence = Literal["cells", "markers"]
EVIDENCE: dict[Evidence, _Task] = {
    "cells": _Task(
        opening=(
            _ROLE,
            "You will be given one cell of each of N clusters; several clusters may be of the same type. "
            "For each cell, the top expressed genes are provided in descending order of expression. "
            "Using both the genes and the context, determine the cell type of each cell.",
            _NAMES,
        ),
        closing=_BATCH_ANSWER,
        question="Name the cell type of each cell above.",
        numbered=True,
        candidates=False,
    ),
    "markers": _Task(
        opening=(
            _ROLE,
            "You will be given N clusters of cells; several clusters may be of the same type. "
            "For each cluster, its marker genes are provided, the most specific first. "
            "Using both the genes and the context, determine the cell type of each cluster.",
            _NAMES,
        ),
        closing=_BATCH_ANSWER,
        question="Name the cell type of each cluster above.",
        numbered=True,
        candidates=False,
        label="Cluster",
    ),
}

_CONTEXT = "Context: "
_BLOCK = "\n\n"
_NO_META: Mapping[str, Any] = MappingProxyType({})


def instruction(variant: Variant = "batch", layout: Layout = "system") -> str:
    """Return the task instruction.

    Parameters
    ----------
    variant
        Task variant, a key of ``VARIANTS``.
    layout
        One of ``LAYOUTS``; ``"user"`` has one sentence more, as in the first upload of the published RL code.

    Returns
    -------
    One paragraph.

    Raises
    ------
    ValueError
        If ``variant`` or ``layout`` is unknown.
    """
    return _instruction(_task(variant), layout)


def _instruction(task: _Task, layout: Layout) -> str:
    extra = (_EXACT_FORMAT,) if check_layout(layout) == "user" else ()
    return " ".join([*task.opening, *extra, _TAGS, task.closing])


@cache
def instructions(variant: Variant = "batch") -> frozenset[str]:
    """Collect the instructions that published files have for a variant.

    Parameters
    ----------
    variant
        Task variant.

    Returns
    -------
    Those of all layouts. Single-cell files have that of ``single_open`` also where they list candidates.
    """
    names: tuple[Variant, ...] = (variant, "single_open") if variant == "single" else (variant,)
    return frozenset(instruction(name, layout) for name in names for layout in LAYOUTS)


def find_variant(text: str) -> Variant | None:
    """Find the variant that a user message is written in, by its question.

    Parameters
    ----------
    text
        The user message.

    Returns
    -------
    The variant; ``None`` if the message asks none of the questions.
    """
    return next((name for name, task in VARIANTS.items() if f"{_BLOCK}{task.question}" in text), None)


def annotation_messages(puzzle: Puzzle, layout: Layout = "system") -> list[dict[str, str]]:
    """Make the messages of a puzzle whose candidates may outnumber its cells, which the instruction then says.

    Parameters
    ----------
    puzzle
        The puzzle.
    layout
        See :func:`chat`.

    Returns
    -------
    The messages of :func:`messages` for as many candidates as cells, else these with one sentence changed.

    Raises
    ------
    ValueError
        If ``layout`` is unknown or the puzzle lists no candidates.
    """
    found = messages(puzzle, layout)
    if len(puzzle.candidates) > puzzle.n_cells:
        found[0]["content"] = found[0]["content"].replace(_BATCH_CANDIDATES, _SPARE_CANDIDATES)
    return found


def free_messages(puzzle: Puzzle, layout: Layout = "system", evidence: Evidence = "cells") -> list[dict[str, str]]:
    """Make the messages that ask for the types of clusters, without candidates.

    Parameters
    ----------
    puzzle
        A cell of each cluster, or its marker genes; candidates are not shown.
    layout
        See :func:`chat`.
    evidence
        ``"cells"`` or ``"markers"``, which the messages then say.

    Returns
    -------
    Messages with ``role`` and ``content``.

    Raises
    ------
    ValueError
        If ``layout`` or ``evidence`` is unknown.
    """
    if evidence not in EVIDENCE:
        raise ValueError(f"evidence must be one of {', '.join(EVIDENCE)}, got {evidence!r}")
    task = EVIDENCE[evidence]
    return _chat(_render(task, puzzle), layout, _instruction(task, layout))


def check_layout(layout: str) -> Layout:
    """Return ``layout`` if it is one of ``LAYOUTS``.

    Parameters
    ----------
    layout
        The setting to check.

    Returns
    -------
    ``layout``

    Raises
    ------
    ValueError
        If it is not.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


def _task(variant: Variant) -> _Task:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]


def render_user(puzzle: Puzzle, variant: Variant = "batch") -> str:
    """Write the user message of a puzzle.

    Parameters
    ----------
    puzzle
        The puzzle; its candidates are written in the order they have.
    variant
        Task variant. The open-ended ones leave the candidates out.

    Returns
    -------
    The message, without the instruction.

    Raises
    ------
    ValueError
        If the variant is unknown or does not fit the puzzle: several cells for a single-cell variant, or no candidates
        for one that lists them.
    """
    task = _task(variant)
    if not task.numbered and len(puzzle.cells) != 1:
        msg = f"variant {variant!r} asks about one cell, the puzzle has {len(puzzle.cells)}; use a batch variant"
        raise ValueError(msg)
    if task.candidates and not puzzle.candidates:
        raise ValueError(f"variant {variant!r} lists candidates, the puzzle has none; use {variant + '_open'!r}")
    return _render(task, puzzle)


def _render(task: _Task, puzzle: Puzzle) -> str:
    context = puzzle.context + task.context_end if puzzle.context else ""
    cells = "\n".join(
        [_cell_label(task, i) + GENE_SEPARATOR.join(genes) for i, genes in enumerate(puzzle.cells, start=1)]
    )
    question = "\n".join([task.question, *puzzle.candidates]) if task.candidates else task.question
    return _BLOCK.join([_CONTEXT + context, cells, question])


def _cell_label(task: _Task, number: int) -> str:
    return f"{task.label} {number}: " if task.numbered else f"{task.label}: "


def parse_user(
    text: str, variant: Variant = "batch", answer: tuple[str, ...] | None = None, meta: Mapping[str, Any] = _NO_META
) -> Puzzle:
    """Read a user message back into a puzzle. The inverse of :func:`render_user`: rendering gives the same bytes.

    Parameters
    ----------
    text
        The user message.
    variant
        Task variant it was written in.
    answer, meta
        What the puzzle has besides, see :class:`recipe.cello1.task.puzzle.Puzzle`.

    Returns
    -------
    The puzzle.

    Raises
    ------
    ValueError
        If the text is not in the format, naming what is off, or the answer is not one to it.
    """
    task = _task(variant)
    if not isinstance(text, str):
        raise ValueError(f"user message must be a str, got {type(text).__name__}")
    blocks = text.split(_BLOCK)
    if len(blocks) != 3:
        raise ValueError(
            f"user message must have 3 blocks with one empty line between them (context, cells, question), "
            f"found {len(blocks)}"
        )
    context = _parse_context(task, blocks[0])
    cells = [_parse_cell(task, i, line) for i, line in enumerate(blocks[1].split("\n"), start=1)]
    question, *candidates = blocks[2].split("\n")
    if question != task.question:
        msg = f"user message must ask {task.question!r} after the cells (variant {variant!r}), found {shown(question)}"
        raise ValueError(msg)
    if task.candidates and not candidates:
        raise ValueError("user message lists no candidate types after the question")
    if not task.candidates and candidates:
        msg = f"user message has text after the question: {shown(candidates[0])}; variant {variant!r} ends there"
        raise ValueError(msg)
    try:
        return Puzzle(tuple(cells), tuple(candidates), answer, context, meta)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("answer") else f"user message: {error}") from None


def _parse_context(task: _Task, block: str) -> str:
    if not block.startswith(_CONTEXT):
        raise ValueError(f"user message must start with {_CONTEXT!r}, found {block[:40]!r}")
    context = block[len(_CONTEXT) :]
    if not context:
        return ""
    if not context.endswith(task.context_end) or context == task.context_end:
        raise ValueError(f"the context must end with one blank before the empty line, found {context[-40:]!r}")
    return context.removesuffix(task.context_end)


def _parse_cell(task: _Task, number: int, line: str) -> tuple[str, ...]:
    label = _cell_label(task, number)
    if not line.startswith(label):
        raise ValueError(f"line {number} of the cells must start with {label!r}, found {line[:40]!r}")
    return tuple(line[len(label) :].split(GENE_SEPARATOR))


def chat(user_text: str, layout: Layout = "system", variant: Variant = "batch") -> list[dict[str, str]]:
    """Make the messages of a rendered puzzle.

    Parameters
    ----------
    user_text
        What :func:`render_user` wrote.
    layout
        ``"system"``: the instruction as system message, the puzzle as user message (published SFT and model card).
        The others are one user message: ``"user"`` the puzzle, a blank and the instruction with one sentence more
        (first upload of the RL code), ``"user_current"`` the same without that sentence (its present state),
        ``"inference"`` the puzzle, a line break and the instruction (published test script).
    variant
        Task variant, which decides the instruction.

    Returns
    -------
    Messages with ``role`` and ``content``.

    Raises
    ------
    ValueError
        If ``variant`` or ``layout`` is unknown.
    """
    return _chat(user_text, layout, instruction(variant, layout))


def _chat(user_text: str, layout: Layout, task_text: str) -> list[dict[str, str]]:
    if layout in _ONE_MESSAGE:
        return [{"role": "user", "content": user_text + _ONE_MESSAGE[layout] + task_text}]
    return [{"role": "system", "content": task_text}, {"role": "user", "content": user_text}]


def messages(puzzle: Puzzle, layout: Layout = "system", variant: Variant = "batch") -> list[dict[str, str]]:
    """Make the messages that ask a model to solve a puzzle.

    Parameters
    ----------
    puzzle
        The puzzle.
    layout
        See :func:`chat`.
    variant
        Task variant.

    Returns
    -------
    Messages with ``role`` and ``content``.

    Raises
    ------
    ValueError
        If ``variant`` or ``layout`` is unknown or the variant does not fit the puzzle.
    """
    return chat(render_user(puzzle, variant), layout, variant)
