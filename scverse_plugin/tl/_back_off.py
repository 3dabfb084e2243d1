"""From two close types that share a group to what they have in common."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from recipe.cello1.task.answer import join_types
from recipe.cello1.task.ontology import CellOntology
from scverse_plugin.method._tally import Tally
from scverse_plugin.tl._ontology import ontology_tables

STEPS_UP = 4  # most edges from a type up to the ancestor
LARGEST_ANCESTOR = 400  # most terms below an ancestor, of more than 3,300: lymphocyte has 347, leukocyte 572


def back_off(
    table: pd.DataFrame,
    tally: Tally,
    allowed: np.ndarray,
    threshold: float,
    adjust: Callable[[np.ndarray], np.ndarray],
    ontology: CellOntology | None = None,
) -> None:
    """Put ancestors for labels into the table of the groups, where they have the support that is asked for."""
    n_types = allowed.shape[1]
    types = tally.types[:n_types]
    ontology = ontology or ontology_tables()
    terms = {name: ontology.find(name) for name in types}
    above = {name: ontology.upward(term) if term else {} for name, term in terms.items()}
    rates = tally.rates
    for i, row in enumerate(table.to_dict("records")):
        pair = row["best"], row["runner_up"]
        if row["status"] not in ("tie", "low_support") or not all(terms.get(name) for name in pair):
            continue
        ancestor = ontology.nearest_ancestor(terms[pair[0]], terms[pair[1]], steps=STEPS_UP, largest=LARGEST_ANCESTOR)
        below = [j for j in np.flatnonzero(allowed[i]).tolist() if ancestor in above[types[j]]]
        raw = np.array([min(1.0, float(rates[i, below].sum()))])
        support = float(adjust(raw)[0])
        if not ancestor or support < threshold or raw[0] <= rates[i, n_types:].max(initial=0):
            continue
        known = next((name for name in types if terms[name] == ancestor), ontology.label(ancestor))
        told = join_types([types[j] for j in below if rates[i, j] > 0])
        table.loc[table.index[i], ["label", "status", "backed_off_from"]] = [known, "backed_off", told]
        table.loc[table.index[i], ["support", "raw_support"]] = [support, raw[0]]
