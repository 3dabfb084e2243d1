"""Tools: ``annotate``, calibration of its support, and Cell Ontology ids for its labels."""

from scverse_plugin.tl._annotate import annotate
from scverse_plugin.tl._calibrate import calibrate
from scverse_plugin.tl._ontology import ontology_ids

__all__ = ["annotate", "calibrate", "ontology_ids"]
