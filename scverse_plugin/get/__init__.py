"""What a run has left, as tables."""

from scverse_plugin.get._frame import cello1_df

__all__ = ["cello1_df"]
