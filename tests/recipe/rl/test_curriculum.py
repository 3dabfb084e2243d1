import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.formats.rl_rows import puzzle_from_rl_row, rl_row
from recipe.cello1.rl.curriculum import augmented, augmented_row, pass_order, permuted
from recipe.cello1.task.answer import split_types, text_fault, type_fault
from recipe.cello1.task.order import SIZE_ORDERS
from recipe.cello1.task.prompt import LAYOUTS, messages, parse_user
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import normal_form

sizes = st.lists(st.integers(1, 6), max_size=60)
seeds = st.integers(0, 2**32 - 1)
names = st.text(min_size=1, max_size=8).map(normal_form).map(str.strip).filter(lambda name: not type_fault(name))
genes = st.text("ABCDE123-.", min_size=1, max_size=6).filter(lambda gene: not text_fault(gene))


@st.composite
def puzzles(draw) -> Puzzle:
    # Different first genes, so that a cell can be recognised wherever it stands.
    n = draw(st.integers(1, 6))
    cells = [(f"CELL{i}", *draw(st.lists(genes, max_size=3))) for i in range(n)]
    types = draw(st.lists(names, min_size=n, max_size=n + 2, unique_by=str.lower))
    return Puzzle(cells, types, draw(st.permutations(types))[:n], "The cell is from blood.")


def pairs(puzzle: Puzzle) -> dict[tuple[str, ...], str]:
    return dict(zip(puzzle.cells, puzzle.answer, strict=True))


@given(sizes, st.sampled_from(SIZE_ORDERS), seeds)
def test_every_puzzle_comes_once(sizes, order, seed):
    assert sorted(pass_order(sizes, order, seed=seed)) == list(range(len(sizes)))


@given(sizes, seeds)
def test_ascending_and_descending(sizes, seed):
    up = [sizes[i] for i in pass_order(sizes, "ascending", seed=seed)]
    down = [sizes[i] for i in pass_order(sizes, "descending", seed=seed)]
    assert up == sorted(sizes)
    assert down == sorted(sizes, reverse=True)


@given(sizes, seeds)
def test_every_stretch_of_mixed_holds_the_mix_of_the_whole(sizes, seed):
    found = [sizes[i] for i in pass_order(sizes, "mixed", seed=seed)]
    kinds = sorted(set(sizes))
    for start in range(len(found)):
        for stop in range(start + 1, len(found) + 1):
            for size in kinds:
                expected = (stop - start) * sizes.count(size) / len(sizes)
                assert abs(found[start:stop].count(size) - expected) <= 1 + len(kinds)


def test_few_large_puzzles_are_spread_over_the_whole():
    found = [([3] * 90 + [9] * 3)[i] for i in pass_order([3] * 90 + [9] * 3, "mixed", seed=1)]
    assert [i for i, size in enumerate(found) if size == 9] == [15, 46, 77]


def test_passes_differ_and_can_be_made_again():
    sizes = [3] * 20
    first, second = (pass_order(sizes, "mixed", seed=1, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert first == pass_order(sizes, "mixed", seed=1)
    assert first != pass_order(sizes, "mixed", seed=2)


@given(puzzles(), seeds)
def test_gold_goes_with_the_cells(puzzle, seed):
    other = permuted(puzzle, np.random.default_rng(seed))
    assert pairs(other) == pairs(puzzle)
    assert sorted(other.candidates) == sorted(puzzle.candidates)
    assert other.context == puzzle.context


@given(puzzles(), seeds, st.integers(0, 1000), st.integers(0, 5), st.sampled_from(LAYOUTS))
def test_prompt_question_and_gold_of_a_row_belong_together(puzzle, seed, index, copy, layout):
    row = rl_row(puzzle, "train", index, layout)
    found = augmented_row(row, seed=seed, index=index, copy=copy)
    wanted = augmented(puzzle, seed=seed, index=index, copy=copy)
    assert pairs(wanted) == pairs(puzzle)
    assert found["prompt"] == messages(wanted, layout)
    assert parse_user(found["extra_info"]["question"]).cells == wanted.cells
    assert split_types(found["reward_model"]["ground_truth"]) == wanted.answer
    assert found["extra_info"]["answer"] == found["reward_model"]["ground_truth"]
    assert puzzle_from_rl_row(found) == wanted
    assert found["extra_info"]["copy"] == copy
    if copy == 0:
        found["extra_info"].pop("copy")
        assert found == row


def test_copies_differ_and_can_be_made_again():
    cells = tuple((f"G{i}",) for i in range(8))
    types = tuple(f"type {i}" for i in range(8))
    puzzle = Puzzle(cells, types, types)
    made = [augmented(puzzle, seed=s, index=i, copy=c) for s, i, c in ((1, 0, 1), (1, 0, 2), (1, 1, 1), (2, 0, 1))]
    assert len({p.cells for p in made}) == len({p.candidates for p in made}) == 4
    assert augmented(puzzle, seed=1, index=0, copy=1) == made[0]
    assert augmented(puzzle, seed=1, index=0, copy=0) is puzzle


def test_position_says_nothing_in_the_long_run():
    puzzle = Puzzle((("A",), ("B",)), ("x", "y"), ("x", "y"))
    made = [augmented(puzzle, seed=1, index=i, copy=1) for i in range(400)]
    for first in (sum(p.answer[0] == "x" for p in made), sum(p.answer[0] == p.candidates[0] for p in made)):
        assert 150 < first < 250


def test_cell_ids_go_with_the_cells():
    puzzle = Puzzle((("A",), ("B",), ("C",)), ("x", "y", "z"), ("x", "y", "z"), meta={"cell_ids": ["a", "b", "c"]})
    for copy in range(1, 6):
        other = augmented(puzzle, seed=1, index=0, copy=copy)
        assert [cell[0].lower() for cell in other.cells] == other.meta["cell_ids"]
    with pytest.raises(ValueError, match=r"must be a list of 3 ids, got \['a'\]"):
        permuted(Puzzle(puzzle.cells, puzzle.candidates, meta={"cell_ids": ["a"]}), np.random.default_rng(0))
    for ids in (5, "abc"):
        with pytest.raises(ValueError, match=rf"must be a list of 3 ids, got {ids!r}"):
            permuted(Puzzle(puzzle.cells, puzzle.candidates, meta={"cell_ids": ids}), np.random.default_rng(0))


def test_traces_are_not_torn_from_their_cells():
    puzzle = Puzzle((("A",), ("B",)), ("x", "y"), ("x", "y"), meta={"reasoning": "Cell 1: A -> x"})
    with pytest.raises(ValueError, match="names the cells by number"):
        permuted(puzzle, np.random.default_rng(0))


def test_rows_that_cannot_be_asked_in_another_order():
    row = rl_row(Puzzle((("A",), ("B",)), ("x", "y"), ("x", "y")), "train", 0)
    with pytest.raises(ValueError, match=r"row 7, column 'prompt': .* set data.prompt_layout"):
        augmented_row({**row, "prompt": [{"role": "user", "content": "?"}]}, seed=1, index=7, copy=1)
    with pytest.raises(ValueError, match="row 7, column 'extra_info': has no 'question'"):
        augmented_row({**row, "extra_info": {"index": 0}}, seed=1, index=7, copy=1)
