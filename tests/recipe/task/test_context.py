import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.cello1.task.answer import text_fault
from recipe.cello1.task.context import (
    CONTEXT_FIELDS,
    DATASET_FIELDS,
    FIELD_RULES,
    build_context,
    names_type,
    rules_from_table,
)

DONOR = {
    "sex": "female",
    "development_stage": "41-year-old stage",
    "self_reported_ethnicity": "European",
    "tissue": "cortex of kidney",
    "disease": "normal",
    "n_genes": 900,
}


def test_all_fields():
    assert build_context(DONOR) == (
        "The cell is from a female at the 41-year-old stage with European background, "
        "originating from the cortex of kidney. The patient is healthy with no diagnosed disease."
    )


def test_wording_of_the_published_items():
    obs = {"sex": "male", "development_stage": "67-year-old stage", "tissue": "skin epidermis", "disease": "melanoma"}
    assert build_context(obs | {"self_reported_ethnicity": "unknown"}) == (
        "The cell is from a male at the 67-year-old stage, originating from the skin epidermis. "
        "The patient has been diagnosed with melanoma."
    )


@pytest.mark.parametrize(
    ("obs", "sentences"),
    [
        ({}, ""),
        ({"tissue": "lung"}, ", originating from the lung"),
        ({"sex": "male"}, " a male"),
        ({"sex": "male", "tissue": "lung"}, " a male, originating from the lung"),
        ({"development_stage": "adult stage"}, " at the adult stage"),
        ({"self_reported_ethnicity": "Han"}, " with Han background"),
        ({"disease": "Normal"}, ". The patient is healthy with no diagnosed disease."),
        ({"disease": "COPD"}, ". The patient has been diagnosed with COPD."),
        ({"tissue": "{value}", "sex": "{sex}"}, " a {sex}, originating from the {value}"),
        (
            {"tissue": "lung ", "disease": "COPD "},
            ", originating from the lung . The patient has been diagnosed with COPD .",
        ),
        ({"tissue": "left\t\r\nlung\u00a0x"}, ", originating from the left lung x"),
        ({"self_reported_ethnicity": "European || Han"}, " with European and Han background"),
        ({"disease": "A || unknown||B || C"}, ". The patient has been diagnosed with A, B and C."),
        ({"tissue": "unknown || nan", "sex": "||"}, ""),
        ({"disease": "normal || asthma"}, ". The patient has been diagnosed with asthma."),
        ({"disease": "gout||Normal || asthma "}, ". The patient has been diagnosed with gout and asthma."),
        ({"disease": "normal || unknown"}, ". The patient is healthy with no diagnosed disease."),
        ({"disease": "normal || normal"}, ". The patient is healthy with no diagnosed disease."),
        ({"disease": "gout || gout", "sex": "N/A"}, ". The patient has been diagnosed with gout."),
        ({"tissue": "lung || blood || -", "sex": "male"}, " a male, originating from the lung and blood"),
        ({"sex": "male||female", "development_stage": "not available"}, " a male and female"),
    ],
)
def test_what_is_unknown_is_left_out_as_published(obs, sentences):
    assert build_context(obs) == "The cell is from" + sentences


def published(obs: dict, extra: dict) -> str:
    """The published wording in plain steps: pieces of one sentence, closed by the disease alone, then the others."""
    pieces = ["The cell is from"]
    pieces += [f" a {obs['sex']}"] if "sex" in obs else []
    pieces += [f" at the {obs['development_stage']}"] if "development_stage" in obs else []
    pieces += [f" with {obs['self_reported_ethnicity']} background"] if "self_reported_ethnicity" in obs else []
    pieces += [f", originating from the {obs['tissue']}"] if "tissue" in obs else []
    if "disease" in obs:
        normal = obs["disease"] == "normal"
        pieces += [". The patient is healthy with no diagnosed disease."] if normal else []
        pieces += [f". The patient has been diagnosed with {obs['disease']}."] if not normal else []
    return " ".join(["".join(pieces), *extra.values()])


def test_every_set_of_fields_has_the_published_wording():
    """All sets of the five fields that every data set has, with all sets of extra fields of each data set."""
    sentences = {name: (value, sentence) for name, value, sentence in SENTENCES if sentence}
    n = 0
    for fields, blank, disease in itertools.product(DATASET_FIELDS.values(), ("", " "), ("normal", "melanoma")):
        whole = {**DONOR, "disease": disease}
        for known in itertools.product((False, True), repeat=len(CONTEXT_FIELDS) + len(fields)):
            names = [name for name, there in zip((*CONTEXT_FIELDS, *fields), known, strict=True) if there]
            obs = {name: whole[name] + blank * (name != "disease") for name in names if name in CONTEXT_FIELDS}
            extra = {name: sentences[name][1] for name in fields if name in names}
            values = {name: sentences[name][0] for name in extra}
            assert build_context({**obs, **values}, extra=fields) == published(obs, extra)
            n += 1
    assert n > 3706
    assert DATASET_FIELDS["kidney"] == ("BMI", "diabetes_history", "hypertension", "eGFR")


def test_blanks_of_a_value_count_where_the_published_wording_has_them():
    for name, text in (("donor_BMI", "has a BMI of 20 ."), ("BMI", "BMI is 20 ."), ("lung_condition", "as 20 .")):
        assert build_context({name: "20 "}, extra=[name]).endswith(text)
    assert build_context({"eGFR": "20 "}, extra=["eGFR"]).endswith("range 20.")
    assert build_context({"hemisphere": "left "}, extra=["hemisphere"]).endswith("left hemisphere of the brain.")


@pytest.mark.parametrize("value", [None, float("nan"), "NaN", " Unknown ", "", "\u200b", "\u00a0", "n\u200ba"])
def test_unusable_values(value):
    assert build_context(dict.fromkeys(CONTEXT_FIELDS, value)) == "The cell is from"
    assert build_context({"BMI": value}, extra=["BMI"]) == "The cell is from"


# One value of each kind of rule for every column of the table.
SENTENCES = [
    ("ever_smoker", "Yes", "The patient is a smoker."),
    ("ever_smoker", "non-smoker", "The patient is a non-smoker."),
    ("ever_smoker", "perhaps", ""),
    ("tumor_stage", "advanced", "The patient has an advanced-stage tumor."),
    ("sampletype", "M3", "The sample was collected at month 3 post-treatment."),
    ("donor_BMI", 23.5, "The patient has a BMI of 23.5."),
    ("lung_condition", "CF", "The lung condition is described as CF."),
    ("smoking_status", "hist of marijuana use", "The patient has a history of marijuana use."),
    ("BMI", "18.5-24.9", "The patient's BMI is 18.5-24.9."),
    ("medical_conditions", "Both", "The patient has both epilepsy and a brain tumor."),
    ("hemisphere", "left", "The tissue sample was taken from the left hemisphere of the brain."),
    ("harm_tumor.type", "PBMC", "The sample is from peripheral blood mononuclear cells."),
    ("harm_tumor.type", "Breast", "The patient has been diagnosed with breast cancer."),
    ("harm_tumor.site", "metastasis", "The tumor has metastasized to other parts of the body."),
    ("harm_sample.type", "blood", "The sample is a blood-derived specimen."),
    ("harm_condition", "colon_T", "The sample is from tumor tissue in the colon."),
    ("harm_condition", "lymph_node_N", "The sample is from normal lymph node tissue."),
    ("harm_condition", "liver M", "The sample is from metastatic liver tumor."),
    ("harm_condition", "T", "The overall condition is described as T."),
    ("harm_condition", "post_op", "The overall condition is described as post op."),
    ("harm_cd45pos", "mixed", "The sample contains a mixture of CD45-positive and CD45-negative cells."),
    ("diabetes_history", "No", "The patient does not have diabetes."),
    ("hypertension", "yes", "The patient has a history of hypertension."),
    ("eGFR", "60-69", "The patient's estimated glomerular filtration rate (eGFR) is in the range 60-69."),
    ("Condition", "DM – non ulcer", "The donor had diabetes mellitus without skin ulceration."),
    ("author_tumor_subsite", "Left Ovary", "The tissue was collected from the left ovary."),
    ("activation", "resting", "The sample represents resting (non-activated) immune cells."),
    ("Genotype", "FLT3-ITD,NPM1-MUT", "The patient carries FLT3-ITD and NPM1 mutations."),
]


@pytest.mark.parametrize(("name", "value", "sentence"), SENTENCES)
def test_extra_fields(name, value, sentence):
    assert build_context({name: value}, extra=[name]) == f"The cell is from {sentence}".rstrip()


def test_every_shipped_rule_is_tested_and_used():
    assert {name for name, _, _ in SENTENCES} == set(FIELD_RULES)
    assert {name for fields in DATASET_FIELDS.values() for name in fields} == set(FIELD_RULES)
    for name, rule in FIELD_RULES.items():
        assert all(key == key.lower() for key in rule.values), name
        for text in [*rule.values.values(), *rule.endings.values(), rule.template]:
            assert text == "" or text.endswith("."), name


@pytest.mark.parametrize(
    ("name", "value", "sentences"),
    [
        ("BMI", "20 || 22", "The patient's BMI is 20 and 22."),
        (
            "smoking_status",
            "Former || hist of marijuana use",
            ("The patient is a former smoker. The patient has a history of marijuana use."),
        ),
        ("ever_smoker", "yes || current smoker", "The patient is a smoker."),
        ("medical_conditions", "epilepsy || N/A", "The patient has a history of epilepsy."),
        (
            "harm_tumor.type",
            "PBMC||Lung",
            ("The sample is from peripheral blood mononuclear cells. The patient has been diagnosed with lung cancer."),
        ),
        (
            "harm_condition",
            "colon_T || liver_M",
            ("The sample is from tumor tissue in the colon. The sample is from metastatic liver tumor."),
        ),
        ("author_tumor_subsite", "Left Ovary || Omentum", "The tissue was collected from the left ovary and omentum."),
        ("Genotype", "APL || ?", "The patient is diagnosed with acute promyelocytic leukemia (APL)."),
    ],
)
def test_lists_in_extra_fields(name, value, sentences):
    assert build_context({name: value}, extra=[name]) == f"The cell is from {sentences}"


def test_extra_fields_follow_in_the_order_asked_for():
    obs = {"disease": "normal", "eGFR": "60-69", "BMI": 22, "hypertension": "unknown"}
    assert build_context(obs, extra=DATASET_FIELDS["kidney"]) == (
        "The cell is from. The patient is healthy with no diagnosed disease. The patient's BMI is 22. "
        "The patient's estimated glomerular filtration rate (eGFR) is in the range 60-69."
    )


def test_superfluous_sentence_is_left_out():
    extra = DATASET_FIELDS["tumor"]
    obs = {"harm_tumor.site": "normal", "harm_sample.type": "normal"}
    assert build_context(obs, extra=extra) == ("The cell is from This sample was collected from non-tumorous tissue.")
    assert build_context(obs | {"harm_sample.type": "blood"}, extra=extra).endswith("blood-derived specimen.")
    assert build_context({"harm_sample.type": "normal"}, extra=extra).endswith("is derived from normal tissue.")


def test_unknown_column_is_named():
    with pytest.raises(ValueError, match="no rule says how to write the column 'batch'; known are BMI, Condition"):
        build_context({"batch": 1}, extra=["batch"])


def test_user_table_extends_the_rules():
    rules = rules_from_table(
        {
            "drug": "The patient takes {value}.",
            "BMI": {"template": "BMI: {value}."},
            "smoker": {"values": {True: "Smokes.", False: "Does not smoke.", "EX": "Used to smoke."}},
            "site": {"endings": {"_no": "never", " x": "From {value}."}, "template": "Site {value}.", "lower": True},
        }
    )
    assert set(rules) == set(FIELD_RULES) | {"drug", "smoker", "site"}
    assert "drug" not in FIELD_RULES
    obs = {"drug": "metformin", "BMI": 20, "smoker": "ex", "site": "A_x"}
    extra = ["drug", "BMI", "smoker", "site"]
    assert build_context(obs, extra, rules) == (
        "The cell is from The patient takes metformin. BMI: 20. Used to smoke. From A."
    )
    assert build_context({"smoker": "Yes"}, extra, rules).endswith("from Smokes.")
    assert build_context({"smoker": "no", "site": "B_1"}, extra, rules).endswith("from Does not smoke. Site b 1.")


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (["drug"], "must map columns to rules, got list"),
        ({"drug": 3}, "column 'drug': a rule is a sentence with {value} or a mapping, got 3"),
        ({"drug": {}}, "column 'drug': a rule is"),
        ({"drug": {"value": {}}}, "column 'drug': unknown key 'value'; a rule has values, endings"),
        ({"drug": {"values": ["a"]}}, "column 'drug', key 'values': must be a mapping"),
        ({"drug": {"lower": "yes"}}, "column 'drug', key 'lower': must be a bool"),
        ({"drug": {"values": {"a": 1}}}, "column 'drug', key 'values': every entry must be text, got 1"),
    ],
)
def test_bad_table_is_named(table, match):
    with pytest.raises(ValueError, match=match):
        rules_from_table(table)


@given(st.dictionaries(st.sampled_from([*CONTEXT_FIELDS, *FIELD_RULES]), st.text() | st.floats() | st.none()))
def test_context_fits_on_one_line(obs):
    context = build_context(obs, extra=sorted(FIELD_RULES))
    assert context.startswith("The cell is from")
    if not any(0xD800 <= ord(c) <= 0xDFFF for c in context):
        assert text_fault(context) == ""


@pytest.mark.parametrize(
    ("tissue", "kind", "expected"),
    [
        ("T cell", "tissue", True),
        ("T cells ", None, True),
        ("fibroblast", "Cell culture", True),
        ("fibroblast", "primary cell culture", True),
        ("fibroblast (cell culture)", "unknown", True),
        ("brain", "organoid", False),
        ("blood", float("nan"), False),
        (None, None, False),
        ("blood || T cell", "tissue", True),
        ("blood || HeLa (cell culture)", None, True),
        ("blood || lung", "tissue", False),
    ],
)
def test_a_tissue_that_names_the_type(tissue, kind, expected):
    assert names_type(tissue, kind, {"t cell", "b cell"}) is expected
