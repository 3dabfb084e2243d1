"""The READMEs hold: every command in them is run, or checked as far as that goes without training or a network.

The commands of a block run one after another in one folder, so that a line finds what the line before has made, on toy
cells whose first gene gives their type away, with an engine in place of vLLM that knows this. Launchers run as well,
with a Python that only writes down what it is asked to do; each such call must then be one that the real module,
verl's configuration or accelerate accepts. A command that no function below is for fails.

The two main commands are run in earnest elsewhere: ``run_grpo.sh`` by tests/recipe/launch/test_run_grpo.py,
``tests/run.sh`` by CI (.ci/run). So are the example and the notebook (tests/plugin/test_integration.py) and
``vllm serve`` (tests/recipe/engines/test_vllm_serve.py).
"""

import ast
import functools
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from recipe.cello1 import __main__ as shell
from recipe.cello1.data import options as data_options
from recipe.cello1.data import prepare as prepare_data
from recipe.cello1.engines.options import engine_options, sampling_of
from recipe.cello1.engines.protocol import LOGITS_PROCESSOR, Completion, EngineBase, Sampling
from recipe.cello1.engines.start import ENGINES
from recipe.cello1.formats.puzzle_files import load_puzzles, write_puzzles
from recipe.cello1.inference.predict import predict
from recipe.cello1.launch.environment import required_verl
from recipe.cello1.rl.shaping import read_shaping
from recipe.cello1.task.answer import format_answer
from recipe.cello1.task.prompt import instruction, parse_user
from tests.helpers import cli
from tests.helpers.project import setup_arguments
from tests.helpers.readme import READMES, ROOT, Block, Command, blocks, codes, commands, inline_commands, parse, read
from tests.helpers.stub_server import Server
from tests.helpers.toy_adata import MARKERS, toy
from tests.helpers.toy_h5ad import N_GENES, N_TYPES, toy_adata, write

RECIPE = ROOT / "recipe" / "cello1"
BLOCKS = [block for readme in READMES for block in blocks(readme)]
INLINE = [pytest.param(command, id=f"{readme}: {command}") for readme in READMES for command in inline_commands(readme)]
SCRIPTS = "".join(path.read_text(encoding="utf-8") for path in sorted(RECIPE.rglob("*.sh")))
READ_BY_SCRIPTS = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", SCRIPTS))
# Those of the plugin as setup.py names them, whatever was installed before.
POINTS = [point.split(" = ") for point in setup_arguments()["entry_points"]["cello1.commands"]]
KNOWN = shell.commands() | {name: module for name, module in POINTS}
TYPES = {gene: name for name, gene in MARKERS.items()} | {f"GENE{N_GENES - 1 - i}": f"type {i}" for i in range(N_TYPES)}

# Writes its arguments down; prints what `preflight` does (the files to train on, and their hashes), makes the folder
# that `export` does.
RECORDER = r"""#!/usr/bin/env bash
printf '%s\0' "$@" $'\x1e' >>"$CALLS"
case ${3:-} in
preflight) printf '%s\0' "$7" "$9" hashes ;;
export) mkdir -p "$6" ;;
esac
"""


def solve(messages) -> str:
    """Answer a puzzle by the genes that give the types away."""
    text = messages[-1]["content"].removesuffix(f" {instruction('batch', 'user')}")
    cells = parse_user(text).cells
    return format_answer([next(TYPES[gene] for gene in cell if gene in TYPES) for cell in cells], "By its marker.")


class Solver(EngineBase):
    """An engine that needs no model."""

    name, fingerprint, constraint = "vllm", "", "exact"

    def __init__(self, model, **_):
        self.model = str(model)

    def generate(self, requests, sampling):
        for position, request in enumerate(requests):
            yield position, Completion(solve(request.messages), "stop", 20, 200, -1.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the READMEs take for given, under the names that they use."""
    folder = tmp_path_factory.mktemp("inputs")
    for i, tissue in enumerate(("blood", "lung", "kidney")):
        adata = toy_adata(i, donor_prefix=f"{tissue}-donor")
        adata.obs["tissue"] = tissue
        write(adata, folder / "H5AD_FOLDER" / f"{tissue}.h5ad")
    mouse = toy_adata(3, n_donors=2, donor_prefix="mouse")
    mouse.obs = mouse.obs.rename(columns={"cell_type": "cell_ontology_class", "donor_id": "donor"})
    mouse.var_names = [name.capitalize() for name in mouse.var["feature_name"]]
    write(mouse, folder / "outputs" / "cells" / "mouse" / "mouse.h5ad")
    made = folder / "made"
    arguments = ["--out", str(made), "--per-size", "8", "--workers", "1", "--quiet"]
    assert cli.command("prepare")([folder / "H5AD_FOLDER", *arguments]) == 0
    train, test = (load_puzzles(made / side / f"{side}_data.json").puzzles for side in ("train", "test"))
    for name, puzzles in {"train": train[9:], "val": train[:9], "test": test, "puzzles": train[:9]}.items():
        write_puzzles(folder / f"{name}.json", puzzles)
    predict(Solver("MODEL"), test, folder / "answers.jsonl", sampling=Sampling(), progress=False)
    for name in ("MODEL", "outputs/pancreas/model", "ncbi/Cell-o1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    for side in ("train", "test"):
        (folder / "outputs" / "pancreas" / "data" / side).mkdir(parents=True)
        shutil.copy(folder / f"{side}.json", folder / "outputs" / "pancreas" / "data" / side / f"{side}_data.json")
    toy(types=["B cell", "NK cell", "monocyte"]).write_h5ad(folder / "in.h5ad")
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch) -> Path:
    """A folder of one's own with these inputs and the launchers, and this process in it."""
    folder = tmp_path / "place"
    shutil.copytree(inputs, folder)
    launchers = folder / "recipe" / "cello1"
    shutil.copytree(RECIPE / "config", launchers / "config")
    for script in RECIPE.rglob("*.sh"):
        (launchers / script.relative_to(RECIPE)).parent.mkdir(exist_ok=True)
        shutil.copy(script, launchers / script.relative_to(RECIPE))
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", folder / "tests")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(ENGINES, "vllm", (__name__, "Solver"))
    # More workers would each start anew and import anndata.
    monkeypatch.setattr(prepare_data, "default_workers", lambda n: 1)
    return folder


# ------------------------------------------------------------------------------------------------ python -m recipe...


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the words after ``cello1`` into the command and its arguments."""
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in KNOWN), None)
    if name is None:
        pytest.fail(f"no check for: {words}")
    return name, list(words[len(name.split()) :])


def parsed(name: str, argv: list[str]):
    """Parse with the command's own parser, and check what the command checks before it starts."""
    module = importlib.import_module(KNOWN[name])
    if name == "prepare":
        args = module.build_parser().parse_args(argv)
        data_options.check(args)
        data_options.settings_of(args)
        return args
    end = argv.index("--") if "--" in argv else len(argv)
    args = module.build_parser().parse_intermixed_args(argv[:end])
    args.rest = argv[end + 1 :]
    if name == "sft":
        from peft import LoraConfig
        from trl import SFTConfig

        settings = module.load_settings(args.settings, args.config)
        # These two go to the libraries as they are.
        for key, kind in (("lora", LoraConfig), ("trainer", SFTConfig)):
            assert (settings[key] or {}).keys() <= {each.name for each in fields(kind)}, argv
    if name == "predict":
        sampling_of(args)
        engine_options(args)
    return args


def hub(place: Path) -> Callable[[str], dict[str, list]]:
    """Stand in for `datasets.load_dataset`: the splits of CellPuzzles, with toy puzzles."""

    def load(name: str) -> dict[str, list]:
        assert name == "ncbi/CellPuzzles"
        splits = {side: yaml.safe_load((place / f"{side}.json").read_bytes()) for side in ("train", "test")}
        traces = [
            item | {"assistant_msg": format_answer(item["assistant_msg"].split(" | "), "By its marker.")}
            for item in splits["train"]
        ]
        return splits | {"reasoning": traces}

    return load


def run_command(name: str, argv: list[str], place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if "--from-hub" in argv:
            patch.setattr("datasets.load_dataset", hub(place))
        if "--base-url" not in argv:
            assert cli.command(name)(argv) == 0
            return
        url, model = (argv[argv.index(option) + 1] for option in ("--base-url", "--model"))
        with Server(reply, models=(model,)) as server:
            assert cli.command(name)([server.url if word == url else word for word in argv]) == 0


def reply(body, n) -> str:
    """Answer as a server does: free text, or JSON if that is asked for."""
    text = solve(body["messages"])
    if "response_format" not in body:
        return text
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    types = text.split("<answer>")[1].removesuffix("</answer>").split(" | ")
    first, *cells = fields
    return json.dumps({first: "By its marker.", **dict(zip(cells, types, strict=True))})


def python(line: Command, place: Path, run: bool) -> None:
    match line.words[1:]:
        case ("-m", "verl.trainer.main_ppo"):  # named, without arguments
            assert find_spec("verl.trainer.main_ppo")
        case ("-m", "recipe.cello1", *words):
            cello1(line, place, run, words)
        case (script, *argv) if script.startswith(("benchmarks/", "examples/")):
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str((ROOT / script).parent))  # as Python does for a script
                module = runpy.run_path(str(ROOT / script))
                module["build_parser"]().parse_args(argv)
                if run:
                    assert module["main"](argv) == 0
        case _:
            pytest.fail(f"no check for: {line}")


# ---------------------------------------------------------------------------------------------------------- launchers


@functools.cache
def composed(name: str, *overrides: str):
    """Compose a configuration of the recipe against the installed verl, as `main_ppo` would."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(RECIPE / "config"), version_base=None):
        config = compose(name, overrides=list(overrides))
    OmegaConf.resolve(config)
    return config


def check_call(words: list[str]):
    """Check what a launcher asks Python to run; returns the configuration if that is a training with verl."""
    match words:
        case [script, "look"] if script.endswith("/recipe/cello1/launch/environment.py"):
            return None
        case ["-m", "pytest", "tests", *_]:
            return None
        case ["-P", "-c", code] if "find_spec('flash_attn')" in code:
            compile(code, "run_rl.sh", "exec")
            return None
        case ["-m", "accelerate.commands.launch", *argv]:
            from accelerate.commands.launch import launch_command_parser

            args = launch_command_parser().parse_args(argv)
            return check_call(["-m", args.training_script, *args.training_script_args])
        case ["-m", "verl.trainer.main_ppo", *argv]:
            from hydra._internal.utils import get_args_parser

            args = get_args_parser().parse_args(argv)
            return composed(args.config_name, *args.overrides)
        case ["-m", "recipe.cello1", *words]:
            name, argv = split_command(words)
            args = parsed(name, argv)
            return check_call(args.rest[1:]) if name == "watch" else None
        case _:
            pytest.fail(f"no check for what the launcher runs: {words}")


def given(value: str) -> str:
    """What a launcher makes of a path: one that exists is made absolute, anything else may be a name on the Hub."""
    return str(Path(value).absolute()) if Path(value).exists() else value


def bash(command: Command, place: Path, run: bool) -> None:
    """Run a launcher with a Python that only writes down what it is to do, on a machine with eight GPUs."""
    assert command.variables.keys() <= READ_BY_SCRIPTS, f"{command}: no script reads one of these"
    environment, calls = place / "environment", place / "calls"
    (environment / "bin").mkdir(parents=True, exist_ok=True)
    (environment / "bin" / "python").write_text(RECORDER)
    (environment / "bin" / "python").chmod(0o755)
    calls.write_bytes(b"")
    shared = {name: value.replace("/shared", f"{place}/shared") for name, value in command.variables.items()}
    machine = {"VIRTUAL_ENV": str(environment), "CELLO1_DEVICE": "gpu", "NUM_GPUS": "8", "CALLS": str(calls)}
    kept = {name: value for name, value in os.environ.items() if name == "PATH" or name not in READ_BY_SCRIPTS}
    result = subprocess.run(command.words, env=kept | machine | shared, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    made = [call.split("\0")[:-1] for call in calls.read_text().split("\x1e\0")[:-1]]
    found = [config for config in map(check_call, made) if config is not None]
    if "run_sft" in command.words[1]:
        assert f"model={given(shared['MODEL'])}" in made[-1] and f"train={given(shared['TRAIN_DATA'])}" in made[-1]
    if "MODEL" in shared and "run_sft" not in command.words[1]:
        (config,) = found
        assert config.actor_rollout_ref.model.path == given(shared["MODEL"])
        files = (given(shared["TRAIN_DATA"]), given(shared["VAL_DATA"]))
        assert (config.data.train_files, config.data.val_files) == files
        assert config.trainer.nnodes == int(shared.get("NNODES", 1))


# ------------------------------------------------------------------------------------------------------ other programs


def cello1(line: Command, place: Path, run: bool, words: Sequence[str] | None = None) -> None:
    assert line.variables.keys() <= {"OPENAI_API_KEY", "RAY_ADDRESS"}
    words = line.words[1:] if words is None else words
    if tuple(words) == ("--help",):
        return
    name, argv = split_command(words)
    if not argv:  # named, without arguments
        return
    if name == "serve":
        argv.insert(0, "--print-only")
    parsed(name, argv)
    if run:
        run_command(name, argv, place)


def scanpy(command: Command, place: Path, run: bool) -> None:
    """``scanpy cello1`` is the same program: tests/plugin/test_cli.py starts it through scanpy."""
    assert command.words[:3] == ("scanpy", "cello1", "annotate")
    scripts = setup_arguments()["entry_points"]["console_scripts"]
    assert "scanpy-cello1 = recipe.cello1.__main__:main" in scripts


def vllm(command: Command, place: Path, run: bool) -> None:
    """Started in earnest by tests/recipe/engines/test_vllm_serve.py."""
    assert list(command.words) == ["vllm", "serve", "MODEL", "--logits-processors", LOGITS_PROCESSOR]
    module, _, name = LOGITS_PROCESSOR.partition(":")
    tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def ray(command: Command, place: Path, run: bool) -> None:
    """Only parsed, by Ray's own command; two nodes are started by tests/recipe/launch/test_multinode.py."""
    from ray.scripts.scripts import cli

    cli.commands[command.words[1]].make_context("ray", list(command.words[2:]))


def pip(command: Command, place: Path, run: bool) -> None:
    """The extras exist, and the versions are those of setup.py."""
    assert command.words[1] == "install"
    extras = setup_arguments()["extras_require"]
    known = {(r.name, *sorted(r.extras), r.specifier) for r in map(Requirement, extras["gpu"])}
    for word in command.words[2:]:
        if named := re.fullmatch(r"\.\[(.+)\]", word):
            assert set(named[1].split(",")) <= extras.keys()
        else:
            wanted = Requirement(word)
            assert (wanted.name, *sorted(wanted.extras), wanted.specifier) in known, word


def install_verl(command: Command, place: Path, run: bool) -> None:
    """What verl-recipe's installer reads is checked in tests/test_packaging.py."""
    assert command.words[1:] == ("--recipe", required_verl()["RECIPE_FOLDER"])


def hf(command: Command, place: Path, run: bool) -> None:
    """The client of the hub that comes with the training sets has this name and this command."""
    scripts = distribution("huggingface_hub").entry_points.select(group="console_scripts", name="hf")
    (script,) = {point.value for point in scripts}
    assert script.startswith("huggingface_hub.cli") and command.words[1] == "download"


def another_server(command: Command, place: Path, run: bool) -> None:
    """Not installed here: only the commands whose options are known to us."""
    assert command.words[:2] in {("ollama", "pull"), ("ollama", "serve"), ("llama-server", "-m")}


def sphinx_build(command: Command, place: Path, run: bool) -> None:
    source = command.words[command.words.index("-W") + 1]
    assert (ROOT / source / "conf.py").is_file()


CHECKS: dict[str, Callable[[Command, Path, bool], None]] = {
    "python": python,
    "bash": bash,
    "cello1": cello1,
    "scanpy": scanpy,
    "vllm": vllm,
    "ray": ray,
    "pip": pip,
    "hf": hf,
    "ollama": another_server,
    "llama-server": another_server,
    "./install_verl.sh": install_verl,
    "sphinx-build": sphinx_build,
}


def check(command: Command, place: Path, run: bool) -> None:
    if command.program not in CHECKS:
        pytest.fail(f"no check for: {command}")
    CHECKS[command.program](command, place, run)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
@pytest.mark.slow
def test_shell_block_runs(block: Block, place):
    pytest.importorskip("verl")
    if "--out predictions.jsonl" not in block.text:
        shutil.copy("answers.jsonl", "predictions.jsonl")
    for command in commands(block.text):
        check(command, place, run=True)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_block_runs(block: Block, place):
    adata = toy(types=ast.literal_eval(re.search(r"\[.+?\]", block.text)[0]))  # those that the block asks for
    exec(compile(block.text, str(block), "exec"), {"adata": adata})
    assert adata.obs["cello1"].tolist() == adata.obs["truth"].tolist()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_block_is_a_setting_of_the_recipe(block: Block):
    pytest.importorskip("verl")
    (settings,) = yaml.safe_load(block.text).values()
    (shaping,) = settings.values()
    config = composed("cello1_grpo", f"cello1.shaping={shaping}".replace("'", ""))
    assert read_shaping(config.cello1.shaping, 3000).terms


def test_every_block_is_of_a_known_kind():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "bibtex", ""}
    assert not [
        block for block in BLOCKS if not block.language and re.search(rf"^\s*({'|'.join(CHECKS)}) ", block.text)
    ]


@pytest.mark.parametrize("command", INLINE)
def test_command_within_the_text_is_accepted(command: Command, place):
    pytest.importorskip("verl")
    check(command, place, run=False)


DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
IN_DOCUMENTS = [
    pytest.param(command, id=f"{name}: {command}")
    for name in DOCUMENTS
    for command in (
        *[command for command in inline_commands(name) if len(command.words) > 2],  # fewer are a name
        *[command for block in blocks(name) if block.language == "bash" for command in commands(block.text)],
    )
]


@pytest.mark.parametrize("command", IN_DOCUMENTS)
def test_command_of_the_documentation_is_accepted(command: Command, place):
    pytest.importorskip("verl")
    check(command, place, run=False)


@pytest.mark.parametrize("line", ["frobnicate --all", "MODEL=m", "python -m recipe.other --x 1", "python other.py"])
def test_a_command_that_nobody_has_classified_fails(line, place):
    with pytest.raises(pytest.fail.Exception, match="no check for"):
        check(parse(line), place, run=False)


def options_of(parser) -> set[str]:
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            found = found.union(*map(options_of, action.choices.values()))
    return found


def test_every_option_named_exists():
    known = {"--no-dora", "--full"} & set(re.findall(r"--[\w-]+", (RECIPE / "run_sft.sh").read_text()))
    known |= {"--no-enable-chunked-prefill"}  # of vllm serve, as tests/recipe/engines/test_vllm_serve.py starts it
    known |= {"--traceback"}  # of the shell
    for module in KNOWN.values():
        known |= options_of(importlib.import_module(module).build_parser())
    named = [code for readme in READMES for code in codes(readme) if re.match(r"--|run_\w+\.sh ", code)]
    assert {word for code in named for word in code.split() if word.startswith("--")} <= known


OVERRIDE = re.compile(r'"?(\+[\w./]+|\w+(\.\w+)+)=.+')
OVERRIDES = [code for readme in READMES for code in codes(readme) if OVERRIDE.fullmatch(code)]


@pytest.mark.parametrize("code", OVERRIDES)
def test_override_within_the_text_composes(code):
    pytest.importorskip("verl")
    assert composed("cello1_grpo", *parse(code).words) != composed("cello1_grpo")


def rows(readme: str, heading: str) -> list[list[str]]:
    """The cells of the table that begins with a line."""
    lines = read(readme).split(f"{heading}\n", 1)[1].splitlines()[1:]
    return [line.strip("| ").split(" | ") for line in lines[: next(i for i, line in enumerate(lines) if not line)]]


def test_variables_of_the_launchers_are_read_by_them():
    named = {
        name
        for row in rows("recipe/cello1/README.md", "| variable | meaning | default |")
        for name in re.findall(r"`(\w+)[`=]", row[0])
    }
    assert {"MODEL", "TRAIN_DATA", "VAL_DATA", "OUTPUT", "HARDWARE", "NNODES"} <= named <= READ_BY_SCRIPTS


def test_hardware_in_the_table_is_that_of_the_folder():
    named = {
        name
        for row in rows("recipe/cello1/README.md", "| `HARDWARE` | trains |")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    assert named == {path.stem for path in (RECIPE / "config" / "hardware").glob("[!_]*.yaml")}


# What a reader of the research code may have typed: its README and scripts at github.com/ncbi-nlp/cell-o1.
PUBLISHED = (
    *("pip install", "load_dataset", "run_pipeline.sh", "build_context.py", "match_qa.py", "split_train_test.py"),
    *("sft.sh", "sft_trainer.py", "merge_lora.py", "data_preprocess/cello1.py", "run_cello1_grpo.sh"),
    *("run_cello1_ppo.sh", "convert_fsdp_to_hf.py", "test.py", "eval.py"),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_command_has_one_here(name):
    table = rows("recipe/cello1/README.md", "| published command | command here |")
    pattern = re.compile(rf"(?<![\w]){re.escape(name)}")
    (here,) = {row[1] for row in table if pattern.search(row[0])}
    assert inline_command(here)


def inline_command(text: str) -> bool:
    code = re.search(r"`([^`]+)`", text)
    return bool(code) and parse(code[1]).program in CHECKS


def headings(readme: str) -> list[str]:
    return re.findall(r"^## (.+)$", read(readme), re.MULTILINE)


def test_both_readmes_have_the_same_results_of_the_main_job():
    made = re.compile(r"<!-- results: made by `bash recipe/cello1/run_grpo\.sh`.*?<!-- /results -->", re.DOTALL)
    here, recipe = (made.findall(read(readme)) for readme in ("README.md", "recipe/cello1/README.md"))
    assert len(here) == 1
    assert here == recipe


def test_readme_is_for_a_reader_in_a_hurry():
    text = read("README.md")
    about = text.split("\n## ")[0].split("\n\n", 1)[1]
    assert len(re.findall(r"\.(?:\s|$)", about)) == 3, "what it is, in three sentences"
    assert [str(command.words[1]) for command in commands(blocks("README.md")[0].text)] == [
        "recipe/cello1/run_grpo.sh",
        "tests/run.sh",
    ]
    assert text.index("<!-- results") < text.index("<!-- /results -->") < text.index("## Train your own")
    paths = ["Train your own", "Reproduce Cell-o1", "Annotate an AnnData", "Benchmark a model"]
    assert [heading for heading in headings("README.md") if heading in paths] == paths


def test_readme_of_the_recipe_has_the_parts_of_upstreams():
    parts = ["Required `verl` version", "Overview", "Install", "Data", "SFT", "RL", "Results", "Citation"]
    assert [heading for heading in headings("recipe/cello1/README.md") if heading in parts] == parts


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", read(readme)):
        path, _, anchor = target.partition("#")
        file = (ROOT / readme).parent / path if path else ROOT / readme
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
