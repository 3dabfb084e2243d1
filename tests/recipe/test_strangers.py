"""What comes from strangers is neither run (weights, model folders, YAML, files beside a command) nor obeyed."""

import ast
import json
import os
import pickle
import pty
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipe.cello1.formats.puzzle_files import write_puzzles
from recipe.cello1.task.text import visible
from tests.helpers.cli import command
from tests.helpers.processes import ROOT, environment
from tests.helpers.toy_model import build_toy_model, toy_puzzles

SOURCES = sorted(
    path for place in ("recipe", "verl", "scverse_plugin", "benchmarks") for path in (ROOT / place).rglob("*.py")
)

# -------------------------------------------------------------------------------------------- every place that loads


def calls() -> list[tuple[str, str, dict[str, ast.expr]]]:
    """Each call in the sources: where, what, and its keyword arguments."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {word.arg: word.value for word in node.keywords if word.arg}
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords))
    return found


def says(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def test_models_and_tokenizers_are_loaded_without_their_code():
    seen = 0
    for where, name, keywords in calls():
        loads = name.endswith(".from_pretrained") and not name.startswith("PeftModel.")  # which has no such option
        if loads or name == "LLM":
            seen += 1
            trust = keywords.get("trust_remote_code")
            # What a server or verl was started with is theirs to say: in the settings of this recipe it is false.
            given = isinstance(trust, ast.Attribute) and trust.attr == "trust_remote_code"
            assert given or says(trust, False), where
            if "ForCausalLM" in name:
                assert says(keywords.get("weights_only"), True), where
    assert seen >= 10


def test_pickle_is_read_in_one_place_and_yaml_in_another():
    seen = set()
    for where, name, keywords in calls():
        if name == "torch.load":
            seen.add(where.split(":")[0])
            assert ast.unparse(keywords["weights_only"]) == "not trusted", where
        assert not name.startswith(("pickle.", "joblib.", "dill.", "cloudpickle.", "marshal.", "shelve.")), where
        assert not (name == "np.load" and not says(keywords.get("allow_pickle", ast.Constant(False)), False)), where
        if name in ("yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.unsafe_load", "OmegaConf.load"):
            seen.add(where.split(":")[0])
    assert seen == {"recipe/cello1/formats/model_folder.py", "recipe/cello1/formats/yaml_file.py"}


def test_verl_is_told_to_trust_no_model():
    pytest.importorskip("verl")
    from recipe.cello1.launch.preflight import compose

    for name in ("cello1_grpo", "cello1_ppo"):
        config = compose(name, ["hardware=cpu"])
        parts = [config.data, config.actor_rollout_ref.model]
        parts += [config.critic.model] if name == "cello1_ppo" else []
        assert [part.trust_remote_code for part in parts] == [False] * len(parts)


# ------------------------------------------------------------------------------------------------------ pickled code


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("torch")
    return build_toy_model(tmp_path_factory.mktemp("strangers"))


@pytest.fixture
def model(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "model"))


def hostile_weights(folder: Path, name: str, mark: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    torch.save({"lm_head.weight": Trap(mark)}, folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("given", [(), ("--trust-checkpoint",)])
def test_a_checkpoint_that_runs_code(model, tmp_path, capsys, given):
    torch = pytest.importorskip("torch")
    pytest.importorskip("verl")
    actor, mark = tmp_path / "run" / "global_step_1" / "actor", tmp_path / "ran"
    actor.mkdir(parents=True)
    torch.save({"a": torch.ones(2), "b": Trap(mark)}, actor / "model_world_size_1_rank_0.pt")
    arguments = [str(actor), "--base", str(model), "--out", str(tmp_path / "out"), *given]
    assert command("export")(arguments) == 1
    error = capsys.readouterr().err
    assert mark.exists() == bool(given)
    assert ("rank_0.pt holds more than tensors" in error) == ("set trust_checkpoint" in error) == (not given)
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_verls_merger_reads_tensors_only(model, tmp_path):
    """Also a file that is put into the place of the one that was looked at."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("verl")
    from recipe.cello1.rl.export import _complete, _merge

    actor, mark = tmp_path / "actor", tmp_path / "ran"
    actor.mkdir()
    torch.save({"b": Trap(mark)}, actor / "model_world_size_1_rank_0.pt")
    (tmp_path / "whole").mkdir()
    with pytest.raises(RuntimeError, match="verl.model_merger failed"):
        _merge(_complete(actor, str(model), tmp_path / "whole"), tmp_path / "out", actor, trusted=False)
    assert not mark.exists()


def saved(kind: str, file: Path, mark: Path) -> None:
    """Write what runs code where it is unpickled, or what cannot be read, as a file of a checkpoint."""
    import torch

    value = {"state": {}, "x": [Trap(mark)] if kind != "object" else torch.nn.Linear(1, 1)}
    if kind in ("zip", "object", "cut off", "linked"):
        torch.save(value, file)
    elif kind == "legacy":
        torch.save(value, file, _use_new_zipfile_serialization=False)
    elif kind == "array":
        torch.save({"x": np.array([Trap(mark)], dtype=object)}, file)
    elif kind == "script":
        torch.jit.script(torch.nn.Linear(1, 1)).save(file)
    else:
        file.write_bytes({"pickle": pickle.dumps(Trap(mark)), "empty": b"", "text": b"c__builtin__\n"}[kind])
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-99])
    if kind == "linked":
        (file.parent.rename(file.parent.with_name("elsewhere")))
        file.parent.symlink_to("elsewhere")


SAVED = ("zip", "legacy", "array", "pickle", "object", "script", "cut off", "empty", "text", "linked")
RANK = "world_size_1_rank_0.pt"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("place", [f"actor/{part}_{RANK}" for part in ("model", "optim", "extra_state")] + ["data.pt"])
def test_a_checkpoint_that_a_training_would_go_on_from(tmp_path, kind, place):
    """verl unpickles all of these files, whatever they hold."""
    pytest.importorskip("torch")
    from recipe.cello1.rl.sharded import check_shards

    file = tmp_path / "step" / place
    file.parent.mkdir(parents=True)
    saved(kind, file, tmp_path / "ran")
    with pytest.raises(ValueError, match="holds more than tensors, and could run code|cannot be read") as found:
        check_shards(tmp_path / "step")
    assert str(file) in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "ran").exists()


def random_states() -> dict:
    """As trainers keep them."""
    import torch

    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


def test_an_own_checkpoint_is_gone_on_from(tmp_path):
    torch = pytest.importorskip("torch")
    from recipe.cello1.rl.sharded import check_shards

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    (tmp_path / "critic").mkdir()
    kept = {"model": model, "optim": optimizer, "extra_state": scheduler}
    for name, part in kept.items():
        state = part.state_dict() | ({"rng": random_states()} if name == "extra_state" else {})
        torch.save(state, tmp_path / "critic" / f"{name}_{RANK}")
    torch.save({"_num_yielded": 3, "_snapshot": {"a": [1, None, (2.5, "x")]}}, tmp_path / "data.pt")
    check_shards(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("given", [(), ("--trust-checkpoint",), ("trainer.resume_mode=disable",), ("elsewhere",)])
def test_training_goes_on_from_tensors_only(model, tmp_path, capsys, given):
    pytest.importorskip("verl")
    from recipe.cello1.formats.rl_parquet import write_rl_parquet

    write_rl_parquet(tmp_path / "d.parquet", toy_puzzles(64), "train")
    words = ["--model", str(model), "--train", str(tmp_path / "d.parquet"), "--val", str(tmp_path / "d.parquet")]
    words += ["--run", str(tmp_path / "run"), "--config", "cello1_grpo", *(w for w in given if w[0] == "-")]
    words += ["--", "hardware=cpu", "data.max_prompt_length=700", "data.max_response_length=16"]
    words += ["actor_rollout_ref.rollout.max_model_len=720", *(w for w in given if w.startswith("trainer"))]
    assert command("preflight")(words) == 0, capsys.readouterr().err
    run, step = tmp_path / "run", tmp_path / ("run/grpo" if "elsewhere" not in given else "other") / "global_step_2"
    step.mkdir(parents=True)
    saved("zip", step / "data.pt", tmp_path / "ran")
    if "elsewhere" in given:
        words += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={step}"]
        assert command("preflight")(words) == 1
        assert f"{step}/data.pt holds more than tensors" in capsys.readouterr().err
        return
    (run / "grpo" / "latest_checkpointed_iteration.txt").write_text("2")
    capsys.readouterr()
    assert command("preflight")(words) == (not given)
    error = capsys.readouterr().err
    assert ("data.pt holds more than tensors, and could run code; set trust_checkpoint" in error) == (not given)
    assert error.count("\n") == (not given) and not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", SAVED[:-1])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "optimizer.bin"])
def test_sft_goes_on_from_tensors_only(tmp_path, kind, name):
    pytest.importorskip("torch")
    from recipe.cello1.cold_start.sft import _latest_checkpoint

    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    saved("zip", checkpoint / "training_args.bin", tmp_path / "ran")
    assert _latest_checkpoint(checkpoint.parent) == checkpoint
    saved(kind, checkpoint / name, tmp_path / "ran")
    with pytest.raises(ValueError, match=f"{name} (holds more than tensors|cannot be read)"):
        _latest_checkpoint(checkpoint.parent)
    assert not (tmp_path / "ran").exists()


def test_sft_removes_no_folder_elsewhere(tmp_path):
    from recipe.cello1.cold_start.sft import _latest_checkpoint

    (tmp_path / "mine" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="checkpoint-7 is incomplete, and lies elsewhere .*; remove it yourself"):
        _latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (tmp_path / "mine" / "checkpoint-7").is_dir()


def start(engine: str, folder: Path, **options) -> None:
    from recipe.cello1.engines.start import start_engine

    with start_engine(engine, str(folder), **options):
        pass


ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.integration)]


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_run_code(engine, model, tmp_path):
    from recipe.cello1.engines.protocol import EngineError

    pytest.importorskip(engine)
    hostile_weights(model, "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(EngineError, match=f"{'vLLM cannot start with' if engine == 'vllm' else 'cannot load'} "):
        start(engine, model)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_runs_code(model, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from recipe.cello1.engines.protocol import EngineError

    base = AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    hostile_weights(tmp_path / "lora", "adapter_model.bin", tmp_path / "ran")
    with pytest.raises(EngineError, match="cannot load"):
        start("transformers", model, lora=str(tmp_path / "lora"))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------- code in model folders


@pytest.fixture(params=["model", "tokenizer"])
def with_code(request, model, tmp_path) -> Path:
    """A folder whose model, or only its tokenizer, is of a class in the folder."""
    (model / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\nEvilConfig = Evil\n"
    )
    names = {"model": ("config.json", "AutoModelForCausalLM", "AutoConfig"), "tokenizer": ("tokenizer_config.json",)}
    file, *classes = names[request.param]
    settings = json.loads((model / file).read_text())
    if request.param == "model":
        settings |= {"model_type": "evil", "auto_map": dict.fromkeys(classes, "evil.Evil")}
    else:
        settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (model / file).write_text(json.dumps(settings))
    return model


def nothing_asked(monkeypatch) -> None:
    """transformers asks on the terminal where nothing is said."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something was asked"))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_run_no_code_of_a_model(engine, with_code, tmp_path, monkeypatch):
    from recipe.cello1.engines.protocol import EngineError

    pytest.importorskip(engine)
    nothing_asked(monkeypatch)
    try:
        start(engine, with_code)
    except (EngineError, ValueError) as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_sft_runs_no_code_of_a_model(with_code, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    nothing_asked(monkeypatch)
    write_puzzles(tmp_path / "t.json", toy_puzzles(4))
    words = [f"model={with_code}", f"train={tmp_path / 't.json'}", f"output={tmp_path / 'o'}", "eval_fraction=0"]
    assert command("sft")([*words, "max_steps=1", "dtype=float32", "lora=null", "trainer.bf16=false"]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_training_refuses_a_model_with_code(with_code, tmp_path, monkeypatch, capsys):
    """verl's reward loop trusts the tokenizer of whatever is trained, also one that transformers knows."""
    pytest.importorskip("verl")
    from recipe.cello1.formats.rl_parquet import write_rl_parquet

    nothing_asked(monkeypatch)
    settings = json.loads((with_code / "tokenizer_config.json").read_text())
    known = "tokenizer_class" in settings and settings["tokenizer_class"] == "Evil"
    if known:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (with_code / "tokenizer_config.json").write_text(json.dumps(settings))
    write_rl_parquet(tmp_path / "d.parquet", toy_puzzles(64), "train")
    words = ["--model", str(with_code), "--train", str(tmp_path / "d.parquet"), "--val", str(tmp_path / "d.parquet")]
    words += ["--run", str(tmp_path / "run"), "--config", "cello1_grpo", "--", "hardware=cpu"]
    words += [
        "data.max_prompt_length=700",
        "data.max_response_length=16",
        "actor_rollout_ref.rollout.max_model_len=720",
    ]
    assert command("preflight")(words) == 1
    file = "tokenizer_config.json" if known else "config.json"
    assert f"brings code of its own (auto_map in {file}), which verl would run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_verl_still_trusts_every_tokenizer():
    """Fails once verl's reward loop asks its settings: then `refuse_own_code` is no longer needed."""
    verl = pytest.importorskip("verl")
    source = (Path(verl.__file__).parent / "experimental" / "reward_loop" / "reward_loop.py").read_text()
    assert "hf_tokenizer(input_tokenizer_local_path, trust_remote_code=True)" in source


# --------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("words", [["--config"], ["--context-table"]])
def test_commands_read_yaml_with_these_limits(words, tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    (tmp_path / "in").mkdir()
    name = {"--config": "sft", "--context-table": "prepare"}[words[0]]
    more = ["model=m", "train=t", "output=o"] if name == "sft" else [str(tmp_path / "in"), "--out", str(tmp_path / "o")]
    assert command(name)([*more, *words, str(tmp_path / "x.yaml")]) == 1
    assert "72 aliases" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the terminal

ESCAPES = {
    "colour": "\x1b[31mred",
    "link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "up": "\x1b[A\x1b[A\r$ sudo",
    "paste": "\x1b[200~rm -rf\n\x1b[201~",
    "eight bits": "\x9b31m\x9d0;t\x9c",
    "direction": "abc\u202egpj.exe\u202c\u2066x\u2069\u200f",
    "line": "a\u2028error: b\u2029c\x0bd\x0ce\x85",
    "bell": "\a\b\b\x7f",
    "half": "\ud800\udfff",
}


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES.keys())
def test_what_a_terminal_would_obey_is_replaced(text):
    found = visible(f"é – 浆细胞 γδ\t{text}\n")
    assert found.startswith("é – 浆细胞 γδ\t") and found.endswith("\n")
    assert not set(found) & (
        set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) | set("\u202e\u2066\u2028\u2029\ud800")
    )


def on_a_terminal(words: list[str], **variables: str) -> bytes:
    """Run a program on a terminal of its own; gives all that came there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment(), **variables}
    ) as process:
        os.close(theirs)
        found = b""
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # how a terminal ends whose programs have
                break
            if not piece:
                break
            found += piece
        process.wait(60)
    os.close(ours)
    return found


def test_errors_with_data_on_a_terminal(tmp_path):
    """In a file name, in an argument that is no option, and in the name of a command."""
    words = []
    for text in ESCAPES.values():
        name = str(tmp_path / text.replace("/", "_").encode(errors="replace").decode())
        words += [["vote", name, "--out", name], ["vote", name, f"--{name}"], [text.encode(errors="replace").decode()]]
    code = f"""
import sys
from recipe.cello1.__main__ import main
for words in {words!r}:
    sys.argv = ["cello1", *words]
    try:
        main()
    except SystemExit:
        pass
"""
    found = on_a_terminal([sys.executable, "-P", "-c", code]).decode().replace("\r\n", "\n")
    assert found.count("error: ") >= len(words)
    assert found == visible(found)


def test_bars_and_colours_and_data_in_one_program():
    code = """
import sys, logging, warnings
sys.argv = ["cello1", "--help"]
from recipe.cello1.__main__ import main
main()
from tqdm import tqdm
for outer in tqdm(range(2), mininterval=0, ncols=60, nrows=20):
    for inner in tqdm(range(3), mininterval=0, desc="\\x1b]0;owned\\x07", leave=False, ncols=60, nrows=20):
        tqdm.write("\\x1b[2Jdata", file=sys.stderr)
logging.getLogger("x").warning("\\x1b[2Jdata")
warnings.warn("\\x1b[2Jdata")
print("\\x1b[A\\r\\x1b[32mgreen\\x1b[0m")
raise ValueError("\\x1b[2Jdata")
"""
    found = on_a_terminal([sys.executable, "-P", "-c", code], TERM="xterm").decode()
    assert "100%|" in found and "\r" in found.replace("\r\n", ""), "the bars move"
    assert "\x1b[2J" not in found and "\x1b]" not in found and "\x1b[32m" not in found
    assert "ValueError: \N{REPLACEMENT CHARACTER}[2Jdata" in found and "green" in found


# ------------------------------------------------------------------------------------- files beside where one stands


def test_a_module_of_the_working_directory_is_not_run(tmp_path):
    """By the console script, and by python -P -m; the launchers say so to everything they start."""
    for shadow in ("numpy", "json", "argparse", "recipe", "yaml", "torch", "re", "tqdm", "typing"):
        (tmp_path / f"{shadow}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()\nraise SystemExit(3)\n")
    script = tmp_path / "bin" / "cello1"  # as pip writes it
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom recipe.cello1.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)
    for words in ([str(script)], [sys.executable, "-P", "-m", "recipe.cello1"]):
        rest = ["evaluate", "x.jsonl", "--data", "x.json"]
        done = subprocess.run([*words, *rest], cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "x.json" in done.stderr and not (tmp_path / "ran").exists()


def test_what_a_command_starts_runs_no_module_of_the_working_directory_either(tmp_path):
    for shadow in ("multiprocessing", "verl", "torch"):
        (tmp_path / f"{shadow}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()\nraise SystemExit(3)\n")
    code = """
import multiprocessing, subprocess, sys
from recipe.cello1.__main__ import main
sys.argv = ["cello1", "--help"]
main()
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=print, args=["spawned"])
    process.start()
    process.join()
    sys.exit(process.exitcode or subprocess.run([sys.executable, "-c", "import multiprocessing"]).returncode)
"""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "cello1"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "spawned" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()


def test_pickles_are_traps(tmp_path):
    """The trap of these tests does work."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
