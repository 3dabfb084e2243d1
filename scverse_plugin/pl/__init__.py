"""Plots of a run, with scanpy's ``show``, ``save``, ``ax`` and ``return_fig``."""

from scverse_plugin.pl._confusion import confusion
from scverse_plugin.pl._support import support
from scverse_plugin.pl._umap import umap
from scverse_plugin.pl._votes import votes

__all__ = ["confusion", "support", "umap", "votes"]
