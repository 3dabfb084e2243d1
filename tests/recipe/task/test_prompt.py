import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task.answer import text_fault, type_fault
from recipe.cello1.task.prompt import (
    LAYOUTS,
    VARIANTS,
    annotation_messages,
    chat,
    check_layout,
    find_variant,
    free_messages,
    instruction,
    instructions,
    messages,
    parse_user,
    render_user,
)
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import normal_form
from tests.helpers.rooms import ROOT

PUZZLE = Puzzle(
    cells=(("ALB", "APOA1", "TTR"), ("CD5L", "MARCO")),
    candidates=("Kupffer cell", "hepatocyte"),
    answer=("hepatocyte", "Kupffer cell"),
    context="The cell is from a donor, originating from the liver. The patient is healthy with no diagnosed disease.",
)
ONE = Puzzle(cells=(("ALB", "TTR"),), candidates=("Kupffer cell", "hepatocyte"), context="The liver.")

USER = (
    "Context: The cell is from a donor, originating from the liver. "
    "The patient is healthy with no diagnosed disease. \n"
    "\n"
    "Cell 1: ALB, APOA1, TTR\n"
    "Cell 2: CD5L, MARCO\n"
    "\n"
    "Match the cells above to one of the following cell types:\n"
    "Kupffer cell\n"
    "hepatocyte"
)

names = st.text(min_size=1, max_size=10).map(normal_form).map(str.strip).filter(lambda name: not type_fault(name))
genes = st.text(min_size=1, max_size=8).map(str.strip).filter(lambda gene: not text_fault(gene) and ", " not in gene)
contexts = st.just("") | st.text(max_size=40).filter(lambda text: not text_fault(text))


@st.composite
def puzzles(draw, max_cells: int = 6, with_answer: bool = False) -> Puzzle:
    cells = draw(st.lists(st.lists(genes, min_size=1, max_size=5), min_size=1, max_size=max_cells))
    n = len(cells)
    types = draw(st.lists(names, min_size=n, max_size=n + 2, unique_by=str.lower))
    answer = draw(st.permutations(types))[:n] if with_answer else None
    return Puzzle(cells, types, answer, draw(contexts))


def shared_items() -> list[dict]:
    folder = os.environ.get("CELLO1_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data"
    path = Path(folder) / "cellpuzzles_unseen_melanoma.json"
    if not path.is_file():
        pytest.skip(f"third-party {path.name} is not here; set CELLO1_SHARED_DATA to the folder that holds it")
    return json.loads(path.read_text())


def test_user_message():
    assert render_user(PUZZLE) == USER
    assert parse_user(USER) == Puzzle(PUZZLE.cells, PUZZLE.candidates, None, PUZZLE.context)


def test_real_items_are_rendered_byte_for_byte():
    items = shared_items()
    assert items
    for item in items:
        puzzle = parse_user(item["user_msg"])
        assert render_user(puzzle) == item["user_msg"]
        assert len(puzzle.cells) == len(puzzle.candidates) == 8
        assert item["system_msg"] == instruction()
        assert messages(puzzle) == [
            {"role": "system", "content": item["system_msg"]},
            {"role": "user", "content": item["user_msg"]},
        ]


@given(puzzle=puzzles(), variant=st.sampled_from(["batch", "batch_open"]))
def test_render_then_parse_gives_the_puzzle_back(puzzle, variant):
    text = render_user(puzzle, variant)
    back = parse_user(text, variant)
    assert render_user(back, variant) == text
    assert (back.cells, back.context) == (puzzle.cells, puzzle.context)
    assert back.candidates == (puzzle.candidates if variant == "batch" else ())


@given(puzzle=puzzles(max_cells=1), variant=st.sampled_from(["single", "single_open"]))
def test_render_then_parse_single_cell(puzzle, variant):
    text = render_user(puzzle, variant)
    assert render_user(parse_user(text, variant), variant) == text
    assert parse_user(text, variant).cells == puzzle.cells


pieces = st.sampled_from(
    [
        *USER.split("\n"),
        "Context: ",
        "Context: a ",
        "Cell 1: A, B",
        "Cell 1: ",
        "\n",
        "\n\n",
        "\n\n",
        " ",
        ", ",
        "a",
        "\u2028",
        "\r",
    ]
)


@given(st.one_of(st.text(), st.lists(pieces, max_size=12).map("".join)))
def test_what_is_parsed_is_rendered_alike(text):
    try:
        puzzle = parse_user(text)
    except ValueError:
        return
    assert render_user(puzzle) == text


@given(st.integers(0, len(USER) - 1), st.sampled_from(["", "\n", " ", "|", "x", ", "]))
def test_damaged_message_is_refused_or_rendered_alike(at, patch):
    test_what_is_parsed_is_rendered_alike.hypothesis.inner_test(USER[:at] + patch + USER[at + 1 :])


def test_empty_context():
    puzzle = Puzzle(PUZZLE.cells, PUZZLE.candidates)
    assert render_user(puzzle).startswith("Context: \n\nCell 1: ALB")
    assert parse_user(render_user(puzzle)) == puzzle


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("Context: ", "context: ", "must start with 'Context: '"),
        ("disease. \n", "disease.\n", "must end with one blank"),
        ("disease. \n\n", "disease. \n", "3 blocks .* found 2"),
        ("MARCO\n\n", "MARCO\n\n\n\n", "3 blocks .* found 4"),
        ("Cell 2: ", "Cell 3: ", "line 2 of the cells must start with 'Cell 2: ', found 'Cell 3: "),
        ("Cell 2: ", "Cell 2:", "line 2 of the cells must start with 'Cell 2: '"),
        ("ALB, APOA1", "ALB,  APOA1", "white space around it"),
        ("ALB, APOA1", "ALB, , APOA1", "cell 1: the gene '' is empty"),
        ("Match the cells", "Match all cells", "must ask 'Match the cells .* found 'Match all cells"),
        ("types:\nKupffer cell\nhepatocyte", "types:", "lists no candidate types"),
        ("hepatocyte", "hepatocyte\n", "the type '' is empty"),
        ("hepatocyte", "hepatocyte ", "white space around it"),
        ("hepatocyte", "kupffer cell", "holds both 'Kupffer cell' and 'kupffer cell'"),
        ("Kupffer cell", "Kupffer | cell", "separates the types"),
        (USER, "", "3 blocks .* found 1"),
    ],
)
def test_what_is_off_is_named(old, new, match):
    assert old in USER
    with pytest.raises(ValueError, match=match):
        parse_user(USER.replace(old, new))


def test_other_refusals():
    with pytest.raises(ValueError, match="must be a str, got NoneType"):
        parse_user(None)
    with pytest.raises(ValueError, match="must end with one blank"):
        parse_user(USER.replace(PUZZLE.context, ""))
    with pytest.raises(ValueError, match="has text after the question: 'x'"):
        parse_user(render_user(PUZZLE, "batch_open") + "\nx", "batch_open")
    with pytest.raises(ValueError, match="must ask 'Name the cell type of each cell above.'"):
        parse_user(USER, "batch_open")
    with pytest.raises(ValueError, match="asks about one cell, the puzzle has 2"):
        render_user(PUZZLE, "single")
    with pytest.raises(ValueError, match="the puzzle has none; use 'batch_open'"):
        render_user(Puzzle(PUZZLE.cells, ()))
    with pytest.raises(ValueError, match="variant must be one of batch, batch_open, single, single_open, got 'solo'"):
        render_user(PUZZLE, "solo")
    with pytest.raises(ValueError, match="layout must be one of system, user, .*, inference, got 'assistant'"):
        messages(PUZZLE, "assistant")


def test_variants_differ_where_the_task_does():
    assert render_user(ONE, "single").split("\n") == [
        "Context: The liver.",
        "",
        "Cell: ALB, TTR",
        "",
        "Match the cell above to one of the following cell types:",
        "Kupffer cell",
        "hepatocyte",
    ]
    assert "hepatocyte" not in render_user(ONE, "single_open")
    assert "Cell 1: ALB" in render_user(ONE, "batch_open")
    texts = [instruction(variant) for variant in VARIANTS]
    assert len(set(texts)) == 4
    assert all("<think> and </think>" in text and "<answer> and </answer>" in text for text in texts)
    assert [("candidate" in text) for text in texts] == [task.candidates for task in VARIANTS.values()]
    assert [("separated by ' | '" in text) for text in texts] == [task.numbered for task in VARIANTS.values()]


def test_layouts():
    assert LAYOUTS == ("system", "user", "user_current", "inference")
    assert all(check_layout(layout) == layout for layout in LAYOUTS)
    assert [m["role"] for m in messages(PUZZLE)] == ["system", "user"]
    assert all([m["role"] for m in messages(PUZZLE, layout)] == ["user"] for layout in LAYOUTS[1:])


# The instruction of the published files, by its bytes: with the sentence that was deleted later, and without.
DIGESTS = {
    "system": "a0a5f3ad62b04e9d",
    "user": "da1ee32e3271f793",
    "user_current": "819c02b8bac0c1a4",
    "inference": "f9c21320abf9a03a",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_every_layout(layout):
    (*system, user) = messages(PUZZLE, layout)
    sentence = ' You must output exactly "<think>...</think>\\n<answer>...</answer>."'
    before, after = instruction().split(" Include your", 1)
    expected = {
        "system": USER,
        "user": f"{USER} {before}{sentence} Include your{after}",
        "user_current": f"{USER} {instruction()}",
        "inference": f"{USER}\n{instruction()}",
    }
    assert user["content"] == expected[layout]
    assert [message["content"] for message in system] == ([instruction()] if layout == "system" else [])
    assert chat(USER, layout)[-1] == user
    text = "".join(message["content"] for message in messages(PUZZLE, layout))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[layout]


def test_published_instructions_are_known():
    assert instructions() == {instruction(), instruction(layout="user")}
    assert instruction("single_open") in instructions("single")
    assert instruction() not in instructions("single")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_question_tells_its_variant(variant):
    assert find_variant(render_user(ONE, variant)) == variant
    assert find_variant("Which?") is None


def test_the_instruction_stands_in_one_file_only():
    sentence = instruction().split(". ")[1]
    files = [p for folder in ("recipe", "scverse_plugin", "tests") for p in (ROOT / folder).rglob("*.py")]
    # Every line of code that holds a quarter of a sentence of it would be a second copy.
    quarter = sentence[: len(sentence) // 4]
    assert [p.name for p in files if quarter in p.read_text(encoding="utf-8")] == ["prompt.py"]


def test_annotation_says_so_where_candidates_outnumber_the_cells():
    cells = (("CD3D",), ("MS4A1",))
    whole = Puzzle(cells, ("B cell", "T cell"))
    assert annotation_messages(whole) == messages(whole)
    spare = Puzzle(cells, ("B cell", "NK cell", "T cell"))
    (system, user), (told, asked) = annotation_messages(spare), messages(spare)
    assert user == asked
    assert system["content"] != told["content"]
    assert annotation_messages(spare)[0]["content"].split(".")[0] == told["content"].split(".")[0]


@pytest.mark.parametrize("evidence", ["cells", "markers"])
def test_free_messages_show_no_candidates(evidence):
    found = free_messages(PUZZLE, "system", evidence)
    text = "\n".join(message["content"] for message in found)
    assert [message["role"] for message in found] == ["system", "user"]
    assert "CD5L, MARCO" in text and "hepatocyte" not in text


def test_free_messages_know_two_kinds_of_evidence():
    with pytest.raises(ValueError, match="evidence must be one of cells, markers, got 'genes'"):
        free_messages(PUZZLE, "system", "genes")
