"""Knob coupling: accuracy and latency for every pair of knobs, with all others at their largest value."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from budgetvlm._io import time_unit
from budgetvlm.evaluation.policy_styles import BLUE, ORANGE, PolicyStyle
from budgetvlm.html_report.report_chart import (
    LARGER_IS_BETTER,
    SMALLER_IS_BETTER,
    Number,
    ReportChart,
    ReportSection,
    curve,
    heat_figure,
    line_figure,
)
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import column_means

# what -> colour of a line, colours of a heat map
MEASURES = {"accuracy": (ORANGE, LARGER_IS_BETTER), "latency": (BLUE, SMALLER_IS_BETTER)}


def coupling(inputs: ReportInputs) -> ReportSection:
    """Heat maps of pairs of knobs, or lines of a single knob."""
    table = inputs.table.subset(inputs.evaluation.split)
    latency_ms = column_means(table.latency_ms)
    unit, scale = time_unit(float(np.nanmax(latency_ms)))
    means, units = {"accuracy": 100 * column_means(table.accuracy), "latency": scale * latency_ms}, ("%", unit)
    space = table.knob_space
    moving = [name for name in space.names if len(space.values(name)) > 1]
    pairs = list(combinations(moving, 2))
    if len(moving) == 1:
        charts = [tuple(_lines(space, moving[0], *of, means[of[0]]) for of in zip(MEASURES, units, strict=True))]
    else:
        charts = [
            tuple(_map(space, pair, *of, means[of[0]]) for of in zip(MEASURES, units, strict=True)) for pair in pairs
        ]
    values = {"moving": moving, "interactions": list(_interactions(space, pairs, **means))}
    return ReportSection("coupling", "How the knobs act together", tuple(charts), values)


def _known(value: float) -> Number:
    return None if np.isnan(value) else float(value)


def _map(space: KnobSpace, pair: tuple[str, str], what: str, unit: str, means: np.ndarray) -> ReportChart:
    """Columns: values of the first knob; rows: of the second."""
    _, scale = MEASURES[what]
    columns, rows = (space.values(name) for name in pair)
    full = dict(space.full)
    cells = [[_known(means[space.index({**full, pair[0]: x, pair[1]: y})]) for x in columns] for y in rows]
    digits = 2 if unit == "s" else 1
    figure = heat_figure(
        [f"{v:g}" for v in columns], [f"{v:g}" for v in rows], cells, unit, pair, digits=digits, scale=scale
    )
    title = f"{what.capitalize()} ({unit}): {pair[0]} × {pair[1]}"
    return ReportChart(
        f"coupling_{what}_{pair[0]}_{pair[1]}", title, figure, "others at their largest" if len(space.names) > 2 else ""
    )


def _lines(space: KnobSpace, knob: str, what: str, unit: str, means: np.ndarray) -> ReportChart:
    colour, _ = MEASURES[what]
    full, values = dict(space.full), space.values(knob)
    y = [_known(means[space.index({**full, knob: value})]) for value in values]
    traces = curve(what, [float(v) for v in values], y, PolicyStyle(colour, "solid", 3.0, "circle"))
    figure = line_figure(traces, knob, f"{what} ({unit})")
    return ReportChart(f"coupling_{what}", f"{what.capitalize()} by {knob}", figure)


def _interactions(
    space: KnobSpace, pairs: list[tuple[str, str]], accuracy: np.ndarray, latency: np.ndarray
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Each pair at its smallest values: accuracy lost in points, and time as a share of the full setting's.

    The losses are of the first knob, the second, both, and both less the sum of each; the shares are of both and the
    product of each.
    """
    full = dict(space.full)
    for first, second in pairs:
        low = [{name: space.values(name)[0]} for name in (first, second)]
        columns = [space.index(full | change) for change in (low[0], low[1], low[0] | low[1])]
        if np.isnan(accuracy[[*columns, -1]]).any() or np.isnan(latency[[*columns, -1]]).any():
            continue  # settings that one of several models lacks
        loss = accuracy[columns] - accuracy[-1]
        time = latency[columns] / latency[-1]
        losses = [*loss.tolist(), float(loss[2] - loss[0] - loss[1])]
        yield f"{first}, {second}", losses, [float(time[2]), float(time[0] * time[1])]
