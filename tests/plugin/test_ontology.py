import anndata as ad
import pytest

import scverse_plugin
from scverse_plugin.tl import _ontology
from tests.helpers.toy_adata import FakeEngine, by_marker, toy

TYPES = ["B cell", "NK cell", "T/NK cell", "monocyte"]


def annotated():
    adata = toy()
    scverse_plugin.tl.annotate(adata, TYPES, groupby="leiden", engine=FakeEngine(by_marker), progress=False)
    return adata


def test_ids_of_names_that_the_ontology_has(tmp_path):
    pytest.importorskip("cellxgene_ontology_guide")
    adata = annotated()
    scverse_plugin.tl.ontology_ids(adata)
    found = adata.obs.drop_duplicates("cello1").set_index("cello1")["cello1_ontology_term_id"].astype(str).to_dict()
    assert found == {"B cell": "CL:0000236", "NK cell": "CL:0000623", "T/NK cell": "unknown", "monocyte": "CL:0000576"}
    assert _ontology._look_up(["b CELL"]) == {"b CELL": "CL:0000236"}
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    assert read.obs["cello1_ontology_term_id"].astype(str).tolist() == (
        adata.obs["cello1_ontology_term_id"].astype(str).tolist()
    )
    scverse_plugin.tl.ontology_ids(read)  # what a run of ours has written may be written again
    assert "cello1_ontology_term_id" in scverse_plugin.tl.ontology_ids(annotated(), copy=True).obs


def test_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cellxgene_ontology_guide.ontology_parser", None)
    with pytest.raises(ImportError, match=r"cannot be read .* or with the package's \[ontology\] extra"):
        scverse_plugin.tl.ontology_ids(annotated())
