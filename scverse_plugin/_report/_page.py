"""The frame of the report: one page that needs nothing else, for narrow and wide windows, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--text:#222;--paper:#fff;--dim:#5c5c5c;--line:#ddd;--box:#f6f6f6;--link:#0b57d0;
--listed:#d9f2d9;--invented:#ffd6d6;--flag:#a40000}
@media(prefers-color-scheme:dark){:root{--text:#e4e4e4;--paper:#181818;--dim:#a8a8a8;--line:#444;--box:#242424;
--link:#8ab4f8;--listed:#1e4620;--invented:#5c1f1f;--flag:#ff8a80}img{background:#fff}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1rem;color:var(--text);
background:var(--paper);overflow-wrap:anywhere}
a{color:var(--link)}h1,h2,h3{line-height:1.25}h2{margin-top:2.5rem;border-bottom:2px solid var(--line)}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;margin:1rem 0}caption{text-align:left;color:var(--dim);padding:.2rem 0}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;overflow-wrap:normal}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption{color:var(--dim)}
details{margin:.5rem 0}summary{cursor:pointer}
pre{white-space:pre-wrap;background:var(--box);padding:.7rem;margin:.3rem 0;max-width:100%}
.listed{background:var(--listed)}.invented{background:var(--invented);text-decoration:underline wavy}
.flag{color:var(--flag);font-weight:600}.dim{color:var(--dim)}
"""


def page(title: str, sections: Sequence[tuple[str, str, str]], head: str) -> str:
    """Put sections (anchor, heading, HTML) below a table of contents."""
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section><h2 id="{anchor}">{escape(heading)}</h2>{html}</section>' for anchor, heading, html in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f'<body><h1>{escape(title)}</h1>{head}<nav aria-label="Contents"><ul>{links}</ul></nav>{body}</body></html>\n'
    )


def table(caption: str, columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """Write a table: columns are a heading and whether numbers stand below it, cells HTML; the first names the row."""
    kinds = [' class="n"' if number else "" for _, number in columns]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}' for (name, _), kind in zip(columns, kinds, strict=True))
    body = []
    for first, *cells in rows:
        rest = "".join(f"<td{kind}>{cell}" for cell, kind in zip(cells, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row">{first}{rest}')
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{head}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
