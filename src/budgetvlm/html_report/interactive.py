"""Charts as Plotly figures, as JSON for the page.

Titles stand in the page, not in the figure, so that they wrap on a phone. Text and grid have a neutral colour here; the
page's style sheet gives them those of its colour scheme.
"""

from __future__ import annotations

import json
from typing import Any

from budgetvlm._extras import require
from budgetvlm.html_report.blocks import BarChart, Bars, Chart, HeatMap, LineChart, Series
from budgetvlm.html_report.looks import DARK, HEAT

INK, GRID, CLEAR = "#444444", "rgba(128,128,128,0.25)", "rgba(0,0,0,0)"
HEIGHT = 360


def library() -> str:
    """Plotly's JavaScript, to be put into the page once.

    Raises:
        ConfigError: it is not installed.
    """
    require("plotly", "report", "page with plots")
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def figure(chart: Chart) -> dict[str, Any]:
    """Data and layout, checked by Plotly; JSON-able. Raises ValueError for what Plotly does not know."""
    from plotly.graph_objects import Figure

    made = {LineChart: _lines, BarChart: _bars, HeatMap: _heat}[type(chart)](chart)  # type: ignore[operator]
    document: dict[str, Any] = json.loads(Figure(made).to_json())
    document["layout"].pop("template", None)
    return document


def _layout(chart: Chart, height: int, **more: Any) -> dict[str, Any]:
    axis = {
        "automargin": True, "gridcolor": GRID, "zeroline": False, "linecolor": GRID, "fixedrange": False,
        "title": {"standoff": 8},
    }  # fmt: skip
    x, y = more.pop("xaxis", {}), more.pop("yaxis", {})
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.28, "yanchor": "top", "bgcolor": CLEAR},
        "xaxis": {**axis, "title": {"text": chart.x_label, "standoff": 8}, **x},
        "yaxis": {**axis, "title": {"text": chart.y_label, "standoff": 8}, **y},
        **more,
    }


def _lines(chart: LineChart) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, series in enumerate(chart.series):
        if series.low:
            traces += _band(series, f"g{number}")
        traces.append(_line(series, f"g{number}"))
    layout = _layout(chart, HEIGHT + 22 * (len(chart.series) // 3), **_level(chart.level, chart.level_name))
    return {"data": traces, "layout": layout}


def _line(series: Series, group: str) -> dict[str, Any]:
    mode = "markers" if not series.look.line else "lines+markers" if series.look.marker else "lines"
    note = "<br>%{text}" if series.notes else ""
    trace: dict[str, Any] = {
        "type": "scatter", "name": series.name, "x": series.x, "y": series.y, "mode": mode, "legendgroup": group,
        "hovertemplate": f"%{{x:.4g}}, %{{y:.4g}}{note}<extra>%{{fullData.name}}</extra>",
        "line": {"color": series.look.colour, "width": series.look.width, "dash": series.look.line or "solid"},
        "marker": {"color": series.look.colour, "size": 8 if series.look.line else 6,
                   "symbol": series.look.marker or "circle"},
    }  # fmt: skip
    return trace | ({"text": series.notes} if series.notes else {})


def _band(series: Series, group: str) -> list[dict[str, Any]]:
    """Two lines without ink, filled between."""
    common = {
        "type": "scatter", "x": series.x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip",
        "showlegend": False, "legendgroup": group, "name": series.name,
    }  # fmt: skip
    fill = {"fill": "tonexty", "fillcolor": _faint(series.look.colour)}
    return [{**common, "y": series.low}, {**common, "y": series.high, **fill}]


def _faint(colour: str, share: float = 0.18) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def _level(level: float | None, name: str, *, flat: bool = False) -> dict[str, Any]:
    """A thin line at a height, with its name."""
    if level is None:
        return {}
    ends = {"x0": level, "x1": level, "yref": "paper", "y0": 0, "y1": 1} if flat else {
        "y0": level, "y1": level, "xref": "paper", "x0": 0, "x1": 1
    }  # fmt: skip
    note = {"text": name, "showarrow": False, "font": {"size": 11}, "yanchor": "bottom", "xanchor": "left"}
    where = {"x": level, "yref": "paper", "y": 1} if flat else {"y": level, "xref": "paper", "x": 0}
    line = {"type": "line", "line": {"color": "#8a8a8a", "width": 1.2, "dash": "dash"}, **ends}
    return {"shapes": [line], "annotations": [{**note, **where}]}


def _bars(chart: BarChart) -> dict[str, Any]:
    traces = [_bar(chart, bars) for bars in chart.series]
    names = {"type": "category", "categoryorder": "array", "categoryarray": chart.names}
    height = 90 + 24 * len(chart.names) if chart.flat else HEIGHT
    layout = _layout(
        chart,
        height,
        barmode="stack" if chart.stacked else "group",
        bargap=0.25,
        showlegend=len(chart.series) > 1,
        **{("yaxis" if chart.flat else "xaxis"): names},
        **_level(chart.level, chart.level_name, flat=chart.flat),
    )
    if chart.stacked:
        layout["legend"]["traceorder"] = "normal"
    return {"data": traces, "layout": layout}


def _bar(chart: BarChart, bars: Bars) -> dict[str, Any]:
    long, short = ("x", "y") if chart.flat else ("y", "x")
    trace: dict[str, Any] = {
        "type": "bar", "name": bars.name, long: bars.heights, short: chart.names, "marker": {"color": bars.colour},
        "orientation": "h" if chart.flat else "v",
        "hovertemplate": f"%{{{short}}}: %{{{long}:.3g}}<extra>%{{fullData.name}}</extra>",
    }  # fmt: skip
    if bars.low:
        up = [None if h is None or v is None else h - v for v, h in zip(bars.heights, bars.high, strict=True)]
        down = [None if low is None or v is None else v - low for v, low in zip(bars.heights, bars.low, strict=True)]
        trace[f"error_{long}"] = {
            "type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 3,
            "color": "#777777",
        }  # fmt: skip
    return trace


def _heat(chart: HeatMap) -> dict[str, Any]:
    scale = [[end, colour] for end, colour in enumerate(HEAT[chart.upside])]
    trace = {
        "type": "heatmap", "x": chart.columns, "y": chart.rows, "z": chart.cells, "colorscale": scale,
        "showscale": False, "xgap": 2, "ygap": 2, "hoverongaps": False,
        "texttemplate": f"%{{z:.{chart.digits}f}}", "textfont": {"size": 12, "color": DARK},
        "hovertemplate": f"%{{x}}, %{{y}}: %{{z:.{chart.digits + 1}f}} {chart.unit}<extra></extra>",
    }  # fmt: skip
    category = {"type": "category", "showgrid": False}
    rows = {**category, "autorange": "reversed"}
    return {"data": [trace], "layout": _layout(chart, 110 + 34 * len(chart.rows), xaxis=category, yaxis=rows)}
