"""A report's text, tables and figures as one HTML page without external resources, and as Markdown without the figures.

In: `Section`s. Out: text. perf/report/write.py decides their content.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence

from .run_folder import Spread

CSS = """
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1c1c1c; background: #fff;
  max-width: 1000px; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin-bottom: 0.4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.6rem; padding-top: 0.9rem; border-top: 1px solid #ddd; }
p { margin: 0.6rem 0; }
.verdict { font-size: 1.08rem; background: #f4f6f8; border-left: 4px solid #0072B2; padding: 0.8rem 1.1rem; margin: 1.2rem 0; }
.source { font-size: 0.8rem; color: #666; margin: 0.25rem 0 1.2rem; }
.table { overflow-x: auto; margin: 0.9rem 0 0.3rem; }
table { border-collapse: collapse; font-size: 0.85rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; overflow-wrap: break-word; }
th { border-bottom: 2px solid #999; font-weight: 600; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
tbody tr:hover { background: #fafafa; }
figure { margin: 1rem 0 0.8rem; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { font-size: 0.85rem; color: #555; margin-top: 0.2rem; }
a { color: #00588a; }
@media (max-width: 600px) {
  body { margin: 1rem auto 2rem; padding: 0 0.8rem; }
  h1 { font-size: 1.35rem; }
  table { width: auto; min-width: 100%; }
  th, td { padding: 0.25rem 0.4rem; }
  figure.wide { overflow-x: auto; }
  figure.wide svg { max-width: none; width: 620px; }
}
"""
NUMBER = re.compile(r"-?[\d,]*\.?\d+( \(.*\))?( ?[*†%]+)?$")


@dataclasses.dataclass(frozen=True)
class Link:
    """A link to a file of the run's folder, by relative path."""

    text: str
    path: str


Cell = str | Sequence[Link]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head; `source`: the file of the run's folder with the numbers, if the rows do not link to files."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    source: str | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot as SVG, and its caption."""

    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and its blocks; a text is a paragraph."""

    title: str
    blocks: Sequence[str | Table | Figure]


def significant(value: float) -> str:
    """Three significant digits, never an exponent.

    >>> significant(35.123), significant(0.01234), significant(12345.0)
    ('35.1', '0.0123', '12,345')
    """
    rounded = float(f"{value:.3g}")  # 9.996 is 10.0, not 10.00
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}" if rounded else "0"


def shown(value: Spread | float | None, mark: str = "") -> str:
    """A number for the page: 35.1, or 35.1 (34.0..36.2) if its rounds differ, or an empty text for None."""
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return significant(value) + mark
    least, most, median = (significant(value[key]) for key in ("min", "max", "median"))
    return median + ("" if least == most else f" ({least}..{most})") + mark


def whole(value: float | None) -> str:
    """A count."""
    return "" if value is None else f"{value:,g}"


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    return " ".join(f'<a href="{html.escape(link.path)}">{html.escape(link.text)}</a>' for link in cell)


def _is_number(cell: Cell) -> bool:
    """Whether the cell fits a column of numbers, which is aligned to the right."""
    return isinstance(cell, str) and (not cell or bool(NUMBER.match(cell)))


def _without_empty_columns(table: Table) -> Table:
    """The table without columns in which every cell is empty, such as links to raw files that a packed run does not keep."""
    kept = [i for i in range(len(table.head)) if any(row[i] for row in table.rows)]
    return Table([table.head[i] for i in kept], [[row[i] for i in kept] for row in table.rows], table.source)


def _html_table(table: Table) -> str:
    table = _without_empty_columns(table)
    kinds = [' class="number"' if all(_is_number(row[i]) for row in table.rows) else "" for i in range(len(table.head))]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, table.head, strict=True))
    rows = ("".join(f"<td{kind}>{_html_cell(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    text = f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    return text + (
        f'\n<p class="source">From <a href="{html.escape(table.source)}">{html.escape(table.source)}</a></p>' if table.source else ""
    )


def _html_block(block: str | Table | Figure) -> str:
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Figure):
        wide = ' class="wide"' if float((re.search(r'width="([\d.]+)', block.svg) or [0, 0])[1]) > 500 else ""  # points
        return f"<figure{wide}>\n{block.svg}\n<figcaption>{html.escape(block.caption)}</figcaption>\n</figure>"
    return f"<p>{html.escape(block)}</p>"


def html_from_sections(title: str, verdict: str, sections: Sequence[Section]) -> str:
    """The complete HTML page."""
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="verdict">{html.escape(verdict)}</p>']
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", *map(_html_block, section.blocks)]
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>'
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _markdown(text: str) -> str:
    """The text with asterisks and bars escaped for Markdown."""
    return re.sub(r"([\\*|<`\[\]])", r"\\\1", " ".join(text.split()))


def _markdown_cell(cell: Cell) -> str:
    return _markdown(cell) if isinstance(cell, str) else " ".join(f"[{_markdown(link.text)}](<{link.path}>)" for link in cell)


def _markdown_block(block: str | Table) -> str:
    if isinstance(block, str):
        return _markdown(block)
    block = _without_empty_columns(block)
    lines = [list(map(_markdown, block.head)), ["---"] * len(block.head), *(list(map(_markdown_cell, row)) for row in block.rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + (f"\n\nFrom [{block.source}]({block.source})." if block.source else "")


def markdown_from_sections(title: str, verdict: str, sections: Sequence[Section]) -> str:
    """The report as Markdown, without figures."""
    parts = [f"# {_markdown(title)}", _markdown(verdict)]
    for section in sections:
        parts.append(f"## {_markdown(section.title)}")
        parts += [_markdown_block(block) for block in section.blocks if not isinstance(block, Figure)]
    return "\n\n".join(parts) + "\n"
