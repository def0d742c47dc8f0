"""The numbers of a chart as a table, for readers who want them exactly, hear the page or have no JavaScript."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plotly.graph_objects import Figure

from budgetvlm.html_report.report_chart import Number


@dataclass(frozen=True)
class ChartTable:
    """The headings of the columns and the rows, all as text; the first column holds names."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def chart_table(figure: Figure) -> ChartTable:
    """Every number that a figure draws."""
    x_label, y_label = (axis.title.text for axis in (figure.layout.xaxis, figure.layout.yaxis))
    kind = figure.data[0].type if figure.data else "scatter"
    if kind == "bar":
        flat = figure.data[0].orientation == "h"
        names, heights = zip(*((t.y, t.x) if flat else (t.x, t.y) for t in figure.data), strict=True)
        columns = [map(_text, column) for column in heights]
        return ChartTable(
            (y_label if flat else x_label, *(t.name for t in figure.data)), tuple(zip(names[0], *columns, strict=True))
        )
    if kind == "heatmap":
        (trace,) = figure.data
        rows = ((name, *map(_text, cells)) for name, cells in zip(trace.y, trace.z, strict=True))
        return ChartTable((y_label, *trace.x), tuple(rows))
    return ChartTable(("line", x_label, y_label, "from", "to"), tuple(_line_rows(figure)))


def _line_rows(figure: Figure) -> Iterator[tuple[str, ...]]:
    for trace in figure.data:
        if trace.hoverinfo == "skip":  # an edge of a band, whose numbers stand beside its line's
            continue
        intervals = trace.customdata if trace.customdata is not None else [(None, None)] * len(trace.x)
        for x, y, (low, high) in zip(trace.x, trace.y, intervals, strict=True):
            yield trace.name, _text(x), _text(y), _text(low), _text(high)


def _text(value: Number) -> str:
    return "–" if value is None else f"{value:.4g}"
