"""HTML pages that need nothing else: every report extends one template, ``page.html.j2``; all values are escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render_page(template: str | Path, **values: Any) -> str:
    """Fill a template, which extends ``page.html.j2``: each needs ``title``, ``headlines`` and ``notes``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    template = Path(template)
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(values, contents=[])
    return page.encode("utf-8", "backslashreplace").decode() + "\n"  # responses may hold lone surrogates
