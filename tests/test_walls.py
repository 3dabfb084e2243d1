"""The walls between the rooms of the repository (floor 0 has its own test in tests/recipe)."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipe" / "cello1"
VERL_MODULES = ("reward_manager", "dataset", "replay_buffer")
MODULES = sorted(RECIPE.rglob("*.py"))


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plugin_loads_neither_verl_nor_an_engine():
    result = run(
        """
        import sys
        import scverse_plugin

        print([name for name in ("verl", "vllm", "torch", "ray", "cello1_verl") if name in sys.modules])
        """,
        ROOT,
    )
    assert result.stdout.strip() == "[]", result.stderr


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, at the top or in a function; inside ``if TYPE_CHECKING`` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(RECIPE).as_posix())
def test_recipe_knows_neither_overlay_nor_plugin(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert not roots & {"cello1_verl", "scverse_plugin"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(RECIPE).as_posix())
def test_only_the_seams_import_verl_at_the_top(path):
    tops = {
        alias
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names])
    }
    assert any(name.partition(".")[0] == "verl" for name in tops) == (path.stem in VERL_MODULES)


def test_overlay_imports_only_verl_torch_and_what_they_need():
    allowed = {"verl", "torch", "transformers", "vllm", *sys.stdlib_module_names}
    for path in (ROOT / "verl").rglob("*.py"):
        assert {name.partition(".")[0] for name in imports_of(path)} <= allowed, path


def test_recipe_works_copied_alone_beside_an_installed_verl(tmp_path):
    pytest.importorskip("verl")
    shutil.copytree(RECIPE, tmp_path / "recipe" / "cello1", ignore=shutil.ignore_patterns("__pycache__"))
    result = run(
        """
        import asyncio, sys
        from pathlib import Path

        import numpy as np, torch
        from hydra import compose, initialize_config_dir
        from verl import DataProto
        from verl.trainer.ppo.reward import load_reward_manager

        import recipe.cello1
        here = Path(recipe.cello1.__file__).parent
        assert here == Path.cwd() / "recipe" / "cello1", here
        with initialize_config_dir(str(here / "config"), version_base=None):
            config = compose("cello1_grpo")

        class Tokenizer:
            def decode(self, ids, skip_special_tokens):
                return bytes(ids.tolist()).decode()

        answers = ["B cell | T cell", "T cell | B cell", "B cell"]
        texts = [f"<think></think>\\n<answer>{answer}</answer>".encode() for answer in answers]
        width = max(map(len, texts))
        batch = DataProto.from_dict(
            tensors={
                "responses": torch.tensor([[*text, *[0] * (width - len(text))] for text in texts]),
                "attention_mask": torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts]),
            },
            non_tensors={"reward_model": np.array([{"ground_truth": answers[0]}] * 3, dtype=object)},
        )

        async def score():
            manager = load_reward_manager(config, Tokenizer())
            return [(await manager.run_single(batch[i : i + 1]))["reward_score"] for i in range(3)]

        assert asyncio.run(score()) == [1.0, 0.0, -1.0]
        assert not {"cello1_verl", "scverse_plugin"} & set(sys.modules)
        """,
        tmp_path,
        PYTHONPATH=str(tmp_path),
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert result.returncode == 0, result.stderr
