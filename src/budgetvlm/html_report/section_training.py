"""Learning curves, and what deciding costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from budgetvlm._io import time_text
from budgetvlm.evaluation.policy_styles import COLOUR_CYCLE, ORANGE, PolicyStyle
from budgetvlm.html_report.report_chart import ReportChart, ReportSection, Scatter, bar_figure, bars, curve, line_figure
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.html_report.saved_results import SavedRun
from budgetvlm.policies.setting_means import column_means

CURVES = {  # field of metrics.json -> title, axis, factor
    "reward_mean": ("Validation reward", "reward", 1.0),
    "accuracy_mean": ("Validation accuracy", "accuracy (%)", 100.0),
    "violation_rate": ("Validation requests over the budget", "late (%)", 100.0),
    "loss": ("Training loss", "loss", 1.0),
}
BINS = 30


def learning(inputs: ReportInputs) -> ReportSection:
    """Curves by epoch, one line for each run or for each member of an ensemble."""
    runs = [one for run in inputs.runs for one in (run.members or (run,))]
    found = [_curves(field, runs) for field in CURVES]
    charts = [chart for chart in found if chart is not None]
    rows = tuple(tuple(charts[i : i + 2]) for i in range(0, len(charts), 2))
    goals = list(dict.fromkeys(run.maximised for run in runs if run.maximised))
    values = {"runs": [(run, _best_epoch(run)) for run in runs], "goals": goals}
    return ReportSection("learning", "Learning curves", rows, values)


def _curves(field: str, runs: list[SavedRun]) -> ReportChart | None:
    """The chart of one field; None where no run has two epochs with it."""
    title, axis, factor = CURVES[field]
    traces: list[Scatter] = []
    for number, run in enumerate(runs):
        points = [(e["epoch"], factor * e[field]) for e in run.history if isinstance(e.get(field), float | int)]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            traces += curve(run.name, x, y, PolicyStyle(COLOUR_CYCLE[number % len(COLOUR_CYCLE)]))
    note = "epoch 0: what training starts from" if field != "loss" else ""
    return ReportChart(f"learning_{field}", title, line_figure(traces, "epoch", axis), note) if traces else None


def _best_epoch(run: SavedRun) -> Mapping[str, Any]:
    return next((e for e in run.history if e["epoch"] == run.best_epoch), {})


def overhead(inputs: ReportInputs) -> ReportSection:
    """What features, controller and guard add to a request."""
    latency = column_means(inputs.table.latency_ms)
    rows = list(_overhead_rows(inputs))
    chart = _histogram(inputs.live) if inputs.live is not None else None
    full_ms = float(latency[np.isfinite(latency)][-1])
    values = {"overheads": rows, "cheapest_ms": float(np.nanmin(latency)), "full_ms": full_ms}
    return ReportSection("overhead", "What deciding costs", ((chart,),) if chart is not None else (), values)


def _overhead_rows(inputs: ReportInputs) -> Iterator[tuple[str, float]]:
    """Where the overhead was timed, and how many ms it took."""
    for run in inputs.runs:
        if run.other_ms and run.calibrated_on:
            yield f"{run.name} (calibration, {run.calibrated_on} requests)", run.other_ms
    if inputs.live is not None:
        for name, system in inputs.live["systems"].items():
            yield f"{name} (live, median)", system["all"]["controller_ms"]


def _histogram(live: Mapping[str, Any]) -> ReportChart | None:
    """Controller times of single requests up to their 99th percentile; None for too few requests."""
    times = [float(r["controller_ms"]) for r in live.get("records", ()) if r.get("system") == "guarded"]
    if len(times) < BINS:
        return None
    p50, p99 = np.quantile(times, (0.5, 0.99))
    counts, edges = np.histogram(times, bins=BINS, range=(0.0, float(p99)))
    names = [f"{(a + b) / 2:.2f}" for a, b in pairwise(edges)]
    figure = bar_figure([bars("requests", names, (100 * counts / len(times)).tolist(), ORANGE)], "ms", "requests (%)")
    note = f"p50 {time_text(p50)}, p99 {time_text(p99)}; beyond p99 not drawn"
    return ReportChart("overhead_histogram", "Features, controller and guard in each live request", figure, note)
