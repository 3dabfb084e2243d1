"""verl dataset: RL data that is checked before it is trained on, in the prompt layout of the run.

Selected by ``data.custom_cls.{path=pkg://recipe.cello1.dataset, name=PuzzleDataset}``.
"""

from __future__ import annotations

import logging

import datasets

from recipe.cello1.prompt import chat, check_layout
from recipe.cello1.rl_parquet import read_rl_parquet
from verl.utils.dataset.rl_dataset import RLHFDataset

logger = logging.getLogger(__name__)

LAYOUT_KEY = "data.prompt_layout"


class PuzzleDataset(RLHFDataset):
    """verl's RL dataset over puzzles.

    Takes verl's arguments. ``data.prompt_layout`` is ``system``, ``user`` or null (as written in the file).

    Raises
    ------
    FileNotFoundError
        If a data file does not exist.
    ValueError
        If a file lacks a column, a row cannot be trained on, the layout is unknown or cannot be applied, or no prompt
        is within ``data.max_prompt_length``.
    """

    def _read_files_and_tokenize(self) -> None:
        for path in self.data_files:
            read_rl_parquet(path)
        super()._read_files_and_tokenize()

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset) -> datasets.Dataset:
        """Apply the prompt layout, then let verl leave out prompts that are too long, and say how many.

        Parameters
        ----------
        dataframe
            The rows of all files.

        Returns
        -------
        The rows to train on.
        """
        layout = self.config.get("prompt_layout")
        if layout is not None:
            check_layout(layout)
            dataframe = dataframe.map(lambda row, index: {"prompt": _relayout(row, index, layout)}, with_indices=True)
        kept = super().maybe_filter_out_long_prompts(dataframe)
        if len(kept) == 0:
            msg = (
                f"all {len(dataframe)} prompts of {list(self.data_files)} are longer than "
                f"data.max_prompt_length={self.max_prompt_length} tokens; raise it"
            )
            raise ValueError(msg)
        if len(kept) < len(dataframe):
            logger.warning(
                "%d of %d prompts are longer than data.max_prompt_length=%d tokens and are left out",
                len(dataframe) - len(kept),
                len(dataframe),
                self.max_prompt_length,
            )
        return kept


def _relayout(row: dict, index: int, layout: str) -> list[dict[str, str]]:
    extra = row.get("extra_info") or {}
    if extra.get("prompt_layout") == layout:
        return row["prompt"]
    if not extra.get("question"):
        msg = (
            f"row {index}, column 'extra_info': has no 'question', so {LAYOUT_KEY}={layout} cannot be applied; "
            "set it to null to use the prompts as they are"
        )
        raise ValueError(msg)
    return chat(extra["question"], layout, extra.get("variant") or "batch")
