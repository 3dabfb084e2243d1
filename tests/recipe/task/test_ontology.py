import pytest

from recipe.cello1.task.ontology import CellOntology, Relation, load_ontology, normalise
from tests.helpers.toy_ontology import TERMS

BLOOD, LYMPHOCYTE, T, CD4, B, MYELOID, MONO = (f"CL:000000{i}" for i in range(1, 8))


@pytest.fixture(scope="module")
def ontology():
    return CellOntology(TERMS, "made up")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("CD4+ αβ T-cells", "cd4 positive alpha beta t cell"),
        ("CD4-positive, alpha-beta T cell", "cd4 positive alpha beta t cell"),
        ("CD8- T cell", "cd8 negative t cell"),
        ("  **Naïve** B_cell.", "naive b cell"),
        ("NK cells", "natural killer cell"),
        ("Monocytes", "monocyte"),
        ("thymus", "thymus"),
        ("B-1a", "b 1a"),
        ("Tregs", "regulatory t cell"),
        ("DCs", "dendritic cell"),
        ("NKs", "natural killer"),
        ("gas", "gas"),
        ("", ""),
        ("浆细胞", "浆细胞"),
    ],
)
def test_normal_form(name, form):
    assert normalise(name) == form
    assert normalise(form) == form


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("T cell", "CL:0000084"),
        ("t-lymphocytes", "CL:0000084"),
        ("T", "CL:0000084"),
        ("monocyte cell", "CL:0000576"),
        ("CD4+ T cells", "CL:0000624"),
        ("CL:0000576", "CL:0000576"),
        ("the cell is cl_0000576", "CL:0000576"),
        ("CL:0000999", "CL:0000576"),  # replaced
        ("CL:0000998", ""),  # withdrawn
        ("CL:0000997", "CL:0000576"),  # replaced twice
        ("CL:0000996", ""),  # now of another ontology
        ("CL:0000995", ""),
        ("T cells, CD4+", "CL:0000624"),
        ("CD4- T cell", ""),
        ("OBSOLETE thing", ""),
        ("mature cell", ""),  # a synonym of two
        ("CL:0000576 or CL:0000084", ""),
        ("CL:9999999", ""),
        ("gibberish", ""),
        ("", ""),
    ],
)
def test_find(ontology, name, term):
    assert ontology.find(name) == term


@pytest.mark.parametrize(
    ("answer", "gold", "relation", "distance"),
    [
        ("T lymphocyte", "T cell", Relation.EQUIVALENT, 0),
        ("T cell", "CD4+ T cell", Relation.BROADER, 2),
        ("CD4+ T cell", "T cell", Relation.NARROWER, 2),
        ("hematopoietic cell", "T cell", Relation.BROADER, 2),
        ("cell", "T cell", Relation.DIFFERENT, 3),  # true of every cell
        ("B cell", "T cell", Relation.LINEAGE, 2),
        ("monocyte", "T cell", Relation.DIFFERENT, 4),
        ("epithelial cell", "T cell", Relation.DIFFERENT, 4),
        ("gibberish", "T cell", Relation.UNKNOWN, None),
        ("T cell", "gibberish", Relation.UNKNOWN, None),
        ("Gibberish", "gibberish", Relation.EQUIVALENT, 0),
        ("?", "!", Relation.UNKNOWN, None),
    ],
)
def test_compare(ontology, answer, gold, relation, distance):
    found = ontology.compare(answer, gold)
    assert (found.relation, found.distance) == (relation, distance)


def test_real_ontology():
    pytest.importorskip("cellxgene_ontology_guide", reason="cellxgene-ontology-guide is not installed")
    ontology = load_ontology()
    assert ontology.version.startswith("Cell Ontology v")
    assert ontology.label(ontology.find("NK cells")) == "natural killer cell"
    assert ontology.compare("CD14+ monocyte", "monocyte").relation == Relation.NARROWER
    assert ontology.compare("monocyte", "dendritic cell").relation == Relation.LINEAGE
    assert ontology.compare("motile cell", "T cell").relation == Relation.DIFFERENT
    for name, label in (
        ("Tregs", "regulatory T cell"),
        ("DCs", "dendritic cell"),
        ("effector memory CD8+ T cell", "effector memory CD8-positive, alpha-beta T cell"),
        ("Naive CD4 T cells", "naive thymus-derived CD4-positive, alpha-beta T cell"),
        ("Monocytes (CD14+)", "CD14-positive monocyte"),
        ("CD4-, CD8+ monocyte", ""),
    ):
        found = ontology.find(name)
        assert (ontology.label(found) if found else "") == label
    deprecated = [term for term, entry in ontology._terms.items() if entry.get("deprecated")]
    assert len(deprecated) > 100
    for term in deprecated:
        found = ontology.compare(term, "B cell")
        assert found.relation == Relation.UNKNOWN or not ontology._terms[found.answer].get("deprecated")
    # Every label of the ontology that is no other term's finds its own term.
    terms = {term: entry["label"] for term, entry in ontology._terms.items() if not entry.get("deprecated")}
    lost = [label for term, label in terms.items() if ontology.label(ontology.find(label)) != label]
    assert len(lost) < 0.02 * len(terms), lost[:20]


def test_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cellxgene_ontology_guide.ontology_parser", None)
    with pytest.raises(ImportError, match="pip install cellxgene-ontology-guide"):
        load_ontology()


def test_terms_below_and_nearest_above(ontology):
    lymphocyte, t_cell, cd4, b_cell = "CL:0000542", "CL:0000084", "CL:0000624", "CL:0000236"
    assert set(ontology.descendants(lymphocyte)) == {t_cell, cd4, b_cell}
    assert ontology.nearest_ancestor(cd4, b_cell, steps=4, largest=100) == lymphocyte
    assert ontology.nearest_ancestor(cd4, b_cell, steps=1, largest=100) == ""
    assert ontology.nearest_ancestor(cd4, b_cell, steps=4, largest=0) == ""
