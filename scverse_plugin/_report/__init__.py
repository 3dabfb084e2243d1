"""The report: one HTML file that needs nothing else."""

from scverse_plugin._report._html import report

__all__ = ["report"]
