"""Donor metadata to context sentences, from a table that users can extend.

The wording of the shipped table is that of the published CellPuzzles files, since models are trained on it ("The cell
is from a male at the 67-year-old stage, originating from the skin epidermis. The patient has been diagnosed with
melanoma."), down to what that wording does where a field is unknown: "The cell is from, originating from the lung"
without a sex, no full stop without a disease, "The cell is from" where nothing is known. Column names are those of
CELLxGENE's ``obs`` and of the data sets named in ``DATASET_FIELDS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from recipe.cello1.task.text import clean_value, join_list, list_entries, on_one_line

_INTRO = "The cell is from"
INTRO_FIELDS: tuple[tuple[str, str], ...] = (
    ("sex", " a {value}"),
    ("development_stage", " at the {value}"),
    ("self_reported_ethnicity", " with {value} background"),
    ("tissue", ", originating from the {value}"),
)
DISEASE_FIELD = "disease"
_HEALTHY = "normal"
CONTEXT_FIELDS: tuple[str, ...] = (*[name for name, _ in INTRO_FIELDS], DISEASE_FIELD)


@dataclass(frozen=True, slots=True)
class FieldRule:
    """How one metadata column becomes a sentence.

    Attributes
    ----------
    values
        Sentence for each value, looked up without regard to case; ``""`` for a value that says nothing.
    endings
        Sentence for values with a certain ending, after underscores have become blanks; ``{value}`` is what stands
        before the ending. Case counts.
    template
        Sentence for any other value, with ``{value}``. Without it other values are left out.
    lower
        Whether ``{value}`` is written in lower case.
    verbatim
        Whether blanks around a value count, as they do in the published wording of some columns.
    unless
        For some values, a text that makes the sentence superfluous when an earlier sentence contains it.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    endings: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    lower: bool = False
    verbatim: bool = False
    unless: Mapping[str, str] = field(default_factory=dict)

    def sentence(self, value: str, earlier: Sequence[str] = ()) -> str:
        """Write the sentence for a usable value.

        Parameters
        ----------
        value
            The value.
        earlier
            The sentences written before.

        Returns
        -------
        The sentence; empty when the value says nothing.
        """
        value = value if self.verbatim else value.strip()
        folded = value.lower()
        superfluous = self.unless.get(folded)
        if superfluous and any(superfluous in sentence for sentence in earlier):
            return ""
        if folded in self.values:
            return self.values[folded]
        spaced = value.replace("_", " ")
        for ending, template in self.endings.items():
            if spaced.endswith(ending) and len(spaced) > len(ending):
                return template.replace("{value}", spaced[: -len(ending)])
        if self.endings:
            value = spaced
        return self.template.replace("{value}", value.lower() if self.lower else value)


_YES_NO_SMOKER = {
    "yes": "The patient is a smoker.",
    "current smoker": "The patient is a smoker.",
    "no": "The patient is a non-smoker.",
    "non-smoker": "The patient is a non-smoker.",
}

FIELD_RULES: Mapping[str, FieldRule] = MappingProxyType(
    {
        "ever_smoker": FieldRule(values=_YES_NO_SMOKER, verbatim=True),
        "tumor_stage": FieldRule(
            values={
                "non-cancer": "There is no cancer present.",
                "early": "The patient has an early-stage tumor.",
                "advanced": "The patient has an advanced-stage tumor.",
            }
        ),
        "sampletype": FieldRule(
            values={
                "m3": "The sample was collected at month 3 post-treatment.",
                "m6": "The sample was collected at month 6 post-treatment.",
                "uv": "The sample was exposed to ultraviolet (UV) treatment.",
                "control": "The sample is from the control group.",
            }
        ),
        "donor_BMI": FieldRule(template="The patient has a BMI of {value}.", verbatim=True),
        "lung_condition": FieldRule(template="The lung condition is described as {value}.", verbatim=True),
        "smoking_status": FieldRule(
            values={
                "active": "The patient is an active smoker.",
                "former": "The patient is a former smoker.",
                "hist of marijuana use": "The patient has a history of marijuana use.",
                "never": "The patient has never smoked.",
            }
        ),
        "BMI": FieldRule(template="The patient's BMI is {value}.", verbatim=True),
        "medical_conditions": FieldRule(
            values={
                "epilepsy": "The patient has a history of epilepsy.",
                "tumor": "The patient has a diagnosed brain tumor.",
                "hydrocephalus": "The patient has hydrocephalus (fluid buildup in the brain).",
                "both": "The patient has both epilepsy and a brain tumor.",
                "other": "The patient has other neurological conditions.",
            }
        ),
        "hemisphere": FieldRule(
            values={
                "left": "The tissue sample was taken from the left hemisphere of the brain.",
                "right": "The tissue sample was taken from the right hemisphere of the brain.",
            }
        ),
        "harm_tumor.type": FieldRule(
            values={"pbmc": "The sample is from peripheral blood mononuclear cells."},
            template="The patient has been diagnosed with {value} cancer.",
            lower=True,
        ),
        "harm_tumor.site": FieldRule(
            values={
                "primary": "The tumor is located at the primary site.",
                "metastasis": "The tumor has metastasized to other parts of the body.",
                "normal": "This sample was collected from non-tumorous tissue.",
            }
        ),
        "harm_sample.type": FieldRule(
            values={
                "tumor": "The sample is derived from tumor tissue.",
                "normal": "The sample is derived from normal tissue.",
                "blood": "The sample is a blood-derived specimen.",
                "lymphnode": "The sample is derived from lymph node tissue.",
            },
            unless={"tumor": "non-tumorous tissue", "normal": "non-tumorous tissue"},
        ),
        "harm_condition": FieldRule(
            endings={
                " T": "The sample is from tumor tissue in the {value}.",
                " N": "The sample is from normal {value} tissue.",
                " M": "The sample is from metastatic {value} tumor.",
            },
            template="The overall condition is described as {value}.",
        ),
        "harm_cd45pos": FieldRule(
            values={
                "yes": "The cell is CD45-positive, suggesting an immune cell origin.",
                "no": "The cell is CD45-negative, suggesting a non-immune cell lineage.",
                "mixed": "The sample contains a mixture of CD45-positive and CD45-negative cells.",
            }
        ),
        "diabetes_history": FieldRule(
            values={
                "yes": "The patient has a history of diabetes.",
                "no": "The patient does not have diabetes.",
            }
        ),
        "hypertension": FieldRule(
            values={
                "yes": "The patient has a history of hypertension.",
                "no": "The patient does not have hypertension.",
            }
        ),
        "eGFR": FieldRule(
            template="The patient's estimated glomerular filtration rate (eGFR) is in the range {value}."
        ),
        "Condition": FieldRule(
            values={
                "healthy": "The donor was healthy with no reported skin condition.",
                "dm – non ulcer": "The donor had diabetes mellitus without skin ulceration.",
                "keloid": "The donor had a keloid, which is an overgrowth of scar tissue.",
                "localised scleroderma": (
                    "The donor was diagnosed with localized scleroderma, a skin-related autoimmune disease."
                ),
                "scar": "The donor had a typical scar from prior skin injury.",
            }
        ),
        "author_tumor_subsite": FieldRule(template="The tissue was collected from the {value}.", lower=True),
        "activation": FieldRule(
            values={
                "activated": "The sample was stimulated and represents activated immune cells.",
                "resting": "The sample represents resting (non-activated) immune cells.",
            }
        ),
        "Genotype": FieldRule(
            values={
                "flt3-itd,npm1-mut": "The patient carries FLT3-ITD and NPM1 mutations.",
                "flt3-wt,npm1-mut": "The patient carries a wild-type FLT3 and an NPM1 mutation.",
                "apl": "The patient is diagnosed with acute promyelocytic leukemia (APL).",
            }
        ),
    }
)

# Which extra columns the published pipeline uses, by the name of the folder a file lies in (its spelling).
DATASET_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "copd": ("ever_smoker", "tumor_stage"),
        "hiv": ("sampletype",),
        "type2_diabetes": ("donor_BMI",),
        "cystic_fibrosis": ("lung_condition", "smoking_status", "BMI"),
        "cortex": ("medical_conditions", "hemisphere"),
        "tumor": ("harm_tumor.type", "harm_tumor.site", "harm_sample.type", "harm_condition", "harm_cd45pos"),
        "kidney": ("BMI", "diabetes_history", "hypertension", "eGFR"),
        "fibroblast": ("Condition",),
        "obvarian": ("author_tumor_subsite",),
        "pbmc": ("activation",),
        "leukemic": ("Genotype",),
    }
)


TISSUE_KIND = "tissue_type"
_CULTURE = "cell culture"  # in brackets after the tissue where there is no such column yet


def names_type(tissue: object, kind: object, types: Set[str]) -> bool:
    """Say whether a tissue would give a cell's type away: it is one of the types, or that of a cell culture.

    Parameters
    ----------
    tissue, kind
        Values of the columns ``tissue`` and ``tissue_type`` of CELLxGENE, where the tissue of a culture is its type.
    types
        The types, in lower case.

    Returns
    -------
    Whether to leave it out of the context.
    """
    if clean_value(kind).lower().endswith(_CULTURE):
        return True
    texts = list_entries(clean_value(tissue).lower())
    return any(text.endswith(f"{_CULTURE})") or not types.isdisjoint((text, text.removesuffix("s"))) for text in texts)


def build_context(
    obs: Mapping[str, Any],
    extra: Iterable[str] = (),
    rules: Mapping[str, FieldRule] = FIELD_RULES,
) -> str:
    """Write the context sentences of a donor.

    A list (``"diabetes || asthma"``, as CELLxGENE writes it) is written as "diabetes and asthma", where the published
    code would have its bars; ``normal`` counts only where it stands alone. Of an extra column whose rule knows values,
    each entry has its own sentence.

    Parameters
    ----------
    obs
        Metadata of a cell: ``sex``, ``development_stage``, ``self_reported_ethnicity``, ``tissue`` and ``disease``,
        each optional, and the extra columns. Other keys are ignored.
    extra
        Names of extra columns, in the order of their sentences; see ``DATASET_FIELDS``. A column that ``obs`` lacks
        is left out.
    rules
        Rule of each extra column.

    Returns
    -------
    The sentences on one line, ``"The cell is from"`` when nothing is known.

    Raises
    ------
    ValueError
        If an extra column has no rule.
    """
    listed = {name: list_entries(on_one_line(obs.get(name))) for name in CONTEXT_FIELDS}
    if len(findings := listed[DISEASE_FIELD]) > 1:  # who has a disease is not healthy beside it
        listed[DISEASE_FIELD] = [finding for finding in findings if finding.lower() != _HEALTHY]
    known = {name: value for name, entries in listed.items() if (value := join_list(entries))}
    intro = _INTRO + "".join(text.replace("{value}", known[name]) for name, text in INTRO_FIELDS if name in known)
    if disease := known.get(DISEASE_FIELD):
        healthy = disease.lower() == _HEALTHY
        finding = "is healthy with no diagnosed disease" if healthy else f"has been diagnosed with {disease}"
        intro += f". The patient {finding}."
    sentences = [intro]
    for name in extra:
        if name not in rules:
            msg = f"extra: no rule says how to write the column {name!r}; known are {', '.join(sorted(rules))}"
            raise ValueError(msg)
        entries = list_entries(on_one_line(obs.get(name)))
        if not (rules[name].values or rules[name].endings):
            entries = [join_list(entries)] if entries else []
        sentences += dict.fromkeys(filter(None, (rules[name].sentence(entry, sentences) for entry in entries)))
    return " ".join(sentences)


def rules_from_table(table: Mapping[str, Any]) -> dict[str, FieldRule]:
    """Extend ``FIELD_RULES`` with a user's table, as read from YAML.

    Parameters
    ----------
    table
        For each column either a sentence with ``{value}``, or a mapping with any of the keys ``values``, ``endings``,
        ``template``, ``lower``, ``verbatim``, ``unless`` (see :class:`FieldRule`). It wins over a rule that is there.

    Returns
    -------
    All rules.

    Raises
    ------
    ValueError
        If an entry is not of this form, naming the column and the key.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"the table must map columns to rules, got {type(table).__name__}")
    return {**FIELD_RULES, **{str(name): _rule(str(name), entry) for name, entry in table.items()}}


def _rule(name: str, entry: object) -> FieldRule:
    if isinstance(entry, str):
        entry = {"template": entry}
    if not isinstance(entry, Mapping) or not entry:
        raise ValueError(f"column {name!r}: a rule is a sentence with {{value}} or a mapping, got {entry!r}")
    kinds = {"values": Mapping, "endings": Mapping, "template": str, "lower": bool, "verbatim": bool, "unless": Mapping}
    for key, value in entry.items():
        if key not in kinds:
            raise ValueError(f"column {name!r}: unknown key {key!r}; a rule has {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise ValueError(f"column {name!r}, key {key!r}: must be a {kinds[key].__name__.lower()}, got {value!r}")
    found = dict(entry)
    for key in ("values", "endings", "unless"):
        texts = {word: v for k, v in found.get(key, {}).items() for word in _yaml_words(k)}
        if bad := [v for v in texts.values() if not isinstance(v, str)]:
            raise ValueError(f"column {name!r}, key {key!r}: every entry must be text, got {bad[0]!r}")
        found[key] = texts if key == "endings" else {k.lower(): v for k, v in texts.items()}
    return FieldRule(**found)


def _yaml_words(key: object) -> tuple[str, ...]:
    """Return the texts a key stands for; YAML reads unquoted ``yes`` and ``true`` alike, as a truth value."""
    if isinstance(key, bool):
        return ("yes", "true") if key else ("no", "false")
    return (str(key),)
