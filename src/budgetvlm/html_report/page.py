"""Renders the report's sections into one HTML file with its style, its scripts and its charts inlined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from budgetvlm._io import atomic_path
from budgetvlm._version import __version__
from budgetvlm.html_report import number_format
from budgetvlm.html_report.report_chart import ReportChart, ReportSection, chart_table
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.html_report.section_choices import choices
from budgetvlm.html_report.section_frontier import comparison, frontier
from budgetvlm.html_report.section_knobs import coupling
from budgetvlm.html_report.section_late import late
from budgetvlm.html_report.section_mean import mean
from budgetvlm.html_report.section_start import glance, measured
from budgetvlm.html_report.section_training import learning, overhead

FILTERS = (
    number_format.percent, number_format.milliseconds, number_format.decimal, number_format.signed,
    number_format.interval_points, chart_table,
)  # fmt: skip
SECTIONS = (glance, frontier, mean, late, choices, coupling, comparison, learning, overhead, measured)


def report_sections(inputs: ReportInputs) -> tuple[ReportSection, ...]:
    """All sections in the order of the page; one whose input is missing says so."""
    return tuple(section(inputs) for section in SECTIONS)


def charts_of(sections: tuple[ReportSection, ...]) -> list[ReportChart]:
    """All charts of the sections, in order."""
    return [chart for section in sections for row in section.charts for chart in row]


def write_page(sections: tuple[ReportSection, ...], title: str, path: str | Path) -> None:
    """Write the HTML file, whole or not at all. Raises OutputError if it cannot be written."""
    environment = Environment(
        loader=PackageLoader("budgetvlm.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in FILTERS}
    page = environment.get_template("page.html.j2").render(
        title=title,
        version=__version__,
        sections=sections,
        plotly=Markup(get_plotlyjs()),
        figures=Markup(_script_json({chart.key: figure_document(chart) for chart in charts_of(sections)})),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def figure_document(chart: ReportChart) -> dict[str, Any]:
    """Data, layout and title of a chart as Plotly's script reads them."""
    document: dict[str, Any] = json.loads(chart.figure.to_json())
    document["layout"].pop("template", None)
    return {**document, "title": chart.title}


def _script_json(document: object) -> str:
    """JSON that cannot end the script element in which it stands."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
