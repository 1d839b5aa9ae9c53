"""Self-contained HTML pages, readable in light and dark mode."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

STYLE = """
:root { color-scheme: light dark; --faint: light-dark(#6a6f78, #9aa0aa); --line: light-dark(#d9dce1, #3a3d43);
        --mark: light-dark(#fdf1e4, #3a2c1c); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       background: light-dark(#ffffff, #16181b); color: light-dark(#1d1e20, #e4e6ea); }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h1:not(:first-of-type) { margin-top: 3rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note, figcaption { color: var(--faint) }
figure { margin: 1rem 0; overflow-x: auto } figure svg, img { max-width: 100%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { cursor: pointer; user-select: none } th[data-order]::after { content: " \\2191" }
th[data-order="-1"]::after { content: " \\2193" }
td.text, th.text { text-align: left } tr.best { background: var(--mark) } td.cause { white-space: normal; min-width: 20rem }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); padding: .8rem } dl { display: grid; gap: 0 1rem;
grid-template-columns: max-content auto } dt { color: var(--faint) } dd { margin: 0 }
"""
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, order = head.dataset.order == 1 ? -1 : 1;
  for (const other of head.parentNode.children) delete other.dataset.order;
  head.dataset.order = order;
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return order * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  };
  body.append(...[...body.rows].sort(compare));
};
"""


def document(title: str, parts: Sequence[Markup]) -> str:
    """Return a page of ``parts``, whose tables are sorted by a click on a heading."""
    return html(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{}</title><style>{}</style></head>\n<body>\n{}\n<script>{}</script></body></html>\n",
        title,
        Markup(STYLE),
        Markup("\n").join(parts),
        Markup(SORT),
    )


def html(template: str, *texts: Any) -> Markup:
    """Fill texts into the ``{}`` of an HTML template, escaping everything that is not ``Markup``."""
    return Markup(template).format(*texts)


def cell(text: str, value: float | None) -> Markup:
    """Return a table's cell that shows ``text`` and is sorted by ``value``."""
    data = Markup() if value is None else html(' data-value="{}"', repr(float(value)))
    return html("<td{}>{}</td>", data, text)


def picture(caption: str, content: bytes) -> Markup:
    """Return a figure of a JPEG file, which becomes a part of the page."""
    source = base64.b64encode(content).decode()
    image = html('<img alt="{}" src="data:image/jpeg;base64,{}">', caption, source)
    return html("<figure>{}<figcaption>{}</figcaption></figure>", image, caption)
