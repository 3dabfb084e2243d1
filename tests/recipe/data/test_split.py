from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.data.split import group_puzzles, quotas_of, split_puzzles

SIZES = range(8, 16)


def keys_of(rows) -> list[np.ndarray]:
    return [np.array(row, dtype=np.uint64) for row in rows]


# ---------------------------------------------------------------------------------------------------------- quotas


def test_quotas_of_a_small_set_are_a_tenth():
    assert quotas_of({8: 100, 9: 25, 10: 3}) == {8: 10, 9: 2, 10: 1}


def test_quotas_of_a_small_set_with_a_least_number():
    assert quotas_of({8: 100, 9: 25, 10: 3}, min_per_stratum=5) == {8: 10, 9: 5, 10: 2}


def test_quotas_of_the_published_size():
    counts = {8: 1500, 9: 1400, 10: 1200, 11: 1100, 12: 1000, 13: 900, 14: 600, 15: 307}
    quotas = quotas_of(counts)
    assert 1090 <= sum(quotas.values()) <= 1100
    assert all(quota >= 5 for quota in quotas.values())
    assert max(abs(quotas[n] / counts[n] - 1100 / 8007) for n in counts) < 0.02


def test_a_large_set_has_at_least_five_of_each_size():
    quotas = quotas_of({8: 20_000, 15: 40})
    assert quotas[15] >= 5
    assert sum(quotas.values()) <= 1100


def test_a_rare_size_keeps_one_for_training():
    assert quotas_of({8: 20_000, 15: 4})[15] == 3
    assert quotas_of({8: 1, 9: 50}) == {8: 0, 9: 5}


def test_a_set_just_above_the_limit_is_not_eaten_up():
    assert sum(quotas_of({8: 1101}).values()) == 220


def test_more_sizes_than_the_limit_can_serve():
    quotas = quotas_of(dict.fromkeys(range(40), 100), max_test=100)
    assert sum(quotas.values()) <= 100
    assert min(quotas.values()) >= 1


@given(st.dictionaries(st.integers(1, 30), st.integers(1, 5000), min_size=1), st.integers(50, 2000))
def test_quotas_keep_their_limits(counts, max_test):
    quotas = quotas_of(counts, max_test)
    assert sum(quotas.values()) <= max(max_test, len(counts))
    assert all(0 <= quotas[n] < counts[n] or counts[n] == 1 for n in counts)
    assert all(quotas[n] == 0 for n in counts if counts[n] == 1)


# ---------------------------------------------------------------------------------------------------------- groups


def test_groups_are_joined_by_chains():
    assert group_puzzles(keys_of([[1], [2], [2, 3], [3, 1], [], [9]])).tolist() == [0, 0, 0, 0, 1, 2]
    assert group_puzzles([]).tolist() == []
    assert group_puzzles(keys_of([[], []])).tolist() == [0, 1]


@given(st.lists(st.lists(st.integers(0, 12), max_size=3), max_size=25))
def test_groups_equal_those_of_a_naive_search(rows):
    groups = group_puzzles(keys_of(rows))
    merged = [{i} for i in range(len(rows))]
    for i, row in enumerate(rows):
        for j in range(i):
            if set(row) & set(rows[j]) and merged[i] is not merged[j]:
                merged[i] |= merged[j]
                for k in merged[i]:
                    merged[k] = merged[i]
    expected = [min(merged[i]) for i in range(len(rows))]
    assert [groups[i] == groups[j] for i in range(len(rows)) for j in range(i)] == [
        expected[i] == expected[j] for i in range(len(rows)) for j in range(i)
    ]


# ---------------------------------------------------------------------------------------------------------- splits


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(20, 200))
def test_nothing_is_on_both_sides_and_nothing_is_lost(seed, n_donors, n):
    rng = np.random.default_rng(seed)
    donors = rng.integers(n_donors, size=n)
    keys = keys_of([[donor, *rng.integers(1000, 10**9, 3)] for donor in donors])
    strata = rng.integers(8, 16, size=n)
    try:
        split = split_puzzles(strata, keys, rng=np.random.default_rng(seed))
    except ValueError as error:
        assert "small enough" in str(error)  # as when the largest donor has nearly everything
        return
    parts = (split.train, split.test, split.left_out)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert len(split.train) and len(split.test)
    train = set(donors[split.train].tolist())
    assert not train & set(donors[split.test].tolist())
    assert not train & set(donors[split.left_out].tolist())
    taken = Counter(strata[split.test].tolist())
    assert all(taken[size] <= split.quotas[size] for size in taken)


def test_many_donors_fill_the_quotas_and_leave_little_out():
    rng = np.random.default_rng(0)
    n = 8000
    donors = rng.integers(400, size=n)
    split = split_puzzles(rng.integers(8, 16, size=n), keys_of([[d] for d in donors]), rng=rng)
    assert len(split.test) > 0.97 * sum(split.quotas.values())
    assert len(split.left_out) < 0.2 * len(split.test)


def test_by_puzzle_is_exact():
    strata = np.repeat(SIZES, 1000)
    split = split_puzzles(strata, keys_of([[]] * len(strata)), rng=np.random.default_rng(0))
    assert Counter(strata[split.test].tolist()) == split.quotas
    assert sum(split.quotas.values()) <= 1100
    assert len(split.left_out) == 0


def test_of_two_large_groups_one_is_taken_and_its_rest_left_out():
    strata = np.repeat(8, 200)
    split = split_puzzles(strata, keys_of([[i % 2] for i in range(200)]), rng=np.random.default_rng(0))
    assert (len(split.train), len(split.test), len(split.left_out)) == (100, 20, 80)


def test_the_seed_decides():
    strata = np.repeat(SIZES, 50)
    keys = keys_of([[i % 40] for i in range(400)])
    splits = [split_puzzles(strata, keys, rng=np.random.default_rng(seed)).test.tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    ("strata", "keys", "match"),
    [
        ([8], [[]], "1 puzzles cannot be split"),
        ([], [], "0 puzzles cannot be split"),
        ([8, 8, 8], [[1], [1, 2], [2]], "all puzzles belong together"),
        ([8] * 11, [[1]] * 10 + [[2]], None),
        ([8, 9], [[], []], "small enough to be held out"),
    ],
)
def test_what_cannot_be_split(strata, keys, match):
    keys = keys_of(keys)
    if match is None:
        assert len(split_puzzles(strata, keys, rng=np.random.default_rng(0)).test) == 1
        return
    with pytest.raises(ValueError, match=match):
        split_puzzles(strata, keys, rng=np.random.default_rng(0))


def test_a_limit_of_nothing():
    with pytest.raises(ValueError, match="at least one puzzle"):
        split_puzzles([8, 8], keys_of([[], []]), rng=np.random.default_rng(0), max_test=0)
