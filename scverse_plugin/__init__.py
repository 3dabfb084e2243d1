"""Cell type annotation of AnnData objects by reasoning over cell puzzles.

Importing the package adds ``scanpy.tl.cello1_annotate`` and, with anndata 0.12 or later, ``adata.cello1``.
"""

from scverse_plugin import _namespace, _register, get, pl, tl
from scverse_plugin._report import report

__version__ = "0.1.0"
__all__ = ["get", "pl", "report", "tl"]

_register.register()
_namespace.register_namespace()
