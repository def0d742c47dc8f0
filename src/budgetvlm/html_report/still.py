"""Charts as PNG and SVG files, drawn by matplotlib on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import atomic_path
from budgetvlm.html_report.blocks import BarChart, Chart, HeatMap, LineChart, Number
from budgetvlm.html_report.looks import DARK, HEAT, QUIET

FORMATS = ("png", "svg")
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "": "none"}
MARKERS = {"circle": "o", "diamond": "D", "triangle-up": "^", "": ""}
INK = "#222222"
DPI = 150


def save(chart: Chart, directory: Path) -> list[Path]:
    """Write `<key>.png` and `<key>.svg`; their paths. Raises OutputError."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_size(chart), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    {LineChart: _lines, BarChart: _bars, HeatMap: _heat}[type(chart)](axes, chart)  # type: ignore[operator]
    title = chart.title + (f"\n{chart.note}" if chart.note else "")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    paths = [directory / f"{chart.key}.{kind}" for kind in FORMATS]
    # Equal charts give equal files: no date, ids from a fixed salt.
    with rc_context({"svg.hashsalt": chart.key, "svg.fonttype": "none"}):
        for path, kind in zip(paths, FORMATS, strict=True):
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return paths


def _size(chart: Chart) -> tuple[float, float]:
    if isinstance(chart, HeatMap):
        return 2.6 + 0.75 * len(chart.columns), 1.6 + 0.38 * len(chart.rows)
    if isinstance(chart, BarChart) and chart.flat:
        return 8.0, 1.6 + 0.28 * len(chart.names)
    return 8.0, 5.0


def _numbers(values: tuple[Number, ...]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _clean(axes: Any, chart: Chart) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)


def _legend(axes: Any, count: int) -> None:
    if count > 1:
        axes.legend(frameon=False, fontsize=9)


def _lines(axes: Any, chart: LineChart) -> None:
    _clean(axes, chart)
    axes.grid(True, axis="y", color="#e6e6e6")
    for series in chart.series:
        look, x = series.look, _numbers(series.x)
        if series.low:
            axes.fill_between(
                x, _numbers(series.low), _numbers(series.high), color=look.colour, alpha=0.15, linewidth=0
            )
        axes.plot(
            x, _numbers(series.y), label=series.name, color=look.colour, linestyle=DASHES[look.line],
            linewidth=look.width, marker=MARKERS[look.marker], markersize=5,
        )  # fmt: skip
    if chart.level is not None:
        axes.axhline(chart.level, color=QUIET, linewidth=1, linestyle="--", label=chart.level_name)
    _legend(axes, len(chart.series))


def _bars(axes: Any, chart: BarChart) -> None:
    _clean(axes, chart)
    axes.grid(True, axis="x" if chart.flat else "y", color="#e6e6e6")
    places, count = np.arange(len(chart.names)), 1 if chart.stacked else max(len(chart.series), 1)
    floor = np.zeros(len(chart.names))
    for number, bars in enumerate(chart.series):
        heights = _numbers(bars.heights)
        at = places + (0.0 if chart.stacked else 0.8 * ((number + 0.5) / count - 0.5))
        draw, errors = (axes.barh, "xerr") if chart.flat else (axes.bar, "yerr")
        options: dict[str, Any] = {"label": bars.name, "color": bars.colour}
        if bars.low:
            whiskers = np.stack([heights - _numbers(bars.low), _numbers(bars.high) - heights])
            options |= {errors: np.maximum(whiskers, 0), "ecolor": "#777777", "capsize": 2}
        if chart.stacked:
            options["bottom"] = floor
            floor = floor + np.nan_to_num(heights)
        draw(at, heights, 0.8 / count, **options)
    set_ticks = axes.set_yticks if chart.flat else axes.set_xticks
    crowded = len(chart.names) > 12 and not chart.flat
    shown = places[:: len(places) // 8] if crowded else places
    set_ticks(shown, [chart.names[i] for i in shown], fontsize=9)
    if chart.level is not None:
        line = axes.axvline if chart.flat else axes.axhline
        line(chart.level, color=QUIET, linewidth=1, linestyle="--", label=chart.level_name)
    if chart.stacked:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    else:
        _legend(axes, len(chart.series))


def _heat(axes: Any, chart: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    cells = np.stack([_numbers(row) for row in chart.cells])
    axes.imshow(cells, cmap=LinearSegmentedColormap.from_list(chart.key, HEAT[chart.upside]), aspect="auto")
    axes.set_xticks(range(len(chart.columns)), chart.columns, fontsize=9, rotation=30 if len(chart.columns) > 6 else 0)
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=9)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.{chart.digits}f}", ha="center", va="center", fontsize=9, color=DARK)
