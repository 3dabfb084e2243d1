import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations, pairwise

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("omegaconf")

from recipe.cello1.cold_start import sft, sft_data
from recipe.cello1.formats.atomic import held, read_items, write_items
from recipe.cello1.formats.model_folder import save_model
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.formats.rl_parquet import write_rl_parquet
from recipe.cello1.task.answer import parse_answer
from recipe.cello1.task.prompt import LAYOUTS, messages
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.cli import command
from tests.helpers.rooms import ROOT
from tests.helpers.toy_model import build_toy_model

main = command("sft")

TYPES = ("CD14+ Monocyte", "CD19+ B", "CD56+ NK")
GENES = {"CD14+ Monocyte": ("LYZ", "CST3"), "CD19+ B": ("CD79A", "CD74"), "CD56+ NK": ("GNLY", "NKG7")}
TINY = ["eval_fraction=0", "max_length=400", "dtype=float32", "lora=null", "trainer.bf16=false"]
TINY += ["trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=4"]
TINY += ["trainer.gradient_accumulation_steps=1", "trainer.save_strategy=steps"]


def toy_puzzles(n):
    puzzles = []
    for i in range(n):
        types = [TYPES[(i + j) % 3] for j in range(2 + i % 2)]
        cells = tuple((*GENES[name], f"G{i}") for name in types)
        reasoning = "\n" + "".join(
            f"Cell {j}: {', '.join(GENES[name])} -> {name}\n" for j, name in enumerate(types, start=1)
        )
        puzzles.append(Puzzle(cells, tuple(sorted(types)), tuple(types), "Blood.", {"reasoning": reasoning}))
    return puzzles


PUZZLES = toy_puzzles(24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("sft") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.json"
    write_puzzles(path, PUZZLES)
    return path


@pytest.fixture
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def arguments(model, data, output, *more):
    return [f"model={model}", f"train={data}", f"output={output}", *TINY, *more]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def weights(folder):
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in load(folder).parameters()])


class TestSettings:
    def test_published_settings(self):
        settings = sft.load_settings(["model=m", "train=t", "output=o"])
        lora = {"r": 256, "lora_alpha": 512, "lora_dropout": 0.05, "use_dora": True, "target_modules": "all-linear"}
        assert settings["lora"] == lora
        assert (settings["max_length"], settings["eval_fraction"]) == (4096, 0.1)
        trainer = settings["trainer"]
        assert trainer["learning_rate"] == 5e-5
        assert trainer["num_train_epochs"] == 1
        assert settings["max_steps"] == -1, "the epochs decide"
        assert (trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]) == (6, 16)

    def test_paths_are_taken_as_they_are(self):
        path = "/lr=1e-6, (é) 'a' #1: {x} ${oc.env:HOME}\nb"
        settings = sft.load_settings([f"model={path}", f"train={path}", f"output={path}"])
        assert [settings[key] for key in ("model", "train", "output")] == [path] * 3

    def test_evaluation_goes_with_saving(self):
        settings = sft.load_settings(["model=m", "train=t", "output=o", "trainer.save_steps=20"])
        assert (settings["trainer"]["eval_strategy"], settings["trainer"]["eval_steps"]) == ("steps", 20)
        settings = sft.load_settings(["model=m", "train=t", "output=o", "trainer.save_strategy=epoch"])
        assert settings["trainer"]["eval_strategy"] == "epoch"

    @pytest.mark.parametrize("name", sorted(path.stem for path in (sft.CONFIG / "sft").glob("*.yaml")))
    def test_every_shipped_file_is_understood(self, name, model, data, tmp_path):
        names = ["embedded", name] if name == "smoke" else [name]  # it goes on top of another
        settings = sft.load_settings([*arguments(model, data, tmp_path)[:3], "max_length=400"], names)
        trainer = sft._make_trainer(settings, PUZZLES)
        assert trainer.args.max_steps == settings["max_steps"]
        assert trainer.args.completion_only_loss is True

    def test_command_line_comes_last(self):
        settings = sft.load_settings(["model=m", "train=t", "output=o", "max_steps=8", "trainer.seed=1"], ["embedded"])
        assert settings["max_steps"] == 8
        assert settings["lora"] is None

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["train=t", "output=o"], "model is not set; add model="),
            (["model=m", "train=t", "output=o", "lr=1"], r"unknown settings \['lr'\]"),
            (["model=m", "train=t", "output=o", "prompt_layout=both"], "layout must be one of"),
            (["model=m", "train=t", "output=o", "eval_fraction=1"], "less than 1, got 1"),
            (["model=m", "train=t", "output=o", "overlong=cut"], "error or drop"),
            (["model=m", "train=t", "output=o", "optimizer=sgd"], "optimizer must be adamw or muon, got 'sgd'"),
            (["model=m", "train=t", "output=o", "optimizer=muon"], "adam_lr must be positive with optimizer=muon"),
            (["model=m", "train=t", "output=o", "max_length=long"], "max_length must be a non-negative number"),
            (["model=m", "train=t", "output=o", "seed"], "not of the form key=value"),
        ],
    )
    def test_unusable_settings(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            sft.load_settings(overrides)

    def test_yaml_that_grows(self, tmp_path):
        levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
        (tmp_path / "bomb.yaml").write_text("\n".join(levels))
        assert (tmp_path / "bomb.yaml").stat().st_size < 600
        with pytest.raises(ValueError, match=r"bomb\.yaml has 72 aliases, and 20 may be"):
            sft.load_settings([], [str(tmp_path / "bomb.yaml")])
        (tmp_path / "bad.yaml").write_text("a: [1")
        with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
            sft.load_settings([], [str(tmp_path / "bad.yaml")])

    def test_muon_refuses_to_be_sharded(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="FSDP shards them"):
            sft.load_settings(["model=m", "train=t", "output=o"], ["embedded"])

    def test_unknown_file(self):
        with pytest.raises(FileNotFoundError, match="one of embedded"):
            sft.load_settings([], ["nonsense"])


class TestMasks:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_response_and_the_end_of_turn_are_trained_and_nothing_else(self, layout, model, data, tmp_path):
        settings = sft.load_settings(arguments(model, data, tmp_path, f"prompt_layout={layout}", "max_length=1024"))
        trainer = sft._make_trainer(settings, PUZZLES)
        tokenizer = trainer.processing_class
        seen = 0
        for batch in trainer.get_train_dataloader():
            for ids, labels, attention in zip(
                batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True
            ):
                trained = [token for token, label in zip(ids, labels, strict=True) if label != -100]
                assert [label for label in labels if label != -100] == trained
                length = sum(attention)
                masked = ids[: length - len(trained)]
                text, prompt = tokenizer.decode(trained), tokenizer.decode(masked)
                assert text.endswith("</answer><|im_end|>")
                assert parse_answer(text.removesuffix("<|im_end|>")).ok
                assert prompt.endswith("<|im_start|>assistant\n")
                assert any(
                    prompt
                    == tokenizer.apply_chat_template(messages(p, layout), tokenize=False, add_generation_prompt=True)
                    for p in PUZZLES
                )
                # What the model is asked at inference is what it was trained to answer, token by token.
                assert masked == tokenizer(prompt, add_special_tokens=False)["input_ids"]
                seen += 1
        assert seen == len(PUZZLES)


class TestProcesses:
    def test_an_update_is_over_as_many_puzzles_whatever_their_number(self, monkeypatch):
        assert sft._accumulation({"gradient_accumulation_steps": 16}) == 16
        monkeypatch.setenv("WORLD_SIZE", "8")
        assert sft._accumulation({"gradient_accumulation_steps": 16}) == 2
        with pytest.raises(
            ValueError, match=r"gradient_accumulation_steps=1 .* cannot be shared by 8; make it a multiple"
        ):
            sft._accumulation({})

    @pytest.mark.parametrize(
        ("count", "before", "after"),
        [
            (8, None, "0"),
            (2, "3,1", "3"),
            (2, "GPU-12ab,GPU-34cd", "GPU-12ab"),
            (1, "3", "3"),
            (0, "", ""),
            (0, None, None),
        ],
    )
    def test_a_process_that_is_alone_sees_one_gpu(self, monkeypatch, count, before, after):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what is there comes back after the test
        if before is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        sft._use_one_gpu()
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == after
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
        sft._use_one_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"

    @pytest.mark.parametrize(("epoch", "kept"), [(1.0, "checkpoint-4"), (1.5, "checkpoint-2")])
    def test_no_step_too_many_after_the_last(self, tmp_path, epoch, kept):
        for step in (2, 4):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            state = {"global_step": step, "max_steps": 4, "epoch": epoch * step / 4}
            (folder / "trainer_state.json").write_text(json.dumps(state))
        assert sft._latest_checkpoint(tmp_path).name == kept


class TestData:
    def test_json_keeps_the_traces(self, data):
        assert [p.meta["reasoning"] for p in sft_data.load_examples(data)] == [p.meta["reasoning"] for p in PUZZLES]

    def test_parquet_has_none(self, tmp_path):
        write_rl_parquet(tmp_path / "rl.parquet", PUZZLES, "train")
        with pytest.raises(ValueError, match="item 0 has no reasoning.*require_reasoning=false"):
            sft_data.load_examples(tmp_path / "rl.parquet")
        puzzles = sft_data.load_examples(tmp_path / "rl.parquet", require_reasoning=False)
        assert [(p.cells, p.answer) for p in puzzles] == [(p.cells, p.answer) for p in PUZZLES]

    def test_parquet_of_items_keeps_them(self, data, tmp_path):
        pd.DataFrame(json.loads(data.read_text())).to_parquet(tmp_path / "items.parquet")
        assert sft_data.load_examples(tmp_path / "items.parquet") == sft_data.load_examples(data)

    def test_rows_of_another_layout_are_refused(self, tmp_path):
        write_rl_parquet(tmp_path / "rl.parquet", PUZZLES, "train", "user")
        with pytest.raises(ValueError, match="prompt_layout 'user'.* 'system' is asked for"):
            sft_data.load_examples(tmp_path / "rl.parquet", require_reasoning=False)

    def test_split_is_whole_and_decided_by_the_seed(self):
        train, held_out = sft_data.split_evaluation(50, 0.1, 1)
        assert len(held_out) == 5
        assert sorted(train + held_out) == list(range(50))
        assert sft_data.split_evaluation(50, 0.1, 1) == (train, held_out)
        assert sft_data.split_evaluation(50, 0.1, 2) != (train, held_out)
        assert sft_data.split_evaluation(3, 0, 1) == ([0, 1, 2], [])
        with pytest.raises(ValueError, match="none to train on"):
            sft_data.split_evaluation(1, 0.5, 1)

    def test_too_long_items_are_refused_or_left_out_but_never_cut(self, model, data, tmp_path, capsys):
        lengths = [len(ids) for ids in sft._make_trainer(
            sft.load_settings(arguments(model, data, tmp_path)), PUZZLES).train_dataset["input_ids"]]  # fmt: skip
        limit = sorted(lengths)[len(lengths) // 2]
        with pytest.raises(ValueError, match=f"longer than max_length={limit} tokens.*overlong=drop"):
            sft._make_trainer(sft.load_settings(arguments(model, data, tmp_path, f"max_length={limit}")), PUZZLES)
        settings = sft.load_settings(arguments(model, data, tmp_path, f"max_length={limit}", "overlong=drop"))
        kept = [len(ids) for ids in sft._make_trainer(settings, PUZZLES).train_dataset["input_ids"]]
        assert kept == [length for length in lengths if length <= limit]
        assert "left out" in capsys.readouterr().err
        with pytest.raises(ValueError, match="none is left"):
            sft._make_trainer({**settings, "max_length": 5}, PUZZLES)


class TestCheckpoints:
    def test_the_latest_whole_one_is_found_and_broken_ones_are_removed(self, tmp_path):
        assert sft._latest_checkpoint(tmp_path / "none") is None
        for step in (2, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (tmp_path / "checkpoint-12").mkdir()
        (tmp_path / "checkpoint-14").mkdir()
        (tmp_path / "checkpoint-14" / "trainer_state.json").write_text('{"global_st')
        (tmp_path / "checkpoint-best").mkdir()
        assert sft._latest_checkpoint(tmp_path).name == "checkpoint-10"
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == ["checkpoint-10", "checkpoint-2", "checkpoint-best"]


class TestBatches:
    @pytest.mark.parametrize("adapters", [[], ["lora={r: 2, lora_dropout: 0, target_modules: all-linear}"]])
    def test_loss_and_gradient_are_those_of_all_logits(self, model, data, tmp_path, adapters):
        import torch

        trainer = sft._make_trainer(sft.load_settings(arguments(model, data, tmp_path, *adapters)), PUZZLES)
        batch = next(iter(trainer.get_train_dataloader()))
        learnt = [p for p in trainer.model.parameters() if p.requires_grad]
        count = (batch["labels"] != -100).sum()
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=count)
        prompt = min(row.tolist().index(True) for row in batch["labels"] != -100)
        assert outputs.logits.shape[1] == batch["labels"].shape[1] - prompt + 1
        whole = trainer.model(**batch)
        assert whole.logits.shape[1] == batch["labels"].shape[1]
        torch.testing.assert_close(loss, whole.loss)
        for mine, full in zip(torch.autograd.grad(loss, learnt), torch.autograd.grad(whole.loss, learnt), strict=True):
            torch.testing.assert_close(mine, full)

    @given(
        st.lists(st.integers(1, 999), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 9), st.integers(0, 3)
    )
    def test_rows_of_like_lengths_share_a_batch(self, lengths, size, seed, epoch):
        sampler = sft_data.ByLength(lengths, size, seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
        assert order == list(sampler), "the same epoch has the same order"
        if len(lengths) <= 50 * size:  # one pool: batches do not overlap
            whole = len(order) // size * size
            spans = sorted(
                (
                    min(lengths[i] for i in order[start : start + size]),
                    max(lengths[i] for i in order[start : start + size]),
                )
                for start in range(0, whole, size)
            )
            assert all(high <= low for (_, high), (low, _) in pairwise(spans))

    def test_each_epoch_and_seed_has_its_own_order_of_batches(self):
        lengths = list(range(100))

        def batches(seed, epoch):
            sampler = sft_data.ByLength(lengths, 4, seed)
            sampler.set_epoch(epoch)
            order = list(sampler)
            return [order[i : i + 4] for i in range(0, 100, 4)]

        orders = [batches(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert all(a != b for a, b in combinations(orders, 2))
        assert orders[0] != sorted(orders[0]), "short and long ones are mixed"


class TestErrors:
    def run(self, capsys, *args):
        assert main(list(args)) == 1
        error = capsys.readouterr().err
        assert error.startswith("cello1 sft: error: ")
        assert error.count("\n") == 1
        return error

    def test_missing_data(self, model, tmp_path, capsys):
        assert "x.json does not exist" in self.run(capsys, *arguments(model, tmp_path / "x.json", tmp_path / "o"))

    def test_another_run_in_the_same_output(self, model, data, tmp_path, capsys):
        with held(tmp_path / "o", "output"):
            assert "output: another run is writing to " in self.run(capsys, *arguments(model, data, tmp_path / "o"))

    def test_missing_model(self, data, tmp_path, capsys):
        assert "does not exist" in self.run(capsys, *arguments(tmp_path / "none", data, tmp_path / "o"))
        (tmp_path / "empty").mkdir()
        assert "no config.json" in self.run(capsys, *arguments(tmp_path / "empty", data, tmp_path / "o"))

    def test_item_without_gold(self, model, tmp_path, capsys):
        write_items(tmp_path / "bad.json", [{"user_msg": "Context: "}])
        assert "bad.json: item 0" in self.run(capsys, *arguments(model, tmp_path / "bad.json", tmp_path / "o"))

    def test_settings_that_the_trainer_does_not_have(self, model, data, tmp_path, capsys):
        error = self.run(capsys, *arguments(model, data, tmp_path / "o", "trainer.learning=1", "trainer.max_length=9"))
        assert "['learning', 'max_length']" in error
        assert "r_" in self.run(capsys, *arguments(model, data, tmp_path / "o2", "lora={r_: 4}"))
        assert not (tmp_path / "o" / "settings.json").exists()


@pytest.mark.integration
class TestTraining:
    def test_two_steps_change_the_weights_and_the_same_seed_gives_the_same_model(
        self, model, data, tmp_path, capsys, monkeypatch
    ):
        import torch

        for name in ("a", "b"):
            assert main(arguments(model, data, tmp_path / name, "max_steps=2", "trainer.learning_rate=1e-3")) == 0
        assert not torch.equal(weights(tmp_path / "a" / "model"), weights(model))
        assert torch.equal(weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model"))
        capsys.readouterr()

        # Finished: nothing is done again.
        changed = (tmp_path / "a" / "model" / "model.safetensors").stat().st_mtime_ns
        assert main(arguments(model, data, tmp_path / "a", "max_steps=2", "trainer.learning_rate=1e-3")) == 0
        assert "already trained" in capsys.readouterr().err
        assert (tmp_path / "a" / "model" / "model.safetensors").stat().st_mtime_ns == changed

        # Other settings in the same folder are refused, by name.
        assert main(arguments(model, data, tmp_path / "a", "max_steps=3", "trainer.learning_rate=1e-3")) == 1
        assert "max_steps (2, now 3)" in capsys.readouterr().err

        # So is another number of processes, which would make another batch.
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments(model, data, tmp_path / "a", "max_steps=2", "trainer.learning_rate=1e-3")) == 1
        assert "num_processes (1, now 2)" in capsys.readouterr().err

    def test_batches_by_length_are_the_same_after_a_resume(self, model, data, tmp_path):
        import torch

        more = ["max_steps=9", "trainer.train_sampling_strategy=group_by_length", "trainer.save_total_limit=20"]
        settings = [sft.load_settings(arguments(model, data, tmp_path / name, *more)) for name in ("whole", "cut")]
        whole = sft.train(settings[0])
        # Of 24 puzzles in batches of 4 the eighth is in the second epoch.
        checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-8"
        shutil.copytree(checkpoint, tmp_path / "cut" / "checkpoints" / checkpoint.name)
        assert torch.equal(weights(sft.train(settings[1])), weights(whole))

    def test_a_start_that_came_to_nothing_binds_nobody(self, model, data, tmp_path, monkeypatch, capsys):
        def fails(trainer, **options):
            raise OSError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr("trl.SFTTrainer.train", fails)
            assert main(arguments(model, data, tmp_path / "o", "max_steps=2")) == 1
        batch = "trainer.per_device_train_batch_size=1"
        assert main(arguments(model, data, tmp_path / "o", "max_steps=2", batch)) == 0
        assert main(arguments(model, data, tmp_path / "o", "max_steps=2")) == 1
        assert "per_device_train_batch_size" in capsys.readouterr().err

    def test_by_default_a_tenth_of_the_training_can_be_lost(self, model, data, tmp_path):
        more = ["max_steps=10", "eval_fraction=0.2", "trainer.save_total_limit=20"]
        assert main(arguments(model, data, tmp_path / "o", *more)) == 0
        steps = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "o" / "checkpoints").glob("checkpoint-*")}
        assert steps == set(range(1, 11))

    def test_all_weights_are_trained_in_float32_and_kept_as_the_base_has_them(self, model, tokenizer, data, tmp_path):
        import torch
        from transformers import AutoConfig

        save_model(tmp_path / "base", load(model).to(torch.bfloat16), tokenizer)
        run = arguments(tmp_path / "base", data, tmp_path / "o", "dtype=null", "max_steps=2")
        parameters = sft._make_trainer(sft.load_settings(run), PUZZLES).model.parameters()
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        assert main(run) == 0
        assert AutoConfig.from_pretrained(tmp_path / "o" / "model").dtype == torch.bfloat16

    @pytest.mark.parametrize("dora", ["true", "false"])
    def test_lora_is_merged_into_the_base(self, dora, model, data, tmp_path):
        import torch

        lora = f"lora={{r: 4, lora_alpha: 8, lora_dropout: 0.05, use_dora: {dora}, target_modules: all-linear}}"
        more = ["max_steps=2", "trainer.learning_rate=1e-2", "eval_fraction=0.2", "trainer.save_steps=1"]
        more += ["trainer.eval_strategy=steps", "trainer.eval_steps=1"]
        assert main(arguments(model, data, tmp_path / "o", lora, *more)) == 0
        before, after = load(model), load(tmp_path / "o" / "model")
        assert not list((tmp_path / "o" / "model").glob("adapter*"))
        assert dict(after.named_parameters()).keys() == dict(before.named_parameters()).keys()
        changed = {
            name
            for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
            if not torch.equal(old, new)
        }
        assert any("q_proj" in name for name in changed)
        assert not any("embed" in name or "norm" in name for name in changed)
        assert any("eval_loss" in line for line in read_items(tmp_path / "o" / "log.jsonl"))

    def test_the_best_checkpoint_becomes_the_model(self, model, data, tmp_path):
        """A learning rate that breaks the model after the first step: the last checkpoint is not the best."""
        import torch

        more = ["max_steps=3", "eval_fraction=0.2", "trainer.save_steps=1", "trainer.eval_strategy=steps"]
        more += ["trainer.eval_steps=1", "trainer.save_total_limit=5", "trainer.learning_rate=1.0"]
        more += ["trainer.lr_scheduler_type=constant"]
        assert main(arguments(model, data, tmp_path / "o", *more)) == 0
        losses = {
            line["step"]: line["eval_loss"] for line in read_items(tmp_path / "o" / "log.jsonl") if "eval_loss" in line
        }
        best = min(losses, key=losses.get)
        assert best != max(losses), losses
        checkpoints = tmp_path / "o" / "checkpoints"
        assert torch.equal(weights(tmp_path / "o" / "model"), weights(checkpoints / f"checkpoint-{best}"))
        assert not torch.equal(weights(tmp_path / "o" / "model"), weights(checkpoints / f"checkpoint-{max(losses)}"))

    @pytest.mark.parametrize(("key", "to"), [("", []), ("secret", ["wandb"])])
    def test_a_key_sends_the_log_to_wandb(self, model, data, tmp_path, monkeypatch, key, to):
        monkeypatch.setenv("WANDB_API_KEY", key)
        settings = sft.load_settings(arguments(model, data, tmp_path))
        assert sft._make_trainer(settings, PUZZLES).args.report_to == to

    @pytest.mark.parametrize("optimizer", [[], ["optimizer=muon", "adam_lr=1e-3"]], ids=["adamw", "muon"])
    def test_killed_at_any_point_it_goes_on_and_ends_where_it_would_have(self, model, data, tmp_path, optimizer):
        import torch

        more = [
            *optimizer,
            "max_steps=12",
            "trainer.save_steps=2",
            "trainer.learning_rate=1e-3",
            "trainer.logging_steps=1",
        ]
        command = [
            sys.executable,
            "-m",
            "recipe.cello1",
            "sft",
            *arguments(model, data, tmp_path / "killed", *more),
        ]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path)
        checkpoints = tmp_path / "killed" / "checkpoints"
        try:
            while process.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if not (tmp_path / "killed" / "model").exists():
            # As if it had been killed in the middle of writing a later one.
            (checkpoints / "checkpoint-99").mkdir()

        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert run.returncode == 0, run.stderr
        assert main(arguments(model, data, tmp_path / "whole", *more)) == 0
        assert torch.equal(weights(tmp_path / "killed" / "model"), weights(tmp_path / "whole" / "model"))
        steps = [line["step"] for line in read_items(tmp_path / "killed" / "log.jsonl") if "loss" in line]
        assert steps == list(range(1, 13))

    def test_a_folder_that_was_renamed_goes_on(self, model, data, tmp_path):
        """The hashes decide, not the paths; the best checkpoint is found at its new place."""
        import torch

        more = ["max_steps=3", "eval_fraction=0.2", "trainer.save_steps=1", "trainer.eval_strategy=steps"]
        more += ["trainer.eval_steps=1", "trainer.learning_rate=1.0", "trainer.lr_scheduler_type=constant"]
        for name in ("old", "new"):
            copies = [shutil.copytree(model, tmp_path / name / "base"), shutil.copy(data, tmp_path / name / "sft.json")]
            output = tmp_path / name / "o"
            if name == "new":
                shutil.move(tmp_path / "old" / "o", output)
                shutil.rmtree(output / "model")  # as if killed before the last step
                shutil.rmtree(output / "checkpoints" / "checkpoint-3")
            assert main(arguments(*copies, output, *more)) == 0
            best = weights(output / "checkpoints" / "checkpoint-1")
            assert torch.equal(weights(output / "model"), best), "of the first step, after which it breaks"
        assert main(arguments(*copies, output, *more, "seed=9")) == 1

    def test_it_learns_what_it_is_shown(self, model, data, tmp_path):
        more = ["max_steps=40", "trainer.learning_rate=1e-2", "trainer.logging_steps=1"]
        assert main(arguments(model, data, tmp_path / "o", *more)) == 0
        losses = [line["loss"] for line in read_items(tmp_path / "o" / "log.jsonl") if "loss" in line]
        assert losses[-1] < 0.5 * losses[0]
