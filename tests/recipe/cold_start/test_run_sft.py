"""The cold start from its launcher, in two processes among which the weights are sharded."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.cello1.formats.atomic import read_items
from recipe.cello1.formats.puzzle_files import write_puzzles
from tests.helpers.processes import launch
from tests.helpers.toy_model import build_toy_model, toy_puzzles

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
SHORT = ["max_length=1024", "max_steps=3", "eval_fraction=0.25", "trainer.learning_rate=1e-2"]
SHORT += ["trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2"]
SHORT += [f"trainer.{what}_strategy=steps" for what in ("save", "eval")]
SHORT += [f"trainer.{what}_steps=1" for what in ("save", "eval")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("inputs")
    build_toy_model(folder / "model")
    puzzles = [replace(puzzle, meta={**puzzle.meta, "reasoning": "a b"}) for puzzle in toy_puzzles(8)]
    write_puzzles(folder / "sft.json", puzzles)
    return folder


def run(inputs: Path, output: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    variables = {"MODEL": str(inputs / "model"), "TRAIN_DATA": str(inputs / "sft.json"), "NUM_GPUS": str(processes)}
    variables |= {"CELLO1_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return launch("run_sft.sh", output, *arguments, *SHORT, **variables)


def changed_weights(before: Path, after: Path) -> set[str]:
    import torch
    from transformers import AutoModelForCausalLM

    models = [dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in (before, after)]
    assert models[0].keys() == models[1].keys()
    return {name for name in models[0] if not torch.equal(models[0][name], models[1][name])}


def test_adapters_are_trained_in_two_processes_resumed_and_merged(inputs, tmp_path):
    output = tmp_path / "out"
    small = ["lora.r=4", "lora.lora_alpha=8"]
    first = run(inputs, output, *small)
    assert first.returncode == 0, first.stderr[-3000:]
    assert list(output.glob("checkpoints/*/rng_state_1.pth")), "the second process took part"
    assert list(output.glob("checkpoints/*/pytorch_model_fsdp*")), "the weights were sharded"
    changed = changed_weights(inputs / "model", output / "model")
    assert any("q_proj" in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)
    assert not list((output / "model").glob("adapter*"))

    # As if it had been killed while it wrote the last checkpoint.
    os.replace(output / "model", tmp_path / "whole")
    (output / "checkpoints" / "checkpoint-3" / "trainer_state.json").unlink()
    second = run(inputs, output, *small)
    assert second.returncode == 0, second.stderr[-3000:]
    assert changed_weights(tmp_path / "whole", output / "model") == set()
    assert [line["step"] for line in read_items(output / "log.jsonl") if "loss" in line] == [1, 2, 3]

    shutil.rmtree(output / "model")
    other = run(inputs, output, *small, processes=1)
    assert other.returncode == 1
    assert "num_processes (2, now 1)" in other.stderr


def test_all_weights_are_trained_in_two_processes(inputs, tmp_path):
    result = run(inputs, tmp_path / "out", "--full")
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(tmp_path.glob("out/checkpoints/*/pytorch_model_fsdp*")), "the weights were sharded"
    changed = changed_weights(inputs / "model", tmp_path / "out" / "model")
    assert any("embed" in name for name in changed) and any("norm" in name for name in changed)
