"""The probabilities of several texts from as few next-token probabilities as they have different beginnings.

Texts that may come next share their first tokens with each other ("T cell, CD4-positive", "T cell, CD8-positive"). Laid
out as a tree, each node is one context of the model, and each branch a token whose probability is read there. Ten
labels of one token each need one context, whatever the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Context = tuple[list[int], list[int]]  # token ids, and the tokens to read the probability of behind them


class TokenTree(NamedTuple):
    """What must be computed to compare texts."""

    contexts: list[Context]
    # For each text its branches: (number of the context, position among its tokens)
    paths: list[list[tuple[int, int]]]

    def total(self, logprobs: Sequence[np.ndarray]) -> np.ndarray:
        """Add up the log-probabilities of each context's tokens to those of the texts."""
        return np.array([sum(float(logprobs[node][i]) for node, i in path) for path in self.paths], dtype=np.float64)


def token_tree(texts: Sequence[Sequence[int]]) -> TokenTree:
    """Lay out texts, the prompt included; what all begin with is not scored, as it adds the same to each."""
    options = [tuple(ids) for ids in texts]
    start = next((i for i, column in enumerate(zip(*options, strict=False)) if len(set(column)) > 1), None)
    start = min(map(len, options), default=0) if start is None else start
    if not start or len(set(options)) < len(options):
        raise ValueError("options must be different texts, at least one, behind a text that is not empty")
    nodes: dict[tuple[int, ...], int] = {}
    contexts: list[Context] = []
    paths = []
    for ids in options:
        path = []
        for end in range(start, len(ids)):
            node = nodes.setdefault(ids[:end], len(contexts))
            if node == len(contexts):
                contexts.append((list(ids[:end]), []))
            tokens = contexts[node][1]
            if ids[end] not in tokens:
                tokens.append(ids[end])
            path.append((node, tokens.index(ids[end])))
        paths.append(path)
    return TokenTree(contexts, paths)
