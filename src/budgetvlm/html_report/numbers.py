"""A chart's figures as a table, for readers who want them exactly, hear the page, or have no JavaScript."""

from __future__ import annotations

from collections.abc import Iterator

from budgetvlm.html_report.blocks import BarChart, Chart, DataTable, HeatMap, LineChart, Number


def numbers(chart: Chart) -> DataTable:
    """Every figure that is drawn."""
    if isinstance(chart, LineChart):
        header = ("", chart.x_label, chart.y_label, "from", "to")
        return DataTable(chart.title, header, tuple(_line_rows(chart)))
    if isinstance(chart, BarChart):
        rows = [(name, *(_text(bars.heights[i]) for bars in chart.series)) for i, name in enumerate(chart.names)]
        return DataTable(chart.title, (chart.x_label, *(bars.name for bars in chart.series)), tuple(rows))
    assert isinstance(chart, HeatMap)
    cells = [(row, *(_text(cell) for cell in cells)) for row, cells in zip(chart.rows, chart.cells, strict=True)]
    return DataTable(chart.title, (chart.y_label, *chart.columns), tuple(cells))


def _line_rows(chart: LineChart) -> Iterator[tuple[str, ...]]:
    for series in chart.series:
        nothing: tuple[Number, ...] = (None,) * len(series.x)
        for x, y, low, high in zip(series.x, series.y, series.low or nothing, series.high or nothing, strict=True):
            yield series.name, _text(x), _text(y), _text(low), _text(high)


def _text(value: Number) -> str:
    return "–" if value is None else f"{value:.4g}"
