"""The documentation builds without a warning, and what it quotes, shows and links to is so."""

import ast
import doctest
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recipe.cello1.data.options import make_parser
from recipe.cello1.formats.items import item_to_puzzle, puzzle_to_item
from recipe.cello1.formats.predictions import error_record, prediction_record
from recipe.cello1.formats.rl_rows import rl_row
from recipe.cello1.task.answer import Reason
from recipe.cello1.task.scoring import score_answer
from tests.helpers.browser import layouts
from tests.helpers.project import project_files, setup_arguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEAVY = {"verl", "vllm", "torch", "transformers", "ray", "trl", "datasets"}
RECIPE = sorted((ROOT / "recipe" / "cello1").rglob("*.py"))
PUBLIC = {
    name
    for path in (DOCS / "api").glob("*.md")
    for name in re.findall(r"automodule:: ([\w.]+)", path.read_text(encoding="utf-8"))
}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OF_RAY = {"--head", "--port", "--address", "--num-gpus", "--num-cpus"}
ELSEWHERE = "…"  # stands in a quotation for what differs from case to case

# Refuses what the extra does not bring, so that the pages can be built with it alone.
BUILD = """
import sys
from importlib.machinery import PathFinder
refused = set(sys.argv.pop(1).split(","))
class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Only
from sphinx.cmd.build import main
code = main(sys.argv[1:])
print(*{name.partition(".")[0] for name in sys.modules})
sys.exit(code)
"""


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table_rows(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with a word, the code of each cell without its marks."""
    table = re.search(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table[1].splitlines()]
    return [[cell.strip().strip("`").replace(r"\|", "|") for cell in row] for row in rows]


# -------------------------------------------------------------------------------------------------------------- site


def not_of_the_extra() -> set[str]:
    """Every package installed here that `pip install .[docs]` would not bring."""
    wanted = [*setup_arguments()["install_requires"], *setup_arguments()["extras_require"]["docs"]]
    queue, seen = [Requirement(line) for line in wanted], set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        for line in distribution(name).requires or []:
            more = Requirement(line)
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                queue.append(more)
    brought = {name for name, *_ in seen} | {"cello1", "pip", "setuptools"}
    tops = packages_distributions().items()
    return {top for top, names in tops if not brought & {canonicalize_name(name) for name in names}}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder that `sphinx-build -W` has filled, and in the file "loaded" the packages that it has imported."""
    for package in ("sphinx", "myst_parser"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: docs)")
    out = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-n", "-q", "-b", "html", "-d", str(out / "doctrees")]
    run = subprocess.run(
        [sys.executable, "-c", BUILD, ",".join(not_of_the_extra()), *options, str(DOCS), str(out / "html")],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,
    )
    assert run.returncode == 0, run.stderr
    (out / "html" / "loaded").write_text(run.stdout)
    return out / "html"


@pytest.fixture(scope="module")
def site(built) -> dict[str, str]:
    """The built pages by name, and under "loaded" what the build has imported."""
    paths = [built / "loaded", *built.rglob("*.html")]
    return {path.relative_to(built).as_posix(): path.read_text() for path in paths}


def test_the_site_needs_no_training_library(site):
    loaded = set(site["loaded"].split())
    assert "recipe" in loaded
    assert not loaded & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_no_code_is_cut_and_no_page_scrolls_sideways(built, width, tmp_path):
    pages = sorted(built.rglob("*.html"))
    for page, found in zip(pages, layouts(pages, width, tmp_path), strict=True):
        assert (found["over"], found["cut"]) == (0, []), page.name
        assert found["field"] >= 280, f"{page.name}: parameters stand in a column of {found['field']} pixels"


def test_every_plot_and_a_report_have_a_small_picture_that_says_what_is_seen():
    import scverse_plugin

    shown = {name: alt for alt, name in re.findall(r"!\[([^\]]+)\]\(images/(\w+)\.png\)", page("plots.md"))}
    assert set(shown) == {*scverse_plugin.pl.__all__, "report"}
    for name, alt in shown.items():
        assert len(alt) > 60 and (DOCS / "images" / f"{name}.png").stat().st_size < 100_000, name  # together below 1 MB
        assert f"scverse_plugin.{'' if name == 'report' else 'pl.'}{name}(adata" in page("plots.md")


def test_the_words_beside_the_pictures_are_those_of_the_demo_as_it_is():
    from scverse_plugin._commands.demo import ANSWERS, Recorded, annotate_demo
    from scverse_plugin.get import cello1_df

    with Recorded(ANSWERS) as engine:
        found = cello1_df(annotate_demo(engine))
    ok, text = found["status"] == "ok", page("plots.md")
    first = found[ok].nlargest(3, "support")
    one, two, three = (f"{name} ({row.support:.2f})" for name, row in first.iterrows())
    assert f"those of {one}, {two} and {three}; those of {' and '.join(found.index[~ok])} are grey" in text
    headline = (
        f"{ok.sum()} of {len(found)} groups have a label, median support {found['support'].median():.2f}, 48 puzzles"
    )
    assert headline in text and (found.loc[~ok, "status"] == "tie").all()


@pytest.mark.slow
def test_the_pictures_are_made_by_the_command_named(tmp_path):
    assert "`python docs/images/draw.py`" in page("plots.md")
    command = [sys.executable, str(DOCS / "images" / "draw.py"), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    made = {path.name for path in tmp_path.iterdir()}
    missing = set() if "Chromium is not installed" not in run.stderr else {"report.png"}
    assert made | missing == {path.name for path in (DOCS / "images").glob("*.png")} - {"training.png"}


def test_the_table_of_other_tools_is_dated_and_names_its_sources():
    text = page("compare.md")
    head = next(line for line in text.splitlines() if line.startswith("| |"))
    tools = [name.strip() for name in head.strip("|").split("|")][2:]
    assert re.search(r"on \d{4}-\d\d-\d\d\.", text)
    assert [tool for tool in tools if f"[{tool}](https://" not in text] == []
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(tools) == 4 and widths == {7}


def test_the_page_on_privacy_says_what_the_code_does(tmp_path, monkeypatch):
    """Of an object with secrets in every place, a request to a server elsewhere holds what the page lists as sent."""
    import scverse_plugin
    from scverse_plugin._files import user_cache
    from tests.helpers.toy_adata import TYPES, toy

    adata = toy()
    adata.obs_names = [f"BARCODE{i}" for i in range(adata.n_obs)]
    adata.obs["leiden"] = adata.obs["leiden"].cat.rename_categories(lambda name: f"SECRETGROUP{name}")
    adata.obs["patient"] = "SECRETPATIENT"

    def sent(base_url="https://api.example.org/v1", **more):
        options = {"groupby": "leiden", "engine": "openai", "model": "m", "dry_run": True, "base_url": base_url}
        return str(scverse_plugin.tl.annotate(adata, TYPES, **options, **more))

    assert "MS4A1" in sent() and "monocyte" in sent()
    assert not re.search("BARCODE|SECRET|female|blood", sent())
    assert "blood" in sent(context_keys=["tissue"]) and "female" not in sent(context_keys=["tissue"])
    assert "female" in sent("http://127.0.0.1:1/v1") and "female" not in sent("http://127.0.0.1:1/v1", context=None)
    assert "From the lung." in sent(context="From the lung.")
    monkeypatch.setenv("CELLO1_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    named = set(re.findall(r"`(--[\w-]+)", page("privacy.md")))
    parser = importlib.import_module("scverse_plugin._commands.annotate").build_parser()
    assert named <= {option for action in parser._actions for option in action.option_strings}


def test_every_public_module_is_described_once(site):
    described = [name for text in site.values() for name in re.findall(r'id="module-([\w.]+)"', text)]
    assert sorted(described) == sorted(PUBLIC)


def definitions(path: Path) -> list[tuple[str, str, ast.AST]]:
    """Every class and function of a module with its qualified name and docstring."""
    found = []

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{above}.{child.name}".lstrip(".")
                found.append((name, ast.get_docstring(child) or "", child))
                visit(child, name if isinstance(child, ast.ClassDef) else f"{name}._inner")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("path", RECIPE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_are_full_where_they_are_published_and_one_line_elsewhere(path):
    module = ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")
    for name, text, node in definitions(path):
        if module not in PUBLIC or re.search(r"(^|\.)_[^_]", name):
            assert "\n" not in text, f"{name}: one line, since docs/api does not list it"
        elif isinstance(node, ast.FunctionDef) and name not in ("build_parser", "run") and not name.count("__"):
            taken = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
            assert not taken or "Parameters\n---" in text or "As for" in text or "as for" in text, name


def test_every_function_of_the_plugin_is_described(site):
    import scverse_plugin

    names = [f"{part}.{name}" for part in ("tl", "pl", "get") for name in getattr(scverse_plugin, part).__all__]
    assert "tl.annotate" in names
    for name in [*names, "report"]:
        assert f'id="scverse_plugin.{name}"' in site["api/plugin.html"]


def test_what_is_returned_is_shown_as_prose(site):
    text = re.sub(r"<[^>]+>", "", site["api/task.html"])
    assert "The types in cell order with the reasoning, or the reason why the response is malformed. The number" in (
        " ".join(text.split())
    )


def test_readmes_are_pages_and_their_links_lead_to_pages(site):
    assert 'href="candidates.html"' in site["annotation.html"]
    assert "run_grpo.sh" in site["training.html"]
    assert 'href="training.html"' in site["index.html"]


# ------------------------------------------------------------------------------------------------------------- links


def markdown_files() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in project_files() if path.suffix == ".md"]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", markdown_files())
def test_links_between_files_lead_somewhere(name):
    file = ROOT / name
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", file.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        found = file.parent / target if target else file
        assert found.exists(), f"{name}: {target}"
        # A page that only includes a README has its anchors; Sphinx checks these.
        if anchor and "{include}" not in found.read_text(encoding="utf-8"):
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"


# ---------------------------------------------------------------------------------------------------- troubleshooting


def texts_of_module(source: str) -> list[str]:
    """Return the texts of a module but its docstrings, with a mark no text has where a value is put in."""
    tree = ast.parse(source)
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if id(node) in parts or id(node) in alone:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join([v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]))
    return found


@functools.cache
def texts_of_code() -> list[str]:
    """Return every text that the code holds: of a shell script each line but comments."""
    found = []
    for path in project_files():
        if path.relative_to(ROOT).parts[0] not in ("recipe", "scverse_plugin", "verl"):
            continue
        if path.suffix == ".py":
            found += texts_of_module(path.read_text(encoding="utf-8"))
        elif path.suffix == ".sh":
            found += [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()[:1] != "#"]
    return found


def quotations() -> list[str]:
    return re.findall(r"^`(.+)`\n: ", page("troubleshooting.md"), re.MULTILINE)


@pytest.mark.parametrize("quoted", quotations())
def test_quoted_messages_are_in_the_code(quoted):
    assert len(quoted.replace(ELSEWHERE, "")) > 10
    pattern = re.compile(".*".join(map(re.escape, quoted.split(ELSEWHERE))), re.DOTALL)
    assert any(pattern.search(text) for text in texts_of_code())


def test_every_quotation_has_cause_and_remedy():
    heads = [line for line in page("troubleshooting.md").splitlines() if line.startswith("`")]
    assert [f"`{quoted}`" for quoted in quotations()] == heads
    assert len(set(heads)) == len(heads) > 40


def test_docstrings_do_not_count_as_messages():
    source = '"""Says one."""\nx = f"says {1} two" " and three"\n'
    assert texts_of_module(source) == ["says \0 two and three"]


# ---------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md") if ">>>" in path.read_text()))
def test_sessions_give_what_is_shown(name):
    blocks = re.findall(r"^```python\n(>>>.*?)^```", page(name), re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name, name, 0)
    told: list[str] = []
    result = doctest.DocTestRunner().run(test, out=told.append)
    assert result.attempted and not result.failed, "".join(told)


def example_item() -> dict:
    return json.loads(re.search(r"```json\n(.*?)```", page("puzzles.md"), re.DOTALL)[1])


def test_the_item_shown_is_read_and_written_alike():
    item = example_item()
    written = puzzle_to_item(item_to_puzzle(item))
    assert {key: value for key, value in written.items() if key != "system_msg"} == item


def test_the_question_shown_is_that_of_the_item():
    shown = re.search(r"```text\n(Context.*?)\n```", page("puzzles.md"), re.DOTALL)[1]
    assert shown.replace("␣", " ") == example_item()["user_msg"]


def test_every_key_of_a_row_and_a_record_is_named():
    item = example_item()
    row = rl_row(item_to_puzzle(item), "train", 0)
    run = {"index": 0, "sample": 0, "engine": "vllm", "model": "m", "fingerprint": "f", "sampling": {}}
    records = [
        prediction_record(item, "", **run, finish_reason="stop", tokens=1, prompt_tokens=1, logprob=-0.1),
        error_record(item, "it broke", **run),
    ]
    keys = {*row, *row["reward_model"], *row["extra_info"], *records[0], *records[1]}
    assert {key for key in keys if f"`{key}`" not in page("puzzles.md")} == set()


def test_scores_shown_are_those_of_the_scorer():
    rows = table_rows(page("reward.md"), "answer")
    assert len(rows) > 4
    for answer, *scores in rows:
        text = f"<think>r</think>\n<answer>{answer}</answer>"
        found = [score_answer(text, "A | B | C | D", mode).score for mode in ("dense", "sparse")]
        assert found == list(map(float, scores)), answer


def test_every_reason_is_shown_with_an_example():
    rows = table_rows(page("reward.md"), "reason")
    assert [reason for reason, *_ in rows] == [str(reason) for reason in Reason if reason]
    for reason, example, _ in rows:
        score = score_answer(ast.literal_eval(example), "A | B")
        assert (score.reason, score.score) == (reason, -1)


def test_options_and_commands_named_are_there():
    annotate = importlib.import_module("scverse_plugin._commands.annotate").build_parser()
    known = {
        *texts_of_code(),
        *OPTION.findall(annotate.format_help()),
        *OPTION.findall(make_parser("").format_help()),
        *OF_RAY,
        "--no-weighted",
    }
    for path in DOCS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert set(OPTION.findall(text)) <= known, path.name
        for command in re.findall(r"python -m recipe\.cello1\.(\w+)", text):
            assert (ROOT / "recipe" / "cello1" / f"{command}.py").is_file(), f"{path.name}: {command}"
