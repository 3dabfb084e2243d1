"""Sphinx settings: ``sphinx-build -W docs docs/_build``."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "cello1"
author = "the cello1 developers"
release = re.search(r'^__version__ = "(.+)"$', (ROOT / "scverse_plugin/__init__.py").read_text(), re.MULTILINE).group(1)
version = release
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
html_theme = "alabaster"
