"""The sections of a report, in the order of the page."""

from __future__ import annotations

from budgetvlm.html_report.page import ReportSection
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.html_report.section_choices import choices
from budgetvlm.html_report.section_frontier import comparison, frontier
from budgetvlm.html_report.section_knobs import coupling
from budgetvlm.html_report.section_late import late
from budgetvlm.html_report.section_start import glance, measured
from budgetvlm.html_report.section_training import learning, overhead

SECTIONS = (glance, frontier, late, choices, coupling, comparison, learning, overhead, measured)


def report_sections(inputs: ReportInputs) -> tuple[ReportSection, ...]:
    """All sections; one whose input is missing says so."""
    return tuple(section(inputs) for section in SECTIONS)
