"""The picture of a comparison: every policy's gain over the lookup table with its interval, and its latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetvlm._io import atomic_path
from budgetvlm.comparison.comparison_records import CompareReport, ComparisonRow

COLOURS = {"controller": "#D55E00", "variant": "#E69F00", "baseline": "#0072B2", "bound": "#8a8a8a"}
INK, DPI = "#222222", 150


def plot_comparison(report: CompareReport, path: str | Path) -> None:
    """Draw both faces into a PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report.section("policies") if row.room is not None][::-1]
    figure = Figure(figsize=(14.0, 2.2 + 0.3 * len(rows)), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        _gain(left, place, row)
        _latency(right, place, row)
    left.axvline(0, color=INK, linewidth=1)
    left.set_yticks(range(len(rows)), [row.name + (" (bound)" if row.role == "bound" else "") for row in rows])
    shares = ", ".join(f"{share:g}" for share in report.room_budget_shares)
    left.set_xlabel(f"points of accuracy over the lookup table,\nmean over the budgets {shares} x full")
    share = 100 * report.options["evaluation"]["accuracy_shares"][0]
    right.set_xlabel(f"mean latency (ms) at {share:g}% of the full accuracy, without a budget")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(True, axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.counts['evaluated_samples']} {report.split} samples, 95% intervals over images", x=0.5)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _gain(axes: Any, place: int, row: ComparisonRow) -> None:
    assert row.room is not None
    gain = row.room.accuracy_gain
    _interval(axes, place, row, 100 * gain.value, 100 * gain.low, 100 * gain.high)


def _latency(axes: Any, place: int, row: ComparisonRow) -> None:
    found = row.at_accuracy[0].latency_ms if row.at_accuracy else None
    if found is not None:
        _interval(axes, place, row, found.value, found.low, found.high)


def _interval(axes: Any, place: int, row: ComparisonRow, value: float, low: float, high: float) -> None:
    colour = COLOURS[row.role]
    axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.6)
    filled = colour if row.competes or row.role == "bound" else "white"
    axes.plot([value], [place], "o", color=colour, markerfacecolor=filled, markersize=6)
