"""Knob coupling: accuracy and latency for every pair of knobs, all others at their largest value."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from budgetvlm.html_report.blocks import Block, DataTable, HeatMap, LineChart, Row, Section, Series, Text
from budgetvlm.html_report.looks import BLUE, ORANGE, Look
from budgetvlm.html_report.report_data import Material
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import column_means
from budgetvlm.table import ProfileTable


def coupling(material: Material) -> Section:
    """Heat maps of pairs; lines for a single knob; a sentence for a single setting."""
    table = _rows(material)
    accuracy, latency = 100 * column_means(table.accuracy), column_means(table.latency_ms)
    space = table.knob_space
    moving = [name for name in space.names if len(space.values(name)) > 1]
    title = "How the knobs act together"
    if not moving:
        return Section("coupling", title, (Text("There is a single setting, so there is nothing to turn."),))
    if len(moving) == 1:
        return Section("coupling", title, (Row(_one_knob(space, moving[0], accuracy, latency)),))
    blocks: list[Block] = []
    for first, second in combinations(moving, 2):
        blocks.append(
            Row(
                (
                    _map(space, first, second, accuracy, "accuracy", "%", upside=True),
                    _map(space, first, second, latency, "latency", "ms", upside=False),
                )
            )
        )
    blocks.append(_interactions(space, moving, accuracy, latency))
    blocks.append(
        Text(
            "The other knobs are at their largest values. Knobs couple where turning down both costs another accuracy "
            "than the two losses added up (positive: the second loss is partly the same samples), and where the time "
            "of both is not the product of the two shares."
        )
    )
    return Section("coupling", title, tuple(blocks))


def _rows(material: Material) -> ProfileTable:
    """The evaluated split."""
    table, split = material.table, material.evaluation.split
    return table.subset(split) if table.split is not None and split in table.split else table


def _cells(space: KnobSpace, first: str, second: str, values: np.ndarray) -> tuple[tuple[float | None, ...], ...]:
    """Rows: values of the second knob; columns: of the first."""
    full = dict(space.full)
    index = [[space.index({**full, first: x, second: y}) for x in space.values(first)] for y in space.values(second)]
    return tuple(tuple(None if np.isnan(values[k]) else float(values[k]) for k in row) for row in index)


def _map(
    space: KnobSpace, first: str, second: str, values: np.ndarray, what: str, unit: str, *, upside: bool
) -> HeatMap:
    title = f"{what.capitalize()} ({unit}): {first} × {second}"
    return HeatMap(
        f"coupling_{what}_{first}_{second}", title, "others at their largest",
        first, second, tuple(f"{v:g}" for v in space.values(first)), tuple(f"{v:g}" for v in space.values(second)),
        _cells(space, first, second, values), unit, 1, upside=upside,
    )  # fmt: skip


def _one_knob(space: KnobSpace, name: str, accuracy: np.ndarray, latency: np.ndarray) -> tuple[LineChart, ...]:
    full, values = dict(space.full), space.values(name)
    columns = [space.index({**full, name: value}) for value in values]
    x = tuple(float(v) for v in values)

    def chart(what: str, unit: str, of: np.ndarray, colour: str) -> LineChart:
        y = tuple(None if np.isnan(of[k]) else float(of[k]) for k in columns)
        series = Series(what, x, y, Look(colour, "solid", 3.0, "circle"))
        return LineChart(f"coupling_{what}", f"{what.capitalize()} by {name}", "", name, f"{what} ({unit})", (series,))

    return chart("accuracy", "%", accuracy, ORANGE), chart("latency", "ms", latency, BLUE)


def _interactions(space: KnobSpace, moving: list[str], accuracy: np.ndarray, latency: np.ndarray) -> DataTable:
    """Each pair at its smallest values: losses one by one, added up, and together."""
    full = dict(space.full)
    low = {name: space.values(name)[0] for name in moving}
    rows = []
    for pair in combinations(moving, 2):
        one, other, both = (
            space.index({**full, **{name: low[name] for name in names}}) for names in ((pair[0],), (pair[1],), pair)
        )
        loss = [float(accuracy[k] - accuracy[-1]) for k in (one, other, both)]
        time = [float(latency[k] / latency[-1]) for k in (one, other, both)]
        rows.append(
            (
                f"{pair[0]}, {pair[1]}",
                *(_signed(value) for value in (*loss, loss[2] - loss[0] - loss[1])),
                *(_share(value) for value in (time[2], time[0] * time[1])),
            )
        )
    header = ("pair, at its smallest values", "first alone (points)", "second alone", "both", "both − sum",
              "time of both (× full)", "product of each")  # fmt: skip
    return DataTable("Coupling in figures", header, tuple(rows))


def _signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:+.1f}"


def _share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
