"""The baseline without a language model: naive Bayes on gene lists, with and without one-to-one matching.

A gene is either in a cell's list or not (Bernoulli); the order of the list is not used. Every type has the same prior,
as every candidate of a puzzle has a cell of its own. It learns from the labelled cells of the training puzzles, so that
model and baseline have seen the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax

from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.puzzle import Puzzle, labelled_cells

BASELINES = ("naive_bayes_matched", "naive_bayes")
ALPHA = 0.3
Cell = tuple[str, ...]


def puzzle_cells(puzzles: Iterable[Puzzle]) -> tuple[list[Cell], list[str]]:
    """Collect genes and type of the cells of puzzles, each cell once."""
    found = labelled_cells(puzzles)
    return [genes for genes, _, _ in found], [cell_type for _, cell_type, _ in found]


@dataclass(frozen=True, slots=True, eq=False)
class NaiveBayes:
    """How common each gene is in the lists of each type."""

    # Row of each type that was learned, and column of each gene
    types: dict[str, int]
    genes: dict[str, int]
    # Log-odds that a list of the type holds the gene, float64 (n_types + 1, n_genes); the last row stands for a type
    # that was not learned, which is taken for an average one
    odds: np.ndarray
    # Log-probability of a list that holds none of the genes, float64 (n_types + 1,)
    empty: np.ndarray

    @classmethod
    def fit(cls, cells: Sequence[Cell], types: Sequence[str], alpha: float = ALPHA) -> NaiveBayes:
        """Learn from labelled cells; ``alpha`` cells with each gene and as many without are added to every type."""
        if not cells or len(cells) != len(types):
            msg = f"cells and types must have the same length, at least 1; got {len(cells)} and {len(types)}"
            raise ValueError(msg)
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha!r}; at 0 one unseen gene would rule a type out")
        row = {name: i for i, name in enumerate(sorted(set(types)))}
        column = {gene: j for j, gene in enumerate(sorted({gene for genes in cells for gene in genes}))}
        counts, total = np.zeros((len(row), len(column))), np.zeros((len(row), 1))
        for genes, cell_type in zip(cells, types, strict=True):
            counts[row[cell_type], [column[gene] for gene in set(genes)]] += 1
            total[row[cell_type]] += 1
        shares = (counts + alpha) / (total + 2 * alpha)
        shares = np.vstack([shares, shares.mean(axis=0)])
        absent = np.log1p(-shares)
        return cls(row, column, np.log(shares) - absent, absent.sum(axis=1))

    def log_probabilities(self, cells: Sequence[Cell], candidates: Sequence[str]) -> np.ndarray:
        """Return float64 (n_cells, n_candidates); genes that no training cell lists are ignored."""
        if not candidates:
            raise ValueError("candidates is empty; the baseline can only choose among candidates")
        rows = [self.types.get(name, len(self.types)) for name in candidates]
        scores = np.tile(self.empty[rows], (len(cells), 1))
        for i, genes in enumerate(cells):
            columns = [self.genes[gene] for gene in set(genes) if gene in self.genes]
            scores[i] += self.odds[np.ix_(rows, columns)].sum(axis=1)
        return log_softmax(scores, axis=1)

    def answers(self, cells: Sequence[Cell], candidates: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Solve a puzzle: by the likeliest matching, and by the likeliest type of each cell; keys of ``BASELINES``."""
        scores = self.log_probabilities(cells, candidates)
        if len(cells) > len(candidates):
            raise ValueError(f"{len(cells)} cells cannot have different types of {len(candidates)} candidates")
        chosen = linear_sum_assignment(scores, maximize=True)[1], scores.argmax(axis=1)
        return {
            name: tuple(candidates[j] for j in columns.tolist())
            for name, columns in zip(BASELINES, chosen, strict=True)
        }


def read_baseline(path: str | Path | None) -> NaiveBayes | None:
    """Fit the baseline on a file of training puzzles, if there is one."""
    return None if path is None else NaiveBayes.fit(*puzzle_cells(load_puzzles(path, require_gold=True).puzzles))
