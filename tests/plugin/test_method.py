import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task.answer import join_types
from scverse_plugin.method import _plan, _solve, _tally
from scverse_plugin.method._ask import Reply, readable
from scverse_plugin.method._engines import public_address
from scverse_plugin.method._units import Unit, draw_cells


def say(types):
    """An answer without reasoning; a text is a list of one-letter types, which may repeat."""
    return f"<think></think>\n<answer>{join_types(list(types))}</answer>"


def units(n, donors=("",), cells=3):
    return [
        Unit(
            f"g{i}", "", tuple(range(i * cells, (i + 1) * cells)), tuple(donors[j % len(donors)] for j in range(cells))
        )
        for i in range(n)
    ]


def test_puzzle_size():
    size = _plan.choose_puzzle_size
    assert [size(5, 10, cells=False), size(30, 40, cells=False), size(1, 9, cells=False)] == [5, 8, 1]
    assert [size(20, 10, cells=False), size(20, 2, cells=False), size(3, 1, cells=False)] == [5, 1, 1]
    assert size(1000, 10, cells=True) == 1


@given(st.integers(1, 25), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_every_unit_is_in_every_round_and_donors_stay_apart(n, size, n_donors, seed):
    donors = [f"d{i}" for i in range(n_donors)]
    found = units(n, donors)
    members = _plan.Members(found, dict.fromkeys(donors, size), np.random.default_rng(seed))
    for _ in range(3):
        puzzles = members.round()
        seen = [unit for _, chosen, _ in puzzles for unit in chosen]
        assert set(seen) == set(range(n))
        for donor, chosen, rows in puzzles:
            assert 1 <= len(chosen) <= size and len(set(chosen)) == len(chosen)
            for unit, row in zip(chosen, rows, strict=True):
                assert found[unit].donors[found[unit].cells.index(row)] == donor


@given(st.integers(1, 25), st.integers(1, 9), st.integers(0, 99))
def test_full_puzzles_have_all_their_cells(n, size, seed):
    donors = ["d0", "d1"]
    members = _plan.Members(units(n, donors), dict.fromkeys(donors, size), np.random.default_rng(seed), ["d0"])
    puzzles = [members.round() for _ in range(3)]
    assert all({unit for _, chosen, _ in part for unit in chosen} == set(range(n)) for part in puzzles)
    sizes = {len(chosen) for part in puzzles for donor, chosen, _ in part if donor == "d0"}
    assert sizes <= {min(n, size)}


@pytest.mark.parametrize(("n_units", "n_types", "size"), [(7, 9, 4), (9, 4, 4), (9, 12, 5), (4, 4, 4)])
def test_there_are_as_many_candidates_as_cells_where_there_can_be(n_units, n_types, size):
    """As in training: a small model fails on puzzles with more candidates than cells."""
    types = tuple(f"t{i:02}" for i in range(n_types))
    lists = _solve.Lists(types, {"": types}, size=size)
    shapes = set()

    def ask(drafts):
        shapes.update((draft.screening, len(draft.members), len(draft.candidates)) for draft in drafts)
        return [Reply(say(draft.candidates[: len(draft.members)])) for draft in drafts]

    _solve.solve(units(n_units), lists, {"": size}, 6, ask, np.random.default_rng(0))
    assert {shape[1:] for shape in shapes} == {(size, size)}
    assert {shape[0] for shape in shapes} == ({True, False} if n_types > size else {False})


def test_no_puzzle_has_more_cells_than_types_that_are_no_decoys():
    """One to one, a decoy would have to be chosen."""
    types = tuple(f"t{i:02}" for i in range(12))
    lists = _solve.Lists(types, {"": types}, ("x0", "x1"), 5)
    found = _solve.final_rounds(units(9), lists, {"": 5}, 6, np.random.default_rng(0), _tallied(types, 9))
    assert {sum(name in types for name in draft.candidates) - len(draft.members) >= 0 for draft in found} == {True}


def _tallied(types, n_units):
    votes = np.random.default_rng(0).random((n_units, len(types)))
    return _tally.Tally(types, 0, votes, np.ones_like(votes), *np.zeros((2, n_units), int), 0, np.zeros((0, 5), int))


def test_cells_take_turns():
    members = _plan.Members(units(4, cells=5), {"": 4}, np.random.default_rng(0))
    rows = [row for _ in range(10) for _, _, rows in members.round() for row in rows]
    assert set(np.unique(rows, return_counts=True)[1].tolist()) == {2}


def test_members_and_orders_vary():
    members = _plan.Members(units(8), {"": 4}, np.random.default_rng(0))
    puzzles = [chosen for _ in range(10) for _, chosen, _ in members.round()]
    assert len(set(puzzles)) == len(puzzles) and len({frozenset(chosen) for chosen in puzzles}) > 10


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_blocks_hold_every_type(n, size, seed):
    types = [f"t{i}" for i in range(n)]
    blocks = _plan.candidate_blocks(types, size, np.random.default_rng(seed))
    assert {name for block in blocks for name in block} == set(types)
    assert all(len(set(block)) == len(block) == min(size, n) for block in blocks)


def test_leading_candidates_take_the_best_of_each():
    rates = np.array([[0.9, 0.8, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]])
    found = _plan.leading_candidates(rates, list("abcd"), [0, 1], 2, np.random.default_rng(0))
    assert sorted(found) == ["a", "c"]
    assert sorted(_plan.leading_candidates(rates, list("abcd"), [0, 1], 4, np.random.default_rng(0))) == list("abcd")


def test_cells_are_drawn_from_all_donors():
    donors = np.array([0] * 50 + [1] * 2 + [2])
    rows = draw_cells(np.arange(53), donors, 3, np.random.default_rng(0))
    assert set(donors[rows].tolist()) == {0, 1, 2}
    assert sorted(draw_cells(np.arange(53), donors, 100, np.random.default_rng(0)).tolist()) == list(range(53))


def draft(members, candidates, cells=None):
    return _plan.Draft(1, "", tuple(members), tuple(cells or members), tuple(candidates))


def tally(drafts, texts, n=2, types=("a", "b", "c"), decoys=()):
    return _tally.count(drafts, texts, n, types, decoys)


def call(found, one_to_one=(), min_support=0.0):
    allowed = np.ones((len(found.votes), len(found.types) - found.n_decoys), dtype=bool)
    return _tally.call(found, allowed, samples=[""] * len(found.votes), one_to_one=one_to_one, min_support=min_support)


def test_votes_count_against_meetings():
    drafts = [draft([0, 1], "ab"), draft([0, 1], "abc"), draft([1, 0], "bc")]
    found = tally(drafts, [say("ab"), say("AB"), say("bc")])
    assert found.votes.tolist() == [[2, 0, 1], [0, 3, 0]]
    assert found.met.tolist() == [[2, 3, 2], [2, 3, 2]]
    assert found.rates[0].tolist() == [1, 0, 0.5]
    calls = call(found)
    assert calls.best.tolist() == [0, 1] and calls.support.tolist() == [1, 1]
    assert calls.runner_up.tolist() == [2, -1] and calls.margin.tolist() == [0.5, 1]


def test_failures_are_no_votes_and_no_meetings():
    drafts = [draft([0, 1], "ab")] * 4
    texts = [None, "junk", say(["a", "x"]), say(["a", "b", "c"])]
    found = tally(drafts, texts)
    assert found.failures.tolist() == [3, 4] and found.puzzles.tolist() == [4, 4]
    assert found.met[0].tolist() == [1, 1, 0] and not found.met[1].any()
    assert call(found).status == ("ok", "no_votes") and call(found).best.tolist() == [0, -1]


def test_one_to_one_takes_the_best_matching():
    drafts = [draft([0], "ab")] * 10 + [draft([1], "ab")] * 10
    texts = [say(x) for x in "a" * 16 + "b" * 4]
    assert call(tally(drafts, texts)).best.tolist() == [0, 0]
    calls = call(tally(drafts, texts), one_to_one=("",))
    assert calls.best.tolist() == [0, 1] and calls.margin[1] == pytest.approx(-0.2)


def test_naming_a_type_twice_fails_the_cells_concerned():
    found = tally([draft([0, 1], "abc")] * 3, [say(["a", "A"]), say(["x", "x"]), say(["a", "x"])])
    assert found.repeated == 2 and found.failures.tolist() == [2, 3] and found.votes.sum() == 1
    found = tally([draft([0, 1, 2], "abc")], [say(["a", "b", "A"])], n=3)
    assert found.votes.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert found.met.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]] and found.failures.tolist() == [1, 0, 1]


def test_many_meetings_outweigh_one():
    drafts = [draft([0], "ab")] * 9 + [draft([0], "bc")]
    texts = [say("a")] * 8 + [say("b")] + [say("c")]
    assert call(tally(drafts, texts, n=1)).best.tolist() == [0]


def test_thresholds_and_ties():
    drafts = [draft([0], "ab")] * 4
    split = tally(drafts, [say(x) for x in "aabb"], n=1)
    assert call(split).status == ("tie",)
    most = tally(drafts, [say(x) for x in "aaab"], n=1)
    assert call(most, min_support=0.75).status == ("ok",) and call(most, min_support=0.76).status == ("low_support",)


def test_decoys():
    drafts = [draft([0], "abz")] * 4
    found = tally(drafts, [say(x) for x in "azzz"], n=1, types=("a", "b"), decoys=("z",))
    assert call(found).status == ("decoy",) and call(found).best.tolist() == [0]
    assert _tally.decoy_rate(found) == 0.75
    assert np.isnan(_tally.decoy_rate(tally(drafts[:1], ["a"], types=("a", "b", "z"))))


def cell_votes(pattern):
    """One group; each item is a cell and what was said of it."""
    drafts = [draft([0], "ab", [cell]) for cell, votes in enumerate(pattern) for _ in votes]
    return tally(drafts, [say(vote) for votes in pattern for vote in votes], n=1)


def test_mixtures_differ_from_doubt():
    mixture = _tally.check_cells(cell_votes(["aaaa", "bbbb", "aaaa", "bbbb"]), np.array([0]))
    assert mixture.mixed.tolist() == [True] and mixture.agreement.tolist() == [0.5]
    doubt = _tally.check_cells(cell_votes(["abab", "baba", "abba", "baab"]), np.array([0]))
    assert doubt.mixed.tolist() == [False]
    once = _tally.check_cells(cell_votes(["a", "b"]), np.array([0]))
    assert np.isnan(once.gap[0]) and once.mixed.tolist() == [False]


def test_position_bias():
    drafts = [draft([0, 1], "ab"), draft([1, 0], "ab")] * 20
    found = tally(drafts, [say("ab")] * 40)
    bias = _tally.position_bias(found, np.array([0, 1]))
    assert bias.n.tolist() == [40, 40] and bias.agreement.tolist() == [0.5, 0.5] and bias.p_value == 1
    first = [draft([0, 1], "ab")] * 20 + [draft([1, 0], "abc")] * 20
    found = tally(first, [say("ab")] * 20 + [say("bc")] * 20)
    bias = _tally.position_bias(found, np.array([0, 1]))
    assert bias.agreement.tolist() == [1, 0.5] and bias.p_value < 0.01


def test_rounds_add_up_with_screening():
    types = tuple(f"t{i:02d}" for i in range(20))
    lists = _solve.Lists(types, {"": types}, size=5)
    asked = []

    def ask(drafts):
        asked.append(drafts)
        texts = []
        for d in drafts:
            own = [f"t{unit:02d}" for unit in d.members]
            free = [name for name in d.candidates if name not in own]
            texts.append(say([name if name in d.candidates else free.pop() for name in own]))
        return [Reply(text) for text in texts]

    solved = _solve.solve(units(4), lists, {"": 4}, 7, ask, np.random.default_rng(0))
    assert [drafts[0].screening for drafts in asked] == [True, False, False, False]
    assert [d.round for drafts in asked[1:] for d in drafts] == [1, 2, 3, 4, 5, 6, 7]
    assert call(solved.tally).best.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("http://user:secret@host:8000/v1?key=secret#x", "http://host:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        (None, ""),
    ],
)
def test_addresses_are_kept_without_secrets(url, public):
    assert public_address(url) == public


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>a</think>\n<answer>x | y</answer>", None),
        ("<answer>x | y</answer>", "<think></think>\n<answer>x | y</answer>"),
        ("So it is.\n\n<answer>\nx | y\n</answer>\n", "<think>So it is.</think>\n<answer>x | y</answer>"),
        ("<think>a</think> <answer>x | y</answer> Done.", "<think>a</think>\n<answer>x | y</answer>"),
        ("<answer>\nx |\ny\n  | z</answer>", "<think></think>\n<answer>x | y | z</answer>"),
        ("<answer>x\ny | z</answer>", None),
        ("a</think><answer>x</answer>", "<think>a</think>\n<answer>x</answer>"),
        ("<answer>x | y</answer> or <answer>y | x</answer>", None),
        ("<answer>x | y", None),
        ("<answer>x | y\ny | x</answer>", None),
        ("<answer></answer>", None),
        ("x | y", None),
    ],
)
def test_what_can_be_read_without_guessing(text, wanted):
    assert readable(text) == (text if wanted is None else wanted)
