import numpy as np
import pytest

from recipe.cello1.evaluation.baseline import NaiveBayes, puzzle_cells
from recipe.cello1.task.puzzle import Puzzle

B, NK, T = "B cell", "NK cell", "T cell"
CELLS = [("CD79A", "CD74"), ("CD79A", "ACTB"), ("GNLY", "NKG7"), ("GNLY", "ACTB"), ("CD3D", "ACTB"), ("CD3D", "IL7R")]
TYPES = [B, B, NK, NK, T, T]


def fitted():
    return NaiveBayes.fit(CELLS, TYPES)


def test_probabilities_are_those_of_bernoulli_naive_bayes():
    bayes = fitted()
    genes = sorted({gene for cell in CELLS for gene in cell})
    expected = []
    for name in (B, T):
        own = [cell for cell, label in zip(CELLS, TYPES, strict=True) if label == name]
        share = [(sum(gene in cell for cell in own) + 0.3) / (len(own) + 0.6) for gene in genes]
        listed = [gene in ("CD79A", "ACTB") for gene in genes]
        expected.append(np.prod([p if there else 1 - p for p, there in zip(share, listed, strict=True)]))
    found = np.exp(bayes.log_probabilities([("CD79A", "ACTB")], [B, T]))
    np.testing.assert_allclose(found, [np.array(expected) / sum(expected)])
    assert found.dtype == np.float64


def test_each_row_adds_up_to_one_and_the_order_of_candidates_and_genes_does_not_matter():
    bayes = fitted()
    found = bayes.log_probabilities(CELLS, [B, NK, T])
    assert found.shape == (6, 3)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1)
    np.testing.assert_allclose(found[:, ::-1], bayes.log_probabilities(CELLS, [T, NK, B]))
    np.testing.assert_allclose(found, bayes.log_probabilities([cell[::-1] for cell in CELLS], [B, NK, T]))


def test_genes_that_training_has_not_seen_are_ignored():
    bayes = fitted()
    np.testing.assert_array_equal(
        bayes.log_probabilities([("CD79A", "NEW1", "NEW2")], [B, T]), bayes.log_probabilities([("CD79A",)], [B, T])
    )
    np.testing.assert_allclose(np.exp(NaiveBayes.fit([("A",)], [B]).log_probabilities([("Z",)], [B])), [[1.0]])


def test_a_type_that_training_has_not_seen_is_an_average_one():
    bayes = fitted()
    found = bayes.log_probabilities([("CD79A", "CD74"), ("ACTB",), ("UNKNOWN",)], [B, "mast cell", "acinar cell"])
    assert np.isfinite(found).all()
    assert found[0].argmax() == 0
    np.testing.assert_array_equal(found[:, 1], found[:, 2])
    # Likelier than a type whose markers are missing, less likely than one whose markers are there.
    (scores,) = bayes.log_probabilities([("CD79A", "CD74")], [B, "mast cell", T])
    assert scores[0] > scores[1] > scores[2]


def test_the_answers_are_a_matching_and_the_likeliest_type_of_each_cell():
    bayes = fitted()
    found = bayes.answers([("CD79A", "CD74"), ("CD79A", "CD74", "GNLY")], (B, NK))
    assert found["naive_bayes_matched"] == (B, NK)
    assert found["naive_bayes"][0] == B
    both = bayes.answers([("CD79A", "CD74"), ("CD79A", "CD74")], (B, NK))
    assert both["naive_bayes"] == (B, B)
    assert sorted(both["naive_bayes_matched"]) == [B, NK]
    assert set(bayes.answers([("CD3D",)], (B, NK, T)).values()) == {(T,)}  # more candidates than cells


def test_cells_of_puzzles_are_taken_once():
    first = Puzzle((("A",), ("B",)), (B, T), (B, T), meta={"cell_ids": ["c1", "c2"], "dataset": "d"})
    second = Puzzle((("B",), ("A",)), (B, T), (T, B), meta={"cell_ids": ["c2", "c3"], "dataset": "d"})
    other = Puzzle((("A",), ("B",)), (B, T), (B, T), meta={"cell_ids": ["c1", "c2"], "dataset": "e"})
    assert puzzle_cells([first, second]) == ([("A",), ("B",), ("A",)], [B, T, B])
    assert len(puzzle_cells([first, second, other])[0]) == 5
    nameless = Puzzle(first.cells, first.candidates, first.answer)
    assert puzzle_cells([nameless, nameless]) == ([("A",), ("B",)], [B, T])


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="same length"):
        NaiveBayes.fit([], [])
    with pytest.raises(ValueError, match="same length"):
        NaiveBayes.fit(CELLS, TYPES[:-1])
    with pytest.raises(ValueError, match="alpha must be positive"):
        NaiveBayes.fit(CELLS, TYPES, alpha=0)
    with pytest.raises(ValueError, match="candidates is empty"):
        fitted().log_probabilities(CELLS, [])
    with pytest.raises(ValueError, match="2 cells cannot have different types of 1"):
        fitted().answers([("A",), ("B",)], (B,))
    with pytest.raises(ValueError, match="has no answer"):
        puzzle_cells([Puzzle((("A",),), (B,))])
