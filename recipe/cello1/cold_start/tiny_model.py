"""Make a tokenizer and a small Qwen3 model from nothing, for runs without a download (the embedded default).

``python -m recipe.cello1 tiny-model --data sft.json --out model``

Tokens are what training costs, so each gene, each cell type and each fixed part of the format is one token: a puzzle of
four cells takes about 130 tokens with its answer. Any other text is spelled by a byte-level BPE.

The one-token words are *added* tokens, not BPE entries behind a pre-tokenizer of our own: for ``model_type: qwen3``
transformers 5 always builds ``Qwen2Tokenizer``, with Qwen's pre-tokenizer, whatever ``tokenizer.json`` says, so that a
tokenizer with another one changes silently when it is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from recipe.cello1.formats.items import REASONING_KEY
from recipe.cello1.formats.model_folder import save_model
from recipe.cello1.formats.puzzle_files import load_puzzles
from recipe.cello1.task.answer import ANSWER_CLOSE, ANSWER_OPEN, SEPARATOR, THINK_CLOSE, THINK_OPEN
from recipe.cello1.task.prompt import LAYOUTS, VARIANTS, Layout, instruction, render_user
from recipe.cello1.task.puzzle import Puzzle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

PAD_TOKEN = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, TURN_START, TURN_END)
# Qwen's turns; without Qwen's default system message, which would be a hidden part of the prompt layout "user".
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    f"{{{{- '{TURN_START}' + message['role'] + '\\n' + message['content'] + '{TURN_END}\\n' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{TURN_START}assistant\\n' -}}}}{{%- endif -%}}"
)
_ROLES = ("system\n", "user\n", "assistant\n")
_ARROW = " -> "


def build_tokenizer(
    puzzles: Sequence[Puzzle], *, layout: Layout = "system", min_count: int = 10, n_merges: int = 128
) -> PreTrainedTokenizerBase:
    """Train the tokenizer on rendered puzzles."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    if not puzzles:
        raise ValueError("puzzles is empty; the tokenizer is trained on puzzles")
    fixed, words = _vocabulary(puzzles, layout, min_count)

    bpe = Tokenizer(models.BPE())
    backend = Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = backend.normalizer, backend.pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL_TOKENS) + n_merges,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(puzzles, layout), trainer)
    vocab, merges = _bpe_tables(bpe)

    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=PAD_TOKEN,
        eos_token=TURN_END,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
    )
    # The decoder takes an added token that has only characters of the byte alphabet for bytes: right for ASCII only.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in fixed if text.isascii()])
    # single_word: never a part of a longer name.
    tokenizer.add_tokens([AddedToken(text, normalized=False, single_word=True) for text in words if text.isascii()])
    return tokenizer


def _vocabulary(puzzles: Sequence[Puzzle], layout: Layout, min_count: int) -> tuple[list[str], list[str]]:
    """Return the fixed parts of the format, and the words: types, and genes with and without the comma after them."""
    contexts: Counter[str] = Counter()
    genes: Counter[str] = Counter()
    types: set[str] = set()
    for puzzle in puzzles:
        contexts[render_user(puzzle).partition("\nCell 1:")[0]] += 1
        genes.update(gene for cell in puzzle.cells for gene in cell)
        types.update(puzzle.candidates)
    n_cells = max(puzzle.n_cells for puzzle in puzzles)
    fixed = [
        instruction("batch", layout),
        *sorted(text for text, count in contexts.items() if count >= min_count),
        *[f"\nCell {number}:" for number in range(1, n_cells + 1)],
        f"\n\n{VARIANTS['batch'].question}\n",
        THINK_OPEN,
        f"\n{THINK_CLOSE}\n{ANSWER_OPEN}",
        THINK_CLOSE,  # this and the next: reasoning that is closed in time is closed in two tokens
        f"\n{ANSWER_OPEN}",
        ANSWER_CLOSE,
        _ARROW,
        SEPARATOR,
        *_ROLES,
    ]
    listed = sorted(gene for gene, count in genes.items() if count >= min_count)
    return fixed, [*sorted(types), *[f" {gene}," for gene in listed], *[f" {gene}" for gene in listed]]


def _texts(puzzles: Sequence[Puzzle], layout: Layout) -> Iterable[str]:
    """Yield what the BPE learns from: the instruction once (it would outweigh all else), then the puzzles."""
    yield instruction("batch", layout)
    for puzzle in puzzles:
        yield render_user(puzzle)
        yield puzzle.meta.get(REASONING_KEY) or ""


def _bpe_tables(bpe: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def build_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    n_layers: int = 4,
    n_heads: int = 4,
    max_positions: int = 2048,
) -> Qwen3ForCausalLM:
    """Make a randomly initialised Qwen3 model, float32."""
    # Qwen3 normalises queries and keys. In trials with one seed it learnt more of as many of Muon's steps than Qwen2.
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        head_dim=hidden_size // n_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="the puzzles with traces that the model will learn from")
    parser.add_argument("--out", required=True, help="folder for the untrained model with its tokenizer")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights (%(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, default="system", help="prompt layout (%(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    tokenizer = build_tokenizer(load_puzzles(args.data).puzzles, layout=args.layout)
    model = build_model(tokenizer, seed=args.seed)
    save_model(args.out, model, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens: {args.out}", file=sys.stderr)
