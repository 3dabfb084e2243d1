"""Sphinx settings: ``sphinx-build -W -n docs docs/_build``."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, get_type_hints

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

# Before autodoc puts stand-ins in place of packages that pandas or anndata look for.
import scverse_plugin  # noqa: E402

project = "cello1"
author = "the cello1 developers"
version = release = scverse_plugin.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# Heavy, and not needed to read a signature and a docstring.
autodoc_mock_imports = ["datasets", "omegaconf", "openai", "peft", "pyarrow", "ray", "rich", "torch"]
autodoc_mock_imports += ["transfer_queue", "transformers", "trl", "verl", "vllm"]
# `main` is described by the command's --help; the other is scipy's, and compiled: it does not say where it is from.
autodoc_default_options = {"members": True, "exclude-members": "main, linear_sum_assignment"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
add_module_names = False  # the heading above says it
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = True
toc_object_entries_show_parents = "hide"

# With -n, every reference to something of this project must be found. Types of other packages are not looked up.
nitpick_ignore_regex = [
    ("py:.*", r"recipe\.cello1\.(evaluation\.(baseline|results|scores)|task\.ontology)\..*"),  # not listed
    ("py:class", r"(?!recipe\.|scverse_plugin\.).*"),
    ("py:.*", r"(argparse|json|scanpy)\..*"),
    ("py:.*", r"recipe\..*\.([A-Z]|_\w+)"),  # type variables, private classes in annotations
    (
        "py:class",
        r"scverse_plugin\..*\._\w+\.\w+",
    ),  # what the plugin returns, by its private module
]

html_theme = "alabaster"
html_theme_options = {
    "description": "Reasoning models that annotate cells",
    "page_width": "1240px",
    "body_max_width": "none",
}
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_show_sourcelink = False
html_show_copyright = False
highlight_language = "none"

README_PAGES = {
    "README.md": "index.md",
    "recipe/cello1/README.md": "training.md",
    "scverse_plugin/README.md": "annotation.md",
}


class Absent:
    """Hides what autodoc puts stand-ins for, so that the pages do not depend on what is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse these packages."""
        if name.partition(".")[0] in autodoc_mock_imports:
            raise ModuleNotFoundError(name)


def relink(app: Any, path: Path, page: str, content: list[str]) -> None:
    """Let an included README link to pages of this site; what is no page is named without a link."""
    folder = (DOCS / path).parent

    def replace(match: re.Match) -> str:
        text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        file = Path(os.path.relpath(folder / target, ROOT)).as_posix()
        found = README_PAGES.get(file, file.removeprefix("docs/"))
        return f"[{text}]({found}{anchor})" if (DOCS / found).is_file() else text

    content[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*|)\)", replace, content[0])


def prose_returns(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep what is returned as the prose it is; napoleon would take its first line for a type."""
    text = "\n".join(lines)
    section = re.search(r"^(Returns|Yields)\n-+\n(.+?)(?=\n[^\n]+\n-{3,}\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if section:
        field = ":returns: " + indent(dedent(section[2]), "    ").strip()
        # Two empty lines end the section before.
        lines[:] = f"{text[: section.start()]}\n\n{field}\n\n{text[section.end() :]}".splitlines()


def evaluated_types(app: Any, obj: Any, bound: bool) -> None:
    """Make types of annotations that are text; of those of a class's parameters, autodoc would link to a namesake."""
    with suppress(NameError, TypeError, AttributeError):  # imported for type checkers only; no Python function
        obj.__annotations__ = get_type_hints(obj)


def setup(app: Any) -> None:
    """Put all of this in their places."""
    sys.meta_path.insert(0, Absent())
    app.connect("include-read", relink)
    app.connect("autodoc-before-process-signature", evaluated_types)
    app.connect("autodoc-process-docstring", prose_returns, priority=400)  # before napoleon
