"""The page: sections as HTML in one file with its style, its script and Plotly, each inlined once."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from string import Template

from budgetvlm._version import __version__
from budgetvlm.html_report.blocks import (
    BarChart,
    Block,
    Chart,
    DataTable,
    Example,
    Gallery,
    HeatMap,
    LineChart,
    Row,
    Section,
    Text,
    Tiles,
)
from budgetvlm.html_report.interactive import figure, library
from budgetvlm.html_report.numbers import numbers


def render(sections: tuple[Section, ...], title: str) -> str:
    """The whole file.

    Raises:
        ConfigError: Plotly is not installed.
    """
    plotly = library()
    figures = {chart.key: {**figure(chart), "title": chart.title} for section in sections for chart in section.charts}
    return Template(_resource("page.html")).substitute(
        title=escape(title),
        version=escape(__version__),
        style=_resource("page.css"),
        navigation="".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in sections),
        body="\n".join(_section(section) for section in sections),
        plotly=plotly,
        figures=_json(figures),
        script=_resource("page.js"),
    )


def _resource(name: str) -> str:
    return files("budgetvlm.html_report").joinpath(name).read_text(encoding="utf-8")


def _json(document: object) -> str:
    """JSON that cannot end a script element."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _section(section: Section) -> str:
    body = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{section.key}"><h2>{escape(section.title)}</h2>\n{body}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_prose(block.text)}</p>"
    if isinstance(block, Tiles):
        return '<div class="tiles">' + "".join(_tile(*pair) for pair in block.figures) + "</div>"
    if isinstance(block, DataTable):
        return _table(block)
    if isinstance(block, Gallery):
        cards = "".join(_card(example) for example in block.examples)
        return f'<h3>{escape(block.caption)}</h3><div class="cards">{cards}</div>'
    if isinstance(block, Row):
        return f'<div class="row">{"".join(_chart(chart) for chart in block.charts)}</div>'
    assert isinstance(block, LineChart | BarChart | HeatMap)
    return _chart(block)


def _prose(text: str) -> str:
    """Escaped text; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _tile(value: str, label: str) -> str:
    main, _, interval = value.partition(" [")
    small = f"<small>[{escape(interval)}</small>" if interval else ""
    return f'<div class="tile"><b>{escape(main)}</b>{small}<span>{escape(label)}</span></div>'


def _chart(chart: Chart) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    label = escape(f"{chart.title}. {chart.note}", quote=True)
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{note}'
        f'<div class="plot" id="{chart.key}" role="img" aria-label="{label}"></div>'
        f"<details><summary>Show the figures</summary>{_table(numbers(chart), bare=True)}</details></figure>"
    )


def _table(table: DataTable, *, bare: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = []
    for number, row in enumerate(table.rows):
        cells = f'<th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        rows.append(f"<tr{' class=strong' if number in table.strong else ''}>{cells}</tr>")
    title = "" if bare else f"<h3>{_prose(table.caption)}</h3>"
    top = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    kind = "table" if top else "table plain"
    return f'{title}<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(rows)}</tbody></table></div>'


def _card(example: Example) -> str:
    picture = f'<img src="{example.picture}" alt="the image of this question">' if example.picture else ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in example.lines)
    return (
        f'<div class="card">{picture}<div><b>{escape(example.question)}</b><small>{escape(example.title)}</small>'
        f"<ul>{lines}</ul></div></div>"
    )
