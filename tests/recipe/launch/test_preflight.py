import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from recipe.cello1.formats.atomic import write_items
from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.formats.rl_parquet import iter_parquet, write_rl_parquet
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.launch import preflight, resources
from recipe.cello1.launch.model_files import read_model
from recipe.cello1.launch.preflight import FREE, check_model, compose, rl_data
from recipe.cello1.task.prompt import messages
from recipe.cello1.task.puzzle import Puzzle
from tests.helpers.cli import command
from tests.helpers.toy_model import build_toy_model, toy_puzzles

main = command("preflight")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("torch")
    return build_toy_model(tmp_path_factory.mktemp("preflight"), context=8192)


@pytest.fixture
def model(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "model"))


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.parquet"
    write_rl_parquet(path, toy_puzzles(64), "train")
    return path


def change_tensor(file: Path, name: str, value: float) -> None:
    """Fill a tensor with a number."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, file, metadata={"format": "pt"})


def arguments(model, train, val, out) -> list[str]:
    paths = ["--model", str(model), "--train", str(train), "--val", str(val), "--run", str(out)]
    return [*paths, "--config", "cello1_grpo", "--", "hardware=cpu"]


def test_prints_the_files_to_train_on(model, data, tmp_path, capsys):
    pytest.importorskip("verl")
    assert main(arguments(model, data, data, tmp_path)) == 0
    assert capsys.readouterr().out.split("\0")[:2] == [str(data), str(data)]


@pytest.mark.slow
class TestTheSameRun:
    """What a folder with a checkpoint or a model was trained with must be what it goes on with."""

    @pytest.fixture(autouse=True)
    def platform(self, monkeypatch):
        pytest.importorskip("verl")
        monkeypatch.setattr(preflight, "check_platform", lambda: None)

    @pytest.fixture(params=["grpo/latest_checkpointed_iteration.txt", "model/config.json"])
    def start(self, request, model, data, tmp_path, capsys):
        """Return a function that starts the run once more; gives what it says when it is refused, else nothing."""
        again = [*arguments(model, data, data, tmp_path / "run"), "data.seed=1"]
        assert main(again) == 0
        trained = tmp_path / "run" / request.param
        trained.parent.mkdir()
        trained.write_text("1")
        capsys.readouterr()

        def start(*overrides, **options):
            changed = list(again)
            for name, value in options.items():
                changed[changed.index(f"--{name}") + 1] = str(value)
            code = main([*changed, *overrides])
            out, err = capsys.readouterr()
            assert (code == 1 and out == "" and err.count("\n") == 1) or (code == 0 and not err)
            return err

        return start

    def test_goes_on(self, start):
        assert start() == ""

    def test_what_is_computed_may_not_change(self, start):
        err = start("+variant=dapo")
        assert "config.actor_rollout_ref.actor.clip_ratio_high (0.2, now 0.28)" in err
        assert "choose another output" in err
        assert "config.trainer.n_gpus_per_node (1, now 2)" in start("trainer.n_gpus_per_node=2")
        assert "config.trainer.nnodes (1, now 2)" in start("trainer.nnodes=2")
        assert "config.data.seed (1, now 2)" in start("data.seed=2")
        assert "config.trainer.total_training_steps (None, now 9)" in start("trainer.total_training_steps=9")
        assert "name ('cello1_grpo', now 'cello1_ppo')" in start(config="cello1_ppo")
        assert start() == "", "what was refused left no mark"

    def test_other_data_or_another_model(self, start, model, tmp_path):
        write_rl_parquet(tmp_path / "other.parquet", toy_puzzles(65), "train")
        assert "sha256.train (" in start(train=tmp_path / "other.parquet")
        assert "sha256.val (" in start(val=tmp_path / "other.parquet")
        change_tensor(model / "model.safetensors", "model.norm.weight", 0.5)
        assert "sha256.model (" in start()

    def test_what_only_logs_and_saves_may_change(self, start, data, tmp_path):
        assert start("trainer.logger=[console,wandb]", "trainer.save_freq=1", "ray_kwargs.ray_init.num_cpus=8") == ""
        moved = tmp_path / "moved.parquet"
        moved.write_bytes(data.read_bytes())
        assert start(train=moved) == ""

    def test_renamed_folders_go_on(self, start, model, tmp_path):
        places = {"model": model.rename(tmp_path / "m"), "run": (tmp_path / "run").rename(tmp_path / "r")}
        assert start(**places) == ""
        assert "config.data.seed (1, now 2)" in start("data.seed=2", **places)


def test_a_start_that_trained_nothing_binds_nobody(model, data, tmp_path, monkeypatch):
    pytest.importorskip("verl")
    monkeypatch.setattr(preflight, "check_platform", lambda: None)
    command = arguments(model, data, data, tmp_path / "run")
    assert main([*command, "data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=32"]) == 0
    assert main(command) == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train_batch_size=65"], "there are 64 puzzles to train on, and a step takes data.train_batch_size=65"),
        (
            ["trainer.nnodes=6", "ray_kwargs.ray_init.num_cpus=999"],
            "ppo_mini_batch_size x rollout.n = 320 responses cannot be shared by 6 GPUs",
        ),
        (["actor_rollout_ref.rollout.n=3", "trainer.nnodes=64"], "=2 does not divide the 3 responses of each GPU"),
        (["trainer.nnodes=0"], "trainer.nnodes must be a positive whole number, got 0"),
        (["data.train_batch_size=32"], "=32 is less than actor_rollout_ref.actor.ppo_mini_batch_size=64; raise it"),
        (["data.train_batch_size=abc"], "data.train_batch_size must be a positive whole number, got 'abc'"),
        (["actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"], "=3 does not divide the number of GPUs"),
        (["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=7"], "=7 does not divide the 320 responses"),
        (["trainer.device=cuda"], "trainer.n_gpus_per_node=1, and this machine has 0 GPUs; choose another HARDWARE"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=3"], "=3 does not divide the number of GPUs"),
        (["data.max_prompt_length=9"], "the prompts have "),
        (["data.max_response_length=3001"], "and requests would fail; set it to 6073"),
        (["actor_rollout_ref.rollout.max_model_len=8193"], "the model takes 8192 tokens and the run needs 8193"),
        (
            ["ray_kwargs.ray_init.num_cpus=8", "trainer.n_gpus_per_node=2"],
            "claim 9 logical CPUs (1 storage units, 2, and 3 for each of 2 GPUs), and Ray has 8; set ray_kwargs.ray",
        ),
    ],
)
@pytest.mark.slow
def test_sizes_that_do_not_go_together(model, data, tmp_path, capsys, monkeypatch, overrides, said):
    pytest.importorskip("verl")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main([*arguments(model, data, data, tmp_path), *overrides]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_sizes_that_only_balanced_batches_allow(model, data, tmp_path):
    pytest.importorskip("verl")
    sizes = ["actor_rollout_ref.rollout.n=3", "trainer.nnodes=64", "ray_kwargs.ray_init.num_cpus=195"]
    assert main([*arguments(model, data, data, tmp_path), *sizes, "+variant=balanced"]) == 0


def test_overrides_that_cannot_be_applied(model, data, tmp_path, capsys):
    pytest.importorskip("verl")
    assert main([*arguments(model, data, data, tmp_path), "data.no_such=1"]) == 1
    err = capsys.readouterr().err
    assert "the overrides cannot be applied" in err and "no_such" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "variable"),
    [
        ("trainer.default_local_dir=x", "OUTPUT"),
        ("+data.train_files=[a,b]", "TRAIN_DATA"),
        ("hydra.run.dir=y", "OUTPUT"),
    ],
)
def test_what_has_a_variable_is_no_override(model, data, tmp_path, capsys, override, variable):
    assert main([*arguments(model, data, data, tmp_path), override]) == 1
    err = capsys.readouterr().err
    assert f"{override} cannot be an override; set the variable {variable} instead" in err


def test_free_settings_exist():
    pytest.importorskip("verl")
    config = compose("cello1_grpo", [])
    for key in FREE:
        place = config
        for part in key.split("."):
            assert part in place, key
            place = place[part]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_puzzle_json_is_converted(tmp_path, suffix):
    source = tmp_path / f"puzzles{suffix}"
    write_puzzles(source, toy_puzzles(3))
    target = rl_data(str(source), "val", tmp_path / "out")
    assert target == tmp_path / "out" / "val.parquet"
    assert [row["extra_info"]["prompt_layout"] for row in iter_parquet(target)] == ["system"] * 3


def test_rl_rows_in_json_stay_what_they_are(tmp_path):
    puzzle = Puzzle((("ALB",),), ("hepatocyte", "T cell"), ("hepatocyte",))
    write_items(tmp_path / "rows.jsonl", [rl_row(puzzle, "train", 0, "user", "single")])
    (row,) = iter_parquet(rl_data(str(tmp_path / "rows.jsonl"), "train", tmp_path))
    assert (row["extra_info"]["prompt_layout"], row["extra_info"]["variant"]) == ("user", "single")
    assert row["prompt"] == messages(puzzle, "user", "single")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_incomplete_model(model, missing):
    (model / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"not a complete Hugging Face model: it has no "):
        check_model(str(model))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "~/model"])
def test_folder_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder"):
        check_model(name)


def test_hub_id_that_cannot_be_looked_up():
    with pytest.raises(FileNotFoundError, match="neither a folder nor in the local cache"):
        check_model("nobody-at-all/no-such-model")


@pytest.mark.parametrize("bad", ["missing.parquet", "missing.json"])
def test_missing_data_is_one_line_and_a_code(model, data, tmp_path, capsys, bad):
    assert main(arguments(model, tmp_path / bad, data, tmp_path)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cello1 preflight: error: ") and bad in err and err.count("\n") == 1


def test_empty_dataset(model, data, tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    assert main(arguments(model, empty, data, tmp_path)) == 1
    assert "error:" in capsys.readouterr().err


PLATFORM = "from recipe.cello1.launch.preflight import check_platform; check_platform()"


@pytest.mark.slow
def test_unknown_platform_says_so():
    pytest.importorskip("verl")
    result = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['VERL_PLATFORM'] = 'cpu'; import verl\n"
         f"os.environ['VERL_PLATFORM'] = 'abacus'\n{PLATFORM}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "VERL_PLATFORM=abacus: no installed verl plugin registers it" in result.stderr


@pytest.mark.slow
def test_broken_plugin_is_loud(tmp_path):
    """Its own error comes up, although verl swallows it."""
    pytest.importorskip("verl")
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nbroken = broken_platform\n")
    (tmp_path / "broken_platform.py").write_text("import a_module_that_is_not_there\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import os; os.environ['VERL_PLATFORM'] = 'cpu'; {PLATFORM}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "the verl plugin broken (broken_platform) cannot be loaded" in result.stderr
    assert "a_module_that_is_not_there" in result.stderr


def test_cpu_training_without_the_vllm_plugin(monkeypatch):
    pytest.importorskip("verl")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(preflight, "entry_points", lambda group, **_: [])
    monkeypatch.setattr("verl.plugin.platform.PlatformRegistry.get", lambda name: object())
    with pytest.raises(ValueError, match="lacks the vLLM plugin cello1_cpu"):
        preflight.check_platform()


class TestModelFiles:
    def refused(self, model, match):
        with pytest.raises(ValueError, match=match):
            read_model(model)

    def test_a_whole_one(self, model):
        from transformers import AutoModelForCausalLM

        facts = read_model(model)
        assert facts.n_parameters == AutoModelForCausalLM.from_pretrained(model).num_parameters()
        assert facts.config["max_position_embeddings"] == 8192

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_pointers_of_git_lfs(self, model, name):
        (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 4\n")
        self.refused(model, rf"{name} is a pointer of Git LFS; .* git lfs pull")

    def test_a_cut_file(self, model):
        file = model / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-10])
        self.refused(model, rf"has {len(content) - 10:,} of {len(content):,} bytes; copy it again")
        for begin in (content[:100], b"", b"PK\x03\x04 a zip"):
            file.write_bytes(begin)
            self.refused(model, "not a safetensors file, or it is cut off")

    def test_missing_shards(self, model):
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(model, r"lacks 1 of 2 files of weights, model-1\.safetensors first")

    def test_only_what_is_loaded_counts(self, model):
        whole = read_model(model).n_parameters
        shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
        assert read_model(model).n_parameters == whole
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        self.refused(
            model, r"has none of model\.safetensors\.index\.json, .*; give a whole model"
        )  # nothing names the shard
        (model / "model-00001-of-00001.safetensors").rename(model / "adapter_model.safetensors")
        self.refused(model, "has none of ")
        (model / "pytorch_model.bin").write_bytes(b"PK")
        assert read_model(model).n_parameters == 0, "what cannot be looked at is not refused"
        (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
        self.refused(model, r"lacks 2 of 2 files of weights, 1\.bin first")

    @pytest.mark.parametrize("content", ["[]", '{"weight_map": null}', '{"weight_map": {}}', "{}"])
    def test_an_index_of_nothing(self, model, content):
        (model / "model.safetensors.index.json").write_text(content)
        self.refused(model, r"index\.json (has no weight_map|must hold a JSON object).*; copy it again")

    def test_an_index_of_another_file(self, model):
        index = {"weight_map": {"model.norm.weight": "model.safetensors", "model.layers.9.x": "model.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(model, r"model\.safetensors lacks model\.layers\.9\.x, which the index says it has")

    @pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "merges.txt"])
    def test_pointers_among_the_files_of_the_tokenizer(self, model, name):
        (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 4\n")
        self.refused(model, rf"{name} is a pointer of Git LFS")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
    @pytest.mark.parametrize("content", ["[]", '{"a":', "null"])
    def test_json_that_is_none(self, model, name, content):
        (model / name).write_text(content)
        self.refused(model, rf"{name} (is not valid JSON|must hold a JSON object)")

    @pytest.mark.parametrize(
        "header", [[1], 5, {}, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, {"a": 1}]
    )
    def test_headers_of_something_else(self, model, header):
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        self.refused(model, "not a safetensors file, or it is cut off")

    def test_quantised_weights(self, model):
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
        save_file(tensors, model / "model.safetensors")
        self.refused(model, "model.norm.weight is quantised, which cannot be trained")
        self.change_config(model, quantization_config={"quant_method": "gptq"})
        self.refused(model, "has quantised weights, which cannot be trained")

    def change_config(self, model, **changes):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        return config

    def test_an_embedding_of_another_size_than_the_configuration_says(self, model):
        rows = self.change_config(model, text_config=None)["vocab_size"]
        read_model(model)
        self.change_config(model, vocab_size=rows + 1)
        self.refused(model, rf"vocab_size={rows + 1}, and the model has {rows} embeddings")

    def test_more_embeddings_than_tokens_are_fine_and_a_head_is_tied_or_there(self, model):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        embeddings = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = np.concatenate([embeddings, embeddings[:7]])
        tensors.pop("lm_head.weight", None)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        self.change_config(model, vocab_size=len(embeddings) + 7, tie_word_embeddings=True)
        assert read_model(model).n_parameters == sum(tensor.size for tensor in tensors.values())
        self.change_config(model, tie_word_embeddings=False)
        self.refused(model, r"there is no lm_head\.weight, which would be random")

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("place", [0, 150_001, -1])
    def test_nan_anywhere_that_is_looked_at(self, model, dtype, place):
        from safetensors.numpy import load_file, save_file

        tensors = {name: tensor.astype(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
        tensors["model.odd"] = np.ones(3, dtype=dtype)  # what comes after it begins at an odd place
        tensors["model.large.weight"] = np.ones(300_001, dtype=dtype)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        read_model(model)
        tensors["model.large.weight"][place] = np.inf
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        self.refused(model, r"model\.large\.weight holds NaN or infinity")

    def test_more_tokens_than_embeddings(self, model):
        content = json.loads((model / "tokenizer.json").read_text())
        content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<new>"})
        (model / "tokenizer.json").write_text(json.dumps(content))
        self.refused(model, r"the tokenizer has 5001 tokens and the model \d+ embeddings; .*resize_token_embeddings")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(self, model, value):
        change_tensor(model / "model.safetensors", "model.layers.0.mlp.up_proj.weight", value)
        self.refused(model, "up_proj.weight holds NaN or infinity")

    def test_nan_in_bfloat16(self, model):
        import torch
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
        save_file(tensors, model / "model.safetensors")
        read_model(model)
        tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, model / "model.safetensors")
        self.refused(model, "model.norm.weight holds NaN")


class TestPrompts:
    def test_a_template_without_a_system_role(self, model, data, tmp_path, capsys):
        pytest.importorskip("verl")
        template = (model / "chat_template.jinja").read_text()
        no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        (model / "chat_template.jinja").write_text(no_system + template)
        assert main(arguments(model, data, data, tmp_path)) == 1
        assert "System role not supported; set prompt_layout=user" in capsys.readouterr().err
        assert main([*arguments(model, data, data, tmp_path), "data.prompt_layout=user"]) == 0

    def test_no_template_at_all(self, model, data, tmp_path, capsys):
        pytest.importorskip("verl")
        (model / "chat_template.jinja").unlink()
        assert main(arguments(model, data, data, tmp_path)) == 1
        assert "the model's tokenizer has no chat template" in capsys.readouterr().err

    @pytest.mark.parametrize("key", ["custom_chat_template", "tokenizer_path"])
    def test_the_template_that_verl_takes_is_the_one_that_is_tried(self, model, data, tmp_path, capsys, key):
        pytest.importorskip("verl")
        value, other = "endless", tmp_path / "other"
        if key == "tokenizer_path":
            shutil.copytree(model, other)
            (other / "chat_template.jinja").write_text("{{ 'ab' * 10**9 }}")
            value = str(other)
        else:
            value = "'{{ messages|tojson(indent=3000000000) }}'"
        override = f"actor_rollout_ref.model.{key}={value}"
        assert main([*arguments(model, data, data, tmp_path), override]) == 1
        assert "cannot be applied to system/user: it makes or moves more than" in capsys.readouterr().err


class TestResources:
    """The published sizes on machines of all kinds, by arithmetic alone."""

    N = 7_615_616_512  # parameters of Qwen2.5-7B
    GPU = 85_000_000_000  # what an 80 GB card says it has

    @pytest.fixture(autouse=True)
    def verl(self):
        pytest.importorskip("verl")

    def memory(self, name, *overrides, gpu=GPU, host=2 * 10**12):
        resources.check_memory(compose(name, list(overrides)), self.N, gpu, host)

    @pytest.mark.parametrize("name", ["cello1_grpo", "cello1_ppo"])
    @pytest.mark.parametrize("hardware", ["8x80gb", "2x80gb", "1x80gb"])
    def test_what_fits(self, name, hardware):
        self.memory(name, f"hardware={hardware}")

    def test_two_gpus_do_not_hold_the_published_setting(self):
        with pytest.raises(
            ValueError, match=r"hold 46 GB of weights .* beside 51 GB for vLLM .*, and has 85 GB; .*2x80gb"
        ):
            self.memory("cello1_grpo", "hardware=8x80gb", "trainer.n_gpus_per_node=2")
        self.memory("cello1_grpo", "hardware=8x80gb", "trainer.n_gpus_per_node=4")

    def test_memory_of_the_host(self):
        self.memory("cello1_ppo", host=200 * 10**9)
        with pytest.raises(ValueError, match=r"198 GB of offloaded .* of each node, which has 128 GB"):
            self.memory("cello1_ppo", host=128 * 10**9)

    def test_memory_without_gpus(self):
        config = compose("cello1_grpo", ["hardware=cpu"])
        resources.check_host_memory(config, self.N, 122 * 10**9)  # 12 bytes for the policy, 4 for the reference
        with pytest.raises(ValueError, match=r"122 GB of all weights .* which has 121 GB; take a smaller"):
            resources.check_host_memory(config, self.N, 121 * 10**9)

    def test_processors(self):
        published = compose("cello1_grpo", ["ray_kwargs.ray_init.num_cpus=33"])
        with pytest.raises(ValueError, match=r"claim 34 logical CPUs .* and Ray has 33; set ray_kwargs"):
            resources.check_cpus(published)
        two = compose("cello1_grpo", ["hardware=cpu", "trainer.nnodes=2"])
        with pytest.raises(
            ValueError, match=r"claim 9 logical CPUs .*the cluster of RAY_ADDRESS has 4; give `ray start`"
        ):
            resources.check_cpus(two, {"CPU": 4.0, "GPU": 2.0})
        with pytest.raises(ValueError, match=r"= 2 GPUs, and the cluster of RAY_ADDRESS has 1; start the other nodes"):
            resources.check_cpus(two, {"CPU": 9.0, "GPU": 1.0})
        resources.check_cpus(two, {"CPU": 9.0, "GPU": 2.0})

    def test_disk(self, tmp_path, monkeypatch, capsys):
        free = SimpleNamespace(free=184 * 10**9)
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: free)
        config = compose("cello1_grpo", [])
        resources.check_disk(config, self.N, tmp_path / "not" / "yet")
        assert capsys.readouterr().err == "note: a checkpoint has 91 GB, 2 are kept; 184 GB are free\n"
        free.free = 100 * 10**9
        with pytest.raises(
            ValueError, match=r"has 91 GB, 183 GB are needed and .* has 100 GB free; choose another OUTPUT"
        ):
            resources.check_disk(config, self.N, tmp_path)
        (tmp_path / "grpo" / "global_step_100").mkdir(parents=True)
        resources.check_disk(config, self.N, tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_gone_is_named_at_once(monkeypatch, address):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS={address} cannot be joined: .*[Rr]efused"):
        resources.ask_cluster()


def test_wandb_without_a_network(monkeypatch):
    pytest.importorskip("verl")
    config = compose("cello1_grpo", ["trainer.logger=[console,wandb]"])
    for name in ("WANDB_MODE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"127\.0\.0\.1 cannot be reached .* set WANDB_MODE=offline"):
            preflight.check_wandb(config)
        listener.listen()
        preflight.check_wandb(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    preflight.check_wandb(config)
    monkeypatch.delenv("WANDB_MODE")
    preflight.check_wandb(compose("cello1_grpo", []))
