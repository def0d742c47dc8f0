"""The picture of a comparison: every policy's gain over the lookup table with its interval, and its latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetvlm.comparison.comparison_records import CompareReport, ComparisonRow
from budgetvlm.evaluation.picture_canvas import INK, clean_axes, new_canvas, write_canvas
from budgetvlm.evaluation.policy_styles import ROLE_COLOURS
from budgetvlm.evaluation.records import Estimate


def plot_comparison(report: CompareReport, path: str | Path) -> None:
    """Draw gains on the left and latencies on the right into a PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [row for row in report.section("policies") if row.room is not None][::-1]
    canvas = new_canvas(14.0, 2.2 + 0.3 * len(rows), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    for axes in (left, right):
        clean_axes(axes, "x")
    for place, row in enumerate(rows):
        if row.room is not None:
            _draw_interval(left, place, row, row.room.accuracy_gain, scale=100)
        if row.first_latency is not None:
            _draw_interval(right, place, row, row.first_latency)
    left.axvline(0, color=INK, linewidth=1)
    left.set_yticks(range(len(rows)), [row.full_name for row in rows])
    shares = ", ".join(f"{share:g}" for share in report.room_budget_shares)
    left.set_xlabel(f"points of accuracy over the lookup table,\nmean over the budgets {shares} x full")
    share = 100 * report.options["evaluation"]["accuracy_shares"][0]
    right.set_xlabel(f"mean latency (ms) at {share:g}% of the full accuracy, without a budget")
    right.set_xlim(left=0)
    canvas.suptitle(f"{report.counts['evaluated_samples']} {report.split} samples, 95% intervals over images", x=0.5)
    write_canvas(canvas, path)


def _draw_interval(axes: Any, place: int, row: ComparisonRow, found: Estimate, scale: float = 1) -> None:
    """Draw a value between its bounds; the point is hollow where a policy is late more often than is allowed."""
    low, value, high = scale * found.low, scale * found.value, scale * found.high
    colour = ROLE_COLOURS[row.role]
    axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.6)
    filled = colour if row.competes or row.role == "bound" else "white"
    axes.plot([value], [place], "o", color=colour, markerfacecolor=filled, markersize=6)
