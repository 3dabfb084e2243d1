"""Cell type annotation of AnnData objects by reasoning over cell puzzles."""

__version__ = "0.1.0"
