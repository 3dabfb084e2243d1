"""The report: one HTML file that needs nothing else."""

from scverse_plugin._report._html import check_path, report

__all__ = ["check_path", "report"]
