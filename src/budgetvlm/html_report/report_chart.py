"""Charts of the report as Plotly figures in the page's colours.

Titles stand in the page and not in the figure, so that they wrap on a phone. Text and grid have a neutral colour here;
the style sheet of the page replaces it by that of its colour scheme. Numbers are drawn as given: shares are already in
%, times in ms, and None leaves a gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from plotly.graph_objects import Bar, Figure, Heatmap, Scatter

from budgetvlm.evaluation.policy_styles import GREY, PolicyStyle

INK, GRID, CLEAR, DARK = "#444444", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)", "#1f2328"
HEIGHT = 360  # pixels of a chart of lines or upright bars
# Light to dark for the values of a knob, from cheap to expensive; readable on white and on black.
SHADES = ("#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5")
# Both ends of a heat map, on which dark text is readable: where a larger number is better, and where a smaller one is.
LARGER_IS_BETTER, SMALLER_IS_BETTER = ("#f4f9fe", "#62a9d8"), ("#fff7ee", "#fa9a50")

Number = float | None


@dataclass(frozen=True, eq=False)
class ReportChart:
    """A Plotly figure with its title and note; ``key`` names its place in the page and its picture files."""

    key: str
    title: str
    figure: Figure
    note: str = ""


@dataclass(frozen=True, eq=False)
class ReportSection:
    """One chapter of the page, written by the template ``<key>.html.j2``.

    Attributes:
        key: its anchor and the name of its template.
        title: its heading.
        charts: rows of charts that stand side by side where there is room.
        values: what else the template shows.
    """

    key: str
    title: str
    charts: tuple[tuple[ReportChart, ...], ...] = ()
    values: dict[str, Any] = field(default_factory=dict)


def shades(count: int) -> list[str]:
    """Colours for ``count`` values of a knob, from light to dark."""
    if count == 1:
        return [SHADES[2]]
    return [SHADES[round(i * (len(SHADES) - 1) / (count - 1))] for i in range(count)]


def curve(
    name: str,
    x: Sequence[Number],
    y: Sequence[Number],
    style: PolicyStyle,
    interval: Sequence[tuple[Number, Number]] = (),
    notes: Sequence[str] = (),
) -> list[Scatter]:
    """One line with an optional band around it; ``notes`` are shown under the cursor, one for each point."""
    note = "<br>%{text}" if notes else ""
    line = Scatter(
        name=name, x=list(x), y=list(y), mode="lines+markers" if style.marker else "lines", legendgroup=name,
        line={"color": style.colour, "width": style.width, "dash": style.dash},
        marker={"color": style.colour, "size": 8, "symbol": style.marker or "circle"},
        text=list(notes) or None, customdata=[list(pair) for pair in interval] or None,
        hovertemplate=f"%{{x:.4g}}, %{{y:.4g}}{note}<extra>%{{fullData.name}}</extra>",
    )  # fmt: skip
    return [*(_band(line, interval) if interval else ()), line]


def _band(line: Scatter, interval: Sequence[tuple[Number, Number]]) -> Iterator[Scatter]:
    """Draw two invisible lines with the area between them filled."""
    red, green, blue = (int(line.line.color[i : i + 2], 16) for i in (1, 3, 5))
    for bound, fill in zip(zip(*interval, strict=True), (None, "tonexty"), strict=True):
        yield Scatter(
            name=line.name, x=line.x, y=list(bound), mode="lines", line={"width": 0}, hoverinfo="skip",
            showlegend=False, legendgroup=line.name, fill=fill, fillcolor=f"rgba({red},{green},{blue},0.18)",
        )  # fmt: skip


def line_figure(
    traces: Sequence[Scatter], x_label: str, y_label: str, level: tuple[float, str] | None = None
) -> Figure:
    """Lines over a common axis; ``level`` is a height to mark and its name."""
    shown = sum(trace.showlegend is not False for trace in traces)
    figure = _figure(traces, x_label, y_label, HEIGHT + 22 * (shown // 3))
    if level is not None:
        _mark(figure, *level)
    return figure


def bars(
    name: str, labels: Sequence[str], heights: Sequence[Number], colour: str | list[str],
    interval: Sequence[tuple[Number, Number]] = (), *, flat: bool = False,
) -> Bar:  # fmt: skip
    """One colour of a bar chart with optional whiskers; ``flat`` bars lie on their side."""
    length, place = ("x", "y") if flat else ("y", "x")
    trace = Bar(
        {length: list(heights), place: list(labels)}, name=name, marker={"color": colour},
        orientation="h" if flat else "v",
        hovertemplate=f"%{{{place}}}: %{{{length}:.3g}}<extra>%{{fullData.name}}</extra>",
    )  # fmt: skip
    if interval:
        lows, highs = zip(*interval, strict=True)
        trace[f"error_{length}"] = {
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": "#777777",
            "array": [_difference(high, height) for high, height in zip(highs, heights, strict=True)],
            "arrayminus": [_difference(height, low) for low, height in zip(lows, heights, strict=True)],
        }  # fmt: skip
    return trace


def _difference(larger: Number, smaller: Number) -> Number:
    return None if larger is None or smaller is None else larger - smaller


def bar_figure(
    traces: Sequence[Bar], x_label: str, y_label: str, *, stacked: bool = False, level: tuple[float, str] | None = None
) -> Figure:
    """Bars over names, side by side or ``stacked``; ``level`` is a height to mark and its name."""
    flat = traces[0].orientation == "h"
    labels = list(traces[0].y if flat else traces[0].x)
    figure = _figure(traces, x_label, y_label, 90 + 24 * len(labels) if flat else HEIGHT)
    figure.update_layout(barmode="stack" if stacked else "group", bargap=0.25, showlegend=len(traces) > 1)
    (figure.update_yaxes if flat else figure.update_xaxes)(type="category", categoryorder="array", categoryarray=labels)
    if stacked:
        figure.update_layout(legend_traceorder="normal")
    if level is not None:
        _mark(figure, *level)
    return figure


def heat_figure(
    columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[Number]], unit: str,
    labels: tuple[str, str] = ("", ""), *, digits: int = 1, scale: tuple[str, str] = LARGER_IS_BETTER,
) -> Figure:  # fmt: skip
    """A number for each pair, ``cells[row][column]``, with ``digits`` after the point; ``labels`` name the axes."""
    trace = Heatmap(
        x=list(columns), y=list(rows), z=[list(row) for row in cells], colorscale=list(scale), showscale=False,
        xgap=2, ygap=2, hoverongaps=False, texttemplate=f"%{{z:.{digits}f}}", textfont={"size": 12, "color": DARK},
        hovertemplate=f"%{{x}}, %{{y}}: %{{z:.{digits + 1}f}} {unit}<extra></extra>",
    )  # fmt: skip
    figure = _figure([trace], *labels, 110 + 34 * len(rows))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure


def _figure(traces: Sequence[Any], x_label: str, y_label: str, height: int) -> Figure:
    """A figure in the neutral layout that all charts share."""
    axis = {"automargin": True, "gridcolor": GRID, "zeroline": False, "linecolor": GRID, "fixedrange": False}
    layout = {
        "template": "none", "height": height, "margin": {"l": 8, "r": 12, "t": 28, "b": 8}, "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.28, "yanchor": "top", "bgcolor": CLEAR},
        "xaxis": {**axis, "title": {"text": x_label, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y_label, "standoff": 8}},
    }  # fmt: skip
    return Figure(list(traces), layout)


def _mark(figure: Figure, height: float, name: str) -> None:
    """Draw a thin dashed line at a height, with its name at the left end."""
    figure.add_hline(
        height, line={"color": GREY, "width": 1.2, "dash": "dash"}, annotation_text=name,
        annotation_position="top left", annotation_font_size=11,
    )  # fmt: skip


def chart_table(figure: Figure) -> tuple[list[str], list[tuple[str, ...]]]:
    """Every number that a figure draws: the headings of the columns and the rows, whose first column holds names."""
    x_label, y_label = (axis.title.text for axis in (figure.layout.xaxis, figure.layout.yaxis))
    kind = figure.data[0].type if figure.data else "scatter"
    if kind == "bar":
        flat = figure.data[0].orientation == "h"
        names, heights = zip(*((t.y, t.x) if flat else (t.x, t.y) for t in figure.data), strict=True)
        columns = [map(_text, column) for column in heights]
        header = [y_label if flat else x_label, *(trace.name for trace in figure.data)]
        return header, list(zip(names[0], *columns, strict=True))
    if kind == "heatmap":
        (trace,) = figure.data
        rows = [(name, *map(_text, cells)) for name, cells in zip(trace.y, trace.z, strict=True)]
        return [y_label, *trace.x], rows
    return ["line", x_label, y_label, "from", "to"], list(_line_rows(figure))


def _line_rows(figure: Figure) -> Iterator[tuple[str, ...]]:
    for trace in figure.data:
        if trace.hoverinfo == "skip":  # an edge of a band, whose numbers stand beside its line's
            continue
        intervals = trace.customdata if trace.customdata is not None else [(None, None)] * len(trace.x)
        for x, y, (low, high) in zip(trace.x, trace.y, intervals, strict=True):
            yield trace.name, _text(x), _text(y), _text(low), _text(high)


def _text(value: Number) -> str:
    return "–" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
