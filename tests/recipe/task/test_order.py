from itertools import zip_longest

import numpy as np
import pytest

from recipe.cello1.task.order import check_order, order_by_size


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 1), (7,), (50, 50, 50, 50)])
def test_equal_numbers_take_turns(counts):
    """What the embedded default is built with: its bytes depend on this order."""
    sizes = [size for size, count in enumerate(counts, start=3) for _ in range(count)]
    by_size = {}
    for i in np.random.default_rng(7).permutation(len(sizes)).tolist():
        by_size.setdefault(sizes[i], []).append(i)
    turns = [i for turn in zip_longest(*[by_size[size] for size in sorted(by_size)]) for i in turn]
    assert order_by_size(sizes, "mixed", np.random.default_rng(7)) == turns


def test_unknown_order():
    with pytest.raises(ValueError, match="order must be one of ascending, descending, mixed, got 'random'"):
        check_order("random")
    with pytest.raises(ValueError, match="order must be one of"):
        order_by_size([1], "up", np.random.default_rng(0))
