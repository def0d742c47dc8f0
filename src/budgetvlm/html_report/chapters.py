"""The chapters of a report, in order; the page and the picture files made of them."""

from __future__ import annotations

from pathlib import Path

from budgetvlm.html_report.blocks import Section
from budgetvlm.html_report.report_data import Material
from budgetvlm.html_report.section_choices import choices
from budgetvlm.html_report.section_frontier import comparison, frontier
from budgetvlm.html_report.section_knobs import coupling
from budgetvlm.html_report.section_late import late
from budgetvlm.html_report.section_start import glance, measured
from budgetvlm.html_report.section_training import learning, overhead

CHAPTERS = (glance, frontier, late, choices, coupling, comparison, learning, overhead, measured)


def sections(material: Material) -> tuple[Section, ...]:
    """All chapters."""
    return tuple(chapter(material) for chapter in CHAPTERS)


def write_page(chapters: tuple[Section, ...], title: str, path: str | Path) -> None:
    """Write the HTML file, whole or not at all.

    Raises:
        ConfigError: Plotly is not installed. OutputError: the file cannot be written.
    """
    from budgetvlm._io import atomic_path
    from budgetvlm.html_report.page import render

    text = render(chapters, title)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_plots(chapters: tuple[Section, ...], directory: str | Path) -> list[Path]:
    """Write every chart as PNG and SVG; the paths. Raises OutputError."""
    from budgetvlm.html_report.still import save

    charts = [chart for chapter in chapters for chart in chapter.charts]
    return [path for chart in charts for path in save(chart, Path(directory))]
