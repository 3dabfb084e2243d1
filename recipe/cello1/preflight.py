"""Check the inputs of a training run before anything is started.

``python -m recipe.cello1.preflight --model MODEL --train TRAIN --val VAL --out DIR``

Prints the two RL parquet files to train on, one a line: TRAIN and VAL themselves, or, where they are puzzle JSON, their
conversions in DIR. Anything unusable ends with one line that says what and why, before Ray is up.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from recipe.cello1.prompt import LAYOUTS, Layout
from recipe.cello1.records import read_puzzles
from recipe.cello1.rl_parquet import read_rl_parquet, write_rl_parquet

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_WEIGHTS = ("*.safetensors", "*.bin")


def check_model(model: str) -> None:
    """Check that a model can be loaded from where it is said to be.

    Parameters
    ----------
    model
        A folder in Hugging Face format, or the id of a model on the Hub (``owner/name``), which is looked for in the
        local cache and then on the Hub.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, it is incomplete, or the Hub does not have it.
    """
    folder = Path(model)
    if folder.is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            missing.append("*.safetensors")
        if missing:
            msg = f"MODEL={model} is not a complete Hugging Face model: it has no {', '.join(missing)}"
            raise FileNotFoundError(msg)
        return
    if not _HUB_ID.fullmatch(model):
        msg = f"MODEL={model} does not exist; give a folder in Hugging Face format, or a Hub id such as owner/name"
        raise FileNotFoundError(msg)
    from httpx import HTTPError
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    try:
        found = file_exists(model, "config.json")
        reason = "the Hub has no such model"
    except (HfHubHTTPError, HTTPError, OSError) as error:
        found, reason = False, f"the Hub cannot be asked ({type(error).__name__})"
    if not found:
        msg = f"MODEL={model} is neither a folder nor in the local cache, and {reason}; correct the path or the id"
        raise FileNotFoundError(msg)


def check_platform() -> None:
    """Check that the platform asked for by ``VERL_PLATFORM`` is there.

    verl logs a plugin that cannot be loaded at DEBUG and goes on without it; here the plugin's own error comes up.

    Raises
    ------
    ValueError
        If a plugin cannot be loaded, no plugin registers the platform, or vLLM would run without its part of it.
    """
    wanted = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if not wanted:
        return
    from verl.plugin.platform import PlatformRegistry

    for plugin in entry_points(group="verl.plugins"):
        try:
            plugin.load()
        except Exception as error:  # a plugin is foreign code: whatever it raises is why training cannot start
            msg = f"the verl plugin {plugin.name} ({plugin.value}) cannot be loaded: {type(error).__name__}: {error}"
            raise ValueError(msg) from error
    if PlatformRegistry.get(wanted) is None:
        msg = (
            f"VERL_PLATFORM={wanted}: no installed verl plugin registers it, only "
            f"{', '.join(PlatformRegistry.registered_names())} are; install the plugin, or unset VERL_PLATFORM"
        )
        raise ValueError(msg)
    if wanted == "cpu" and not entry_points(group="vllm.general_plugins", name="cello1_cpu"):
        msg = (
            "VERL_PLATFORM=cpu: the installation lacks the vLLM plugin cello1_cpu, without which the first weight sync "
            "fails; install the repository again: python -m pip install --no-deps --editable ."
        )
        raise ValueError(msg)


def rl_data(path: str, split: str, out: str | Path, layout: Layout = "system") -> Path:
    """Give the RL parquet file of a data set, after checking every row of it.

    Parameters
    ----------
    path
        RL parquet, or puzzle JSON or JSONL, which is converted.
    split
        Name of the split, for the converted rows and the name of the file.
    out
        Folder for the conversion.
    layout
        Prompt layout of converted rows.

    Returns
    -------
    The parquet file.

    Raises
    ------
    FileNotFoundError
        If ``path`` does not exist.
    ValueError
        If it cannot be trained on, naming the column or key and the row.
    """
    if Path(path).suffix not in (".json", ".jsonl"):
        read_rl_parquet(path)
        return Path(path)
    if not Path(path).is_file():
        msg = f"{path} does not exist; correct the path"
        raise FileNotFoundError(msg)
    target = Path(out) / f"{split}.parquet"
    write_rl_parquet(target, read_puzzles(path), split, layout)
    return target


def build_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Returns
    -------
    The parser.
    """
    parser = argparse.ArgumentParser(prog="python -m recipe.cello1.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder in Hugging Face format, or Hub id")
    parser.add_argument("--train", required=True, help="training data: RL parquet, or puzzle JSON/JSONL")
    parser.add_argument("--val", required=True, help="validation data, likewise")
    parser.add_argument("--out", required=True, help="folder for converted data")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="prompt layout of converted data")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    try:
        check_model(arguments.model)
        train = rl_data(arguments.train, "train", arguments.out, arguments.layout)
        val = rl_data(arguments.val, "val", arguments.out, arguments.layout)
        check_platform()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(train, val, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
