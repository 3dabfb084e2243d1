import inspect
import subprocess
import sys
from types import SimpleNamespace

import anndata
import pytest
import scanpy as sc

import scverse_plugin
from scverse_plugin import _namespace, _register
from tests.helpers.toy_adata import TYPES, FakeEngine, toy


def test_scanpy_has_the_function_and_registering_again_changes_nothing():
    assert sc.tl.cello1_annotate is scverse_plugin.tl.annotate
    _register.register()
    _namespace.register_namespace()
    assert sc.tools.cello1_annotate is scverse_plugin.tl.annotate


def test_a_foreign_name_is_left_alone():
    other = SimpleNamespace(cello1_annotate=len)
    with pytest.raises(ImportError, match=r"scanpy.tl.cello1_annotate is builtins.len already; use scverse_plugin.tl"):
        _register.register(other)
    assert other.cello1_annotate is len


@pytest.mark.skipif(not hasattr(anndata, "register_anndata_namespace"), reason="anndata 0.12 brings the hook")
def test_namespace():
    adata = toy()
    adata.cello1.annotate(TYPES, groupby="leiden", engine=FakeEngine(), progress=False)
    assert adata.cello1.df()["label"].tolist() == TYPES
    assert list(vars(adata.cello1)) == ["_adata"]  # no clients, no sockets
    own = list(inspect.signature(type(adata.cello1).annotate).parameters)
    assert own[1:] == list(inspect.signature(scverse_plugin.tl.annotate).parameters)[1:]


@pytest.mark.slow
def test_importing_is_quiet_and_loads_no_engine():
    code = (
        "import sys, os; before = dict(os.environ); import scanpy; import scverse_plugin; "
        "print([m for m in ('torch', 'vllm', 'verl', 'transformers', 'openai', 'ray', 'cellxgene_ontology_guide') "
        "if m in sys.modules], set(os.environ) - set(before))"
    )
    found = subprocess.run([sys.executable, "-W", "error:::scverse_plugin", "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[] set()", found.stderr
