"""Saves charts as PNG and SVG files.

Plotly's own export needs a browser, so Matplotlib draws the traces of its figures, on white. Only lines, bars and heat
maps are known, because there are no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from plotly.graph_objects import Figure

from budgetvlm._io import atomic_path
from budgetvlm.evaluation.policy_styles import DASHES, GREY, MARKERS
from budgetvlm.html_report.report_chart import DARK, INK, ReportChart

FORMATS = ("png", "svg")
PIXELS = 75  # of the page in an inch of a picture
NOTE_WIDTH = 95  # characters of a line above a chart
# no line crosses a legend's words
LEGEND: dict[str, Any] = {"fontsize": 9, "facecolor": "white", "edgecolor": "none", "framealpha": 0.9}
MOST_NAMES = 12  # names below upright bars; of more, every few are written


def save_pictures(chart: ReportChart, directory: Path) -> list[Path]:
    """Write `<key>.png` and `<key>.svg` and return their paths. Raises OutputError."""
    paths = [directory / f"{chart.key}.{ending}" for ending in FORMATS]
    for path in paths:
        save_side_by_side([chart], path)
    return paths


def save_side_by_side(charts: Sequence[ReportChart], path: str | Path) -> None:
    """Write charts beside each other into one file, whole or not at all.

    Equal charts give equal files, so there is no date and identifiers come from a fixed salt.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = Path(path).suffix.removeprefix(".")
    with rc_context({"svg.hashsalt": charts[0].key, "svg.fonttype": "none"}), atomic_path(path) as temporary:
        canvas = _drawn(charts)
        FigureCanvasAgg(canvas)
        canvas.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _drawn(charts: Sequence[ReportChart]) -> Any:
    """A figure of Matplotlib that needs no display."""
    from matplotlib.figure import Figure as Canvas

    draw = {"scatter": _draw_lines, "bar": _draw_bars, "heatmap": _draw_heat_map}
    height = max(chart.figure.layout.height for chart in charts) / PIXELS
    canvas = Canvas(figsize=(8.0 * len(charts), height), dpi=150, facecolor="white", layout="constrained")
    for axes, chart in zip(canvas.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        _prepare(axes, chart)
        draw[chart.figure.data[0].type if chart.figure.data else "scatter"](axes, chart.figure)
    return canvas


def _clean(axes: Any, grid: str = "y") -> None:
    """Leave two thin axes and a faint grid across one of them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color="#e6e6e6", linewidth=1)


def _prepare(axes: Any, chart: ReportChart) -> None:
    layout = chart.figure.layout
    axes.set_xlabel(layout.xaxis.title.text)
    axes.set_ylabel(layout.yaxis.title.text)
    note = fill(chart.note, NOTE_WIDTH)
    axes.set_title(chart.title, loc="left", fontsize=13, weight="bold", color=DARK, pad=8 + 13 * len(note.splitlines()))
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(note, (0, 1), (0, 5), **place, fontsize=10, color=INK).set_in_layout(False)
    if layout.xaxis.tickvals:
        axes.set_xticks(layout.xaxis.tickvals, [text.replace("<br>", "\n") for text in layout.xaxis.ticktext])
    for shape, name in zip(layout.shapes, layout.annotations, strict=True):
        axes.axhline(shape.y0, color=GREY, linewidth=1, linestyle="--", label=name.text)


def _numbers(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _draw_lines(axes: Any, figure: Figure) -> None:
    _clean(axes)
    for trace in figure.data:
        x, y = _numbers(trace.x), _numbers(trace.y)
        if trace.hoverinfo == "skip":  # one edge of a band, which is drawn with its line
            continue
        if trace.customdata is not None:
            low, high = (_numbers(edge) for edge in zip(*trace.customdata, strict=True))
            axes.fill_between(x, low, high, color=trace.line.color, alpha=0.15, linewidth=0)
        if trace.mode == "markers":
            axes.scatter(x, y, s=trace.marker.size**2 / 2, marker=MARKERS[trace.marker.symbol or "circle"],
                         color=trace.marker.color, label=trace.name)  # fmt: skip
        else:
            marker = MARKERS[trace.marker.symbol] if "markers" in trace.mode else ""
            axes.plot(x, y, label=trace.name, color=trace.line.color, linestyle=DASHES[trace.line.dash],
                      linewidth=trace.line.width, marker=marker, markersize=5)  # fmt: skip
    if len(figure.data) > 1:
        axes.legend(**LEGEND)


def _draw_bars(axes: Any, figure: Figure) -> None:
    flat, stacked = figure.data[0].orientation == "h", figure.layout.barmode == "stack"
    names = figure.data[0].y if flat else figure.data[0].x
    places, side_by_side = np.arange(len(names)), 1 if stacked else len(figure.data)
    _clean(axes, "x" if flat else "y")
    floor = np.zeros(len(names))
    for number, trace in enumerate(figure.data):
        heights, error = _numbers(trace.x if flat else trace.y), trace.error_x if flat else trace.error_y
        at = places + 0.8 * ((number + 0.5) / side_by_side - 0.5) if not stacked else places
        options: dict[str, Any] = {"label": trace.name, "color": trace.marker.color}
        if error.array is not None:
            whiskers = np.maximum([_numbers(error.arrayminus), _numbers(error.array)], 0)
            options |= {"xerr" if flat else "yerr": whiskers, "ecolor": "#777777", "capsize": 2}
        if stacked:
            options["bottom"] = floor
            floor = floor + np.nan_to_num(heights)
        (axes.barh if flat else axes.bar)(at, heights, 0.8 / side_by_side, **options)
    shown = places[:: len(places) // 8] if len(names) > MOST_NAMES and not flat else places
    (axes.set_yticks if flat else axes.set_xticks)(shown, [names[i] for i in shown], fontsize=9)
    if stacked:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    elif len(figure.data) > 1:
        axes.legend(**LEGEND)


def _draw_heat_map(axes: Any, figure: Figure) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    (trace,) = figure.data
    cells = np.stack([_numbers(row) for row in trace.z])
    colours = LinearSegmentedColormap.from_list("cells", [colour for _, colour in trace.colorscale])
    axes.imshow(cells, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(trace.x)), trace.x, fontsize=9, rotation=30 if len(trace.x) > 6 else 0)
    axes.set_yticks(range(len(trace.y)), trace.y, fontsize=9)
    axes.spines[:].set_visible(False)
    form = trace.texttemplate.removeprefix("%{z:").removesuffix("}")
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            axes.text(column, row, f"{value:{form}}", ha="center", va="center", fontsize=9, color=DARK)
