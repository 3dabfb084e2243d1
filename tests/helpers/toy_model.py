"""A Qwen2-shaped model of a few thousand random weights with a byte-level BPE tokenizer, for tests of the engines."""

from pathlib import Path

import numpy as np

from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TYPES = ("B cell", "CD4+/CD45RO+ Memory", "NK cell", "T cell", "T cell, CD8-positive", "monocyte")


def toy_puzzles(n: int, n_cells: int = 3) -> list[Puzzle]:
    """Puzzles without meaning, all different."""
    puzzles = []
    for i in range(n):
        types = [TYPES[(i + j) % len(TYPES)] for j in range(n_cells)]
        cells = tuple((f"GENE{i}", f"G{j}", "ACTB") for j in range(n_cells))
        puzzles.append(
            Puzzle(cells, tuple(sorted(types)), tuple(types), "The cell is from blood.", {"tissue": "blood"})
        )
    return puzzles


# Labels that tokenizers cut in odd places, and that begin like one another.
ODD_TYPES = (
    "CD4+/CD45RO+ Memory",
    "T cell",
    "T cell, CD8-positive",
    "T cell, CD8-positive, alpha-beta",
    "γδ T cell",
    "naïve B cell",
    "B",
    "B <mature>",
    "</x>",
    "浆细胞",
)


def odd_puzzles(n: int) -> list[Puzzle]:
    """Puzzles with odd types: mostly 2 to 4 of them, sometimes all."""
    rng = np.random.default_rng(0)
    puzzles = []
    for i in range(n):
        size = len(ODD_TYPES) if i % 100 == 0 else int(rng.integers(2, 5))
        types = [ODD_TYPES[j] for j in rng.permutation(len(ODD_TYPES))[:size]]
        cells = tuple((f"GENE{i}", f"G{j}") for j in range(size))
        puzzles.append(Puzzle(cells, tuple(sorted(types)), tuple(types), "From blood."))
    return puzzles


def guessing_puzzles(n: int) -> list[Puzzle]:
    """Puzzles of two cells that tell nothing of their types, with traces: only the form of an answer can be learnt."""
    rng = np.random.default_rng(0)
    types = ("B cell", "T cell")
    puzzles = []
    for i in range(n):
        answer = tuple(types[j] for j in rng.permutation(2))
        cells = ((f"GENE{i}", "ACTB"), ("G1", "ACTB"))
        puzzles.append(Puzzle(cells, types, answer, "From blood.", {"reasoning": "a b", "tissue": "blood"}))
    return puzzles


def build_guessing_model(folder: Path) -> Path:
    """Write a model that has learnt to answer :func:`guessing_puzzles`: half of its answers are legal, some right."""
    from recipe.cello1.cold_start import sft
    from recipe.cello1.formats.puzzle_files import write_puzzles

    build_toy_model(folder / "untrained")
    write_puzzles(folder / "sft.json", guessing_puzzles(64))
    settings = [f"model={folder / 'untrained'}", f"train={folder / 'sft.json'}", f"output={folder}", "max_length=512"]
    settings += ["dtype=float32", "lora=null", "eval_fraction=0", "max_steps=120"]
    trainer = {"bf16": "false", "use_cpu": "true", "gradient_checkpointing": "false", "learning_rate": "5e-3"}
    trainer |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": "8", "gradient_accumulation_steps": "1"}
    trainer |= {"save_strategy": "steps", "save_steps": "1000"}
    settings += [f"trainer.{key}={value}" for key, value in trainer.items()]
    return sft.train(sft.load_settings(settings))


def build_toy_tokenizer(extra: tuple[str, ...] = ()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [message["content"] for puzzle in toy_puzzles(6) for message in messages(puzzle)]
    texts += ["<think>a b</think>\n<answer>T cell | B cell</answer>"] * 20 + list(extra)
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_toy_model(folder: Path, *, seed: int = 0, context: int = 1024, ends: bool = False) -> Path:
    """Write model and tokenizer into ``folder``; with ``ends`` about every tenth sampled token ends the turn."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_toy_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=False,  # tied, random weights only repeat the last token
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    if ends:  # the first feature is the same large number everywhere, and only the end of turn listens to it
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[tokenizer.eos_token_id, 0] = 0.6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
