"""A puzzle, its item, and hypothesis strategies for any puzzle."""

from hypothesis import strategies as st

from recipe.cello1.formats.items import puzzle_to_item
from recipe.cello1.task.answer import TAGS, text_fault, type_fault
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import normal_form

PUZZLE = Puzzle(
    cells=(("ALB", "TTR"), ("CD5L", "MARCO")),
    candidates=("Kupffer cell", "hepatocyte"),
    answer=("hepatocyte", "Kupffer cell"),
    context="The liver of a donor.",
    meta={"donor_id": "D7", "tissue": "liver", "n_counts": 3},
)


ITEM = puzzle_to_item(PUZZLE)


USER = ITEM["user_msg"]


HOW = {"index": 4, "engine": "vllm", "sampling": {"temperature": 0.0, "seed": 1}}


names = st.text(min_size=1, max_size=8).map(normal_form).map(str.strip).filter(lambda name: not type_fault(name))


genes = st.text(min_size=1, max_size=6).map(str.strip).filter(lambda gene: not text_fault(gene) and ", " not in gene)


reasonings = st.text(max_size=30).filter(lambda text: not any(tag in text for tag in TAGS))


values = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)


@st.composite
def puzzles(draw) -> Puzzle:
    cells = draw(st.lists(st.lists(genes, min_size=1, max_size=4), min_size=1, max_size=5))
    types = draw(st.lists(names, min_size=len(cells), max_size=len(cells) + 1, unique_by=str.lower))
    context = draw(st.just("") | st.text(max_size=20).filter(lambda text: not text_fault(text)))
    meta = draw(st.dictionaries(st.sampled_from(["donor_id", "tissue", "cell_ids", "x"]), values | st.lists(values)))
    if draw(st.booleans()):
        meta["reasoning"] = draw(reasonings)
    return Puzzle(cells, sorted(types), draw(st.permutations(types))[: len(cells)], context, meta)
