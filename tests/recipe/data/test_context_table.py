from pathlib import Path

import pytest

from recipe.cello1.data.context_table import ContextTable, load_context_table
from recipe.cello1.task.context import DATASET_FIELDS

EXAMPLE = Path(__file__).parents[3] / "recipe" / "cello1" / "config" / "context_example.yaml"
INTRO = {"sex": "female", "tissue": "breast"}


def test_without_a_file_the_shipped_table_holds():
    table = load_context_table(None)
    assert table == ContextTable()
    assert table.extra("kidney") == DATASET_FIELDS["kidney"]
    assert table.extra("elsewhere") == ()


def test_the_shipped_example():
    table = load_context_table(EXAMPLE)
    assert table.extra("breast") == ("menopause", "treatment", "sampling_site")
    assert table.extra("kidney") == (*DATASET_FIELDS["kidney"], "sampling_site")
    text = table.sentences(
        INTRO | {"menopause": "Post", "treatment": "tamoxifen", "sampling_site": "Left Side"}, "breast"
    )
    assert text == (
        "The cell is from a female, originating from the breast The patient is postmenopausal. "
        "The patient received tamoxifen. The sample was taken from the left side."
    )
    assert table.source == EXAMPLE.read_text()


def test_an_entry_wins_over_the_shipped_one(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text("fields: {BMI: 'Body mass index {value}.'}\ndatasets: {kidney: [BMI]}\n")
    table = load_context_table(path)
    assert table.sentences({"BMI": 24, "eGFR": "60-89"}, "kidney") == "The cell is from Body mass index 24."


@pytest.mark.parametrize(("word", "value"), [("yes", "yes"), ("true", "yes"), ("yes", True), ("true", "true")])
def test_yes_and_true_are_one_in_yaml(tmp_path, word, value):
    path = tmp_path / "table.yaml"
    path.write_text(f"fields: {{treated: {{values: {{{word}: Treated.}}}}}}\ndatasets: {{'*': [treated]}}\n")
    assert load_context_table(path).sentences({"treated": value}, "any") == "The cell is from Treated."


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [", "is not YAML"),
        ("- a", "must have the keys 'fields' and 'datasets'.*found list"),
        ("rules: {}", r"found \['rules'\]"),
        ("fields: {a: 3}", "column 'a'"),
        ("datasets: [a, b]", "'datasets' must give a list of columns for each folder"),
        ("datasets: {a: b}", "'a' must list column names"),
        ("datasets: {a: [b]}", r"names the columns \['b'\], which have no entry"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, match):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        load_context_table(path)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_context_table(tmp_path / "table.yaml")
