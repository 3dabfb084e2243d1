import numpy as np
import pytest

from recipe.cello1.engines.token_tree import token_tree


def test_labels_of_one_token_need_one_context():
    tree = token_tree([[1, 2, 7], [1, 2, 8], [1, 2, 9]])
    assert tree.contexts == [([1, 2], [7, 8, 9])]
    np.testing.assert_array_equal(tree.total([np.array([-1.0, -2.0, -3.0])]), [-1.0, -2.0, -3.0])


def test_shared_beginnings_are_computed_once_and_a_text_that_ends_there_counts_no_more():
    tree = token_tree([[1, 5, 6], [1, 5, 7], [1, 5], [1, 8]])
    assert tree.contexts == [([1], [5, 8]), ([1, 5], [6, 7])]
    total = tree.total([np.array([-1.0, -4.0]), np.array([-0.5, -0.25])])
    np.testing.assert_array_equal(total, [-1.5, -1.25, -1.0, -4.0])


@pytest.mark.parametrize("texts", [[], [[1, 2], [1, 2]], [[3], [4]]])
def test_texts_that_cannot_be_compared_are_refused(texts):
    with pytest.raises(ValueError, match="options must be different texts"):
        token_tree(texts)
