"""A page as a list of blocks, and the same blocks as Markdown and as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tarflow_fast.report.style import CSS

__all__ = ["Block", "Code", "Figures", "Heading", "Table", "Text", "to_html", "to_markdown"]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """title: what the rows are. rows: cells as text, as many as columns. The first column holds names, not numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figures:
    """Drawings side by side where there is room: (title, SVG). Markdown, which has no drawings, leaves them out.

    An SVG has the word {id} where its id belongs, which the page chooses.
    """

    drawings: Sequence[tuple[str, str]]
    wide: bool = False


Block = Heading | Text | Code | Table | Figures


def to_markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Code):
            parts.append("\n".join(["```", *block.lines, "```"]))
        elif isinstance(block, Table):
            parts += [f"**{block.title}**", _pipes(block)]
    return "\n\n".join(parts) + "\n"


def _pipes(table: Table) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.columns, *table.rows)]
    head, *rest = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([head, "| --- |" + " ---: |" * (len(table.columns) - 1), *rest])


def to_html(title: str, blocks: Sequence[Block]) -> str:
    ids, parts = _Ids(), []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f'<h{block.level} id="{ids(block.text)}">{escape(block.text)}</h{block.level}>')
        elif isinstance(block, Text):
            parts.append(f"<p>{_code(escape(block.text, quote=False))}</p>")
        elif isinstance(block, Code):
            parts.append("<pre><code>" + escape("\n".join(block.lines)) + "</code></pre>")
        elif isinstance(block, Table):
            parts.append(_table(block, ids))
        else:
            drawn = "\n".join(_figure(name, svg, ids) for name, svg in block.drawings)
            parts.append(f'<div class="figures{" wide" if block.wide else ""}">\n{drawn}\n</div>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


class _Ids:
    """Names for anchors: no two are the same."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def __call__(self, text: str) -> str:
        name = word = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        number = 1
        while name in self.taken:
            number += 1
            name = f"{word}-{number}"
        self.taken.add(name)
        return name


def _figure(name: str, svg: str, ids: _Ids) -> str:
    own = ids("figure " + name)
    drawing = svg.replace("{id}", own + "-title").replace("{title}", escape(name))
    return f'<figure id="{own}">\n<figcaption>{escape(name)}</figcaption>\n{drawing}\n</figure>'


def _table(table: Table, ids: _Ids) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">\n'
        f'<table id="{ids("table " + table.title)}">\n<caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
