"""One seeded toy object and one scripted engine for every test of the plugin."""

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from recipe.cello1.engines.protocol import Completion, Failure
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import parse_user

TYPES = ["B cell", "NK cell", "T/NK cell", "monocyte"]
MARKERS = {"B cell": "MS4A1", "NK cell": "NKG7", "T/NK cell": "CD3D", "monocyte": "LYZ", "plasma cell": "JCHAIN"}
GENES = [*MARKERS.values(), *(f"GENE{i}" for i in range(40))]


def toy(seed=0, n_per_group=20, types=TYPES, donors=2, matrix=sp.csr_matrix) -> AnnData:
    """Cells with a marker of their type on top; ``truth`` holds the type, ``leiden`` its number."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(types)), n_per_group)
    values = rng.poisson(1.0, (len(truth), len(GENES))).astype(np.float32)
    values[:, : len(MARKERS)] = 0
    for i, name in enumerate(types):
        values[truth == i, GENES.index(MARKERS[name])] = 50
    values[:, -1] += 1
    obs = pd.DataFrame(
        {
            "truth": pd.Categorical([types[i] for i in truth]),
            "leiden": pd.Categorical([str(i) for i in truth]),
            "donor": pd.Categorical([f"d{i % donors}" for i in range(len(truth))]),
            "sex": pd.Categorical([("male", "female")[i % donors % 2] for i in range(len(truth))]),
            "tissue": pd.Categorical(["blood"] * len(truth)),
        },
        index=[f"cell{i}" for i in range(len(truth))],
    )
    var = pd.DataFrame({"symbol": GENES, "half": [i % 2 == 0 for i in range(len(GENES))]}, index=GENES)
    adata = AnnData(matrix(values), obs=obs, var=var)
    adata.obsm["X_umap"] = rng.normal(size=(len(truth), 2))
    return adata


def by_marker(puzzle):
    """Answer like a model that knows the markers; a cell whose type is not shown gets what is left."""
    named = {gene: name for name, gene in MARKERS.items()}
    wanted = [next((named[g] for g in cell if g in named), None) for cell in puzzle.cells]
    found, free = [], [name for name in puzzle.candidates if name not in wanted]
    for name in wanted:
        if name in puzzle.candidates and name not in found:
            found.append(name)
        else:
            found.append(free.pop(0) if free else puzzle.candidates[0])
    return format_answer(found, f"{puzzle.cells[0][0]} and FOXP3 <b>&")


class FakeEngine:
    """Answers by a function of the puzzle; what it returns may be a ``Failure``, too."""

    name = "fake"
    fingerprint = "f"

    def __init__(self, answer=by_marker, model="toy", constraint="", finish_reason="stop"):
        self.answer, self.model, self.constraint, self.finish_reason = answer, model, constraint, finish_reason
        self.asked, self.closed = [], 0

    def generate(self, requests, sampling):
        for position, request in enumerate(requests):
            puzzle = parse_user(request.messages[-1]["content"])
            self.asked.append((puzzle, request))
            text = self.answer(puzzle)
            yield position, text if isinstance(text, Failure) else Completion(text, self.finish_reason, 5, 50)

    def close(self):
        self.closed += 1
