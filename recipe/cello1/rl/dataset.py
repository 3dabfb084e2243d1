"""verl dataset: RL data that is checked before it is trained on, in the prompt layout of the run.

Selected by ``data.custom_cls.{path=pkg://recipe.cello1.rl.dataset, name=PuzzleDataset}``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import datasets

from recipe.cello1.formats.chat_template import render_chat
from recipe.cello1.formats.rl_parquet import check_rl_parquet
from recipe.cello1.formats.rl_rows import row_question
from recipe.cello1.formats.template_limits import limit_templates
from recipe.cello1.rl.curriculum import augmented_row, pass_order
from recipe.cello1.task.order import SIZE_ORDERS
from recipe.cello1.task.prompt import Layout, chat, check_layout
from recipe.cello1.task.scoring import gold_types
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import normalize_token_ids

logger = logging.getLogger(__name__)
limit_templates()  # each process in which verl renders prompts loads this module: data, agent loops

CURRICULUM_KEY = "data.curriculum"
EPOCHS_KEY = "data.augmented_epochs"
_OWN_TOKENIZER_OPTIONS = ("tokenize", "return_dict", "return_tensors")


class PuzzleDataset(RLHFDataset):
    """verl's RL dataset over puzzles.

    Takes verl's arguments, and in ``data`` these settings; the last two concern the training data only.

    ``prompt_layout``
        One of the ``LAYOUTS`` of ``task.prompt``, or null (as written in the file).
    ``curriculum``
        null, or the order of the puzzles by number of cells, see ``task.order.order_by_size``.
    ``augmented_epochs``
        null, or the number of passes over the puzzles that this dataset holds one after the other, each in an order of
        its own: the first with the puzzles as written, each further one with cells and candidates of every puzzle in an
        order that is drawn from ``data.seed``, the puzzle and the pass. A row depends on its position alone, so that a
        resumed run sees the same ones. One epoch of the trainer is all these passes.

    Raises
    ------
    FileNotFoundError
        If a data file does not exist.
    ValueError
        If a file lacks a column, a row cannot be trained on, a setting is unknown or cannot be applied, or no prompt
        is within ``data.max_prompt_length``.
    """

    def _read_files_and_tokenize(self) -> None:
        self._n_passes, self._orders = 1, None
        curriculum, n_passes = self._checked_settings()
        for path in self.data_files:
            check_rl_parquet(path)
        super()._read_files_and_tokenize()
        least = self.config.get("train_batch_size") or 0
        if not self._is_validation_data() and len(self.dataframe) * n_passes < least:
            raise ValueError(
                f"{len(self.dataframe)} puzzles are left to train on (data.max_prompt_length="
                f"{self.max_prompt_length}), and a step takes data.train_batch_size={least}; give more, or lower it"
            )
        if n_passes > 1:
            for index, row in enumerate(self.dataframe):
                augmented_row(row, seed=0, index=index, copy=0)  # raises now, not in the middle of the training
            logger.warning(
                "%s=%d: one epoch holds %d passes over %d puzzles; set trainer.total_epochs=1",
                EPOCHS_KEY,
                n_passes,
                n_passes,
                len(self.dataframe),
            )
        if curriculum is not None or n_passes > 1:
            sizes = [len(gold_types(reward["ground_truth"])) for reward in self.dataframe["reward_model"]]
            self._orders = [pass_order(sizes, curriculum, seed=self.seed, epoch=i) for i in range(n_passes)]
        self._n_passes = n_passes

    def _checked_settings(self) -> tuple[str | None, int]:
        """Return the curriculum and the number of passes of these data."""
        curriculum, n_passes = self.config.get("curriculum"), self.config.get("augmented_epochs")
        if curriculum is None and n_passes is None:
            return None, 1
        if curriculum is not None and curriculum not in SIZE_ORDERS:
            raise ValueError(f"{CURRICULUM_KEY} must be null or one of {', '.join(SIZE_ORDERS)}, got {curriculum!r}")
        if n_passes is not None and (isinstance(n_passes, bool) or not isinstance(n_passes, int) or n_passes < 1):
            raise ValueError(f"{EPOCHS_KEY} must be null or a positive whole number, got {n_passes!r}")
        train = _names(self.config.get("train_files"))
        if train == _names(self.config.get("val_files")) != []:
            raise ValueError(
                f"data.train_files and data.val_files are the same ({train}), so that {CURRICULUM_KEY} and "
                f"{EPOCHS_KEY} would change the validation, too; set these to null, or validate on other files"
            )
        if self._is_validation_data():
            return None, 1
        if self.config.get("shuffle", False):
            key = f"{CURRICULUM_KEY}={curriculum}" if curriculum is not None else f"{EPOCHS_KEY}={n_passes}"
            msg = f"{key} needs data.shuffle=false: the sampler would undo the order of the puzzles and mix the passes"
            raise ValueError(msg)
        if self.seed is None:
            raise ValueError(f"{CURRICULUM_KEY} and {EPOCHS_KEY} need data.seed; set it, to 1 for example")
        return curriculum, n_passes or 1

    def _is_validation_data(self) -> bool:
        """Tell validation from training data: verl builds both alike, and only the files say which these may be."""
        return _names(self.original_data_files) == _names(self.config.get("val_files"))

    def __len__(self) -> int:
        return len(self.dataframe) * self._n_passes

    def __getitem__(self, item: int) -> dict[str, Any]:
        if self._n_passes == 1 and self._orders is None:
            return super().__getitem__(item)
        if not -len(self) <= item < len(self):
            raise IndexError(f"index {item} is out of range for {len(self)} rows")
        copy, position = divmod(int(item) % len(self), len(self.dataframe))
        index = position if self._orders is None else self._orders[copy][position]
        row = super().__getitem__(index)
        if self._n_passes == 1:
            return row
        changed = augmented_row(row, seed=self.seed, index=index, copy=copy)
        if copy and self.filter_overlong_prompts and self._n_tokens(changed["prompt"]) > self.max_prompt_length:
            # Another order may be a few tokens longer, and verl would cut the prompt: this one is as in the file.
            changed = augmented_row(row, seed=self.seed, index=index, copy=0)
        return {**changed, "raw_prompt": self._build_messages(changed, key=self.prompt_key)}

    def _n_tokens(self, prompt: list[dict[str, str]]) -> int:
        options = {k: v for k, v in self.apply_chat_template_kwargs.items() if k not in _OWN_TOKENIZER_OPTIONS}
        if self.tool_schemas is not None:
            options["tools"] = self.tool_schemas
        ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, **options)
        return len(normalize_token_ids(ids))

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
        render_chat(self.tokenizer, dataframe[0][self.prompt_key])  # verl takes a template that fails for a long prompt
        kept = super().maybe_filter_out_long_prompts(dataframe)
        if len(kept) == 0:
            raise ValueError(
                f"all {len(dataframe)} prompts of {list(self.data_files)} are longer than "
                f"data.max_prompt_length={self.max_prompt_length} tokens; raise it"
            )
        if len(kept) < len(dataframe):
            logger.warning(
                "%d of %d prompts are longer than data.max_prompt_length=%d tokens and are left out",
                len(dataframe) - len(kept),
                len(dataframe),
                self.max_prompt_length,
            )
        return kept


def _names(files: Any) -> list[str]:
    if files is None:
        return []
    return [str(file) for file in files] if isinstance(files, Iterable) and not isinstance(files, str) else [str(files)]


def _relayout(row: dict, index: int, layout: Layout) -> list[dict[str, str]]:
    if (row.get("extra_info") or {}).get("prompt_layout") == layout:
        return row["prompt"]
    question, variant = row_question(row, index)
    return chat(question, layout, variant)
