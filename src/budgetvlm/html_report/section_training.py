"""Learning curves, and what deciding costs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from budgetvlm.html_report.blocks import (
    BarChart,
    Bars,
    Block,
    DataTable,
    LineChart,
    Row,
    Section,
    Series,
    Text,
    milliseconds,
    percent,
)
from budgetvlm.html_report.looks import ORANGE, WHEEL, Look
from budgetvlm.html_report.report_data import Material
from budgetvlm.html_report.saved_results import Run
from budgetvlm.policies.setting_means import column_means

CURVES = {  # field of metrics.json -> title, axis, factor
    "reward_mean": ("Validation reward", "reward", 1.0),
    "accuracy_mean": ("Validation accuracy", "accuracy (%)", 100.0),
    "violation_rate": ("Validation requests over the budget", "late (%)", 100.0),
    "loss": ("Training loss", "loss", 1.0),
}
BINS = 30


def learning(material: Material) -> Section:
    """Curves by epoch, a line a run, or a member of an ensemble."""
    title = "Learning curves"
    runs = tuple(one for run in material.runs for one in (run.members or (run,)))
    known = [(number, run) for number, run in enumerate(runs) if len(run.history) > 1]
    if not known:
        text = "No training history lies beside the controllers (metrics.json of `budgetvlm train`)."
        return Section("learning", title, (Text(text if runs else "No controller was given."),))
    charts = [_curve(field, known) for field in CURVES]
    drawn = [chart for chart in charts if chart.series]
    blocks: list[Block] = [Row(tuple(drawn[i : i + 2])) for i in range(0, len(drawn), 2)]
    blocks.append(_runs_table(runs))
    for text in dict.fromkeys(run.maximised for run in runs if run.maximised):
        blocks.append(Text(text[0].upper() + text[1:] + "."))
    return Section("learning", title, tuple(blocks))


def _curve(field: str, runs: list[tuple[int, Run]]) -> LineChart:
    title, axis, factor = CURVES[field]
    series = []
    for number, run in runs:
        points = [(e["epoch"], e[field]) for e in run.history if isinstance(e.get(field), float | int)]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            look = Look(WHEEL[number % len(WHEEL)], "solid", 2.0)
            series.append(Series(run.name, tuple(map(float, x)), tuple(factor * v for v in y), look))
    note = "epoch 0: what training starts from" if field != "loss" else ""
    return LineChart(f"learning_{field}", title, note, "epoch", axis, tuple(series))


def _runs_table(runs: tuple[Run, ...]) -> DataTable:
    rows = []
    for run in runs:
        best = next((e for e in run.history if e["epoch"] == run.best_epoch), {})
        rows.append(
            (
                run.name,
                "–" if run.best_epoch is None else str(run.best_epoch),
                str(run.history[-1]["epoch"]) if run.history else "–",
                percent(best.get("accuracy_mean")),
                "–" if best.get("latency_mean") is None else f"{best['latency_mean']:.1f}",
                percent(best.get("violation_rate")),
                percent(best.get("room_closed"), 0),
                str(run.training.get("seed", "–")),
            )
        )
    header = ("controller", "best epoch", "epochs", "accuracy", "mean ms", "late", "room closed", "seed")
    return DataTable("Best epoch of each run, on the validation split", header, tuple(rows))


def overhead(material: Material) -> Section:
    """What features, controller and guard take of a request."""
    blocks: list[Block] = []
    latency = column_means(material.table.latency_ms)
    cheapest, full = float(np.nanmin(latency)), float(latency[-1])
    rows = [
        (f"{run.name} (calibration, {run.calibrated_on} requests)", milliseconds(run.other_ms),
         percent(run.other_ms / cheapest, 2), percent(run.other_ms / full, 2))
        for run in material.runs if run.other_ms and run.calibrated_on
    ]  # fmt: skip
    if material.live is not None:
        rows += [
            (f"{name} (live, median)", milliseconds(s["all"]["controller_ms"]),
             percent(s["all"]["controller_ms"] / cheapest, 2), percent(s["all"]["controller_ms"] / full, 2))
            for name, s in material.live["systems"].items()
        ]  # fmt: skip
    if rows:
        header = ("features, controller and guard", "time", "of the cheapest setting's", "of the full setting's")
        blocks.append(DataTable("Overhead of a request", header, tuple(rows)))
    chart = _histogram(material.live) if material.live is not None else None
    if chart is not None:
        blocks.append(chart)
    if not rows:
        blocks.append(
            Text(
                "Not timed here: neither was the guard calibrated (`budgetvlm calibrate`) nor a live run given "
                "(--live live.json of `budgetvlm evaluate --live`)."
            )
        )
    else:
        blocks.append(
            Text(
                "The overview crop that the controller looks at is encoded once and handed on to the model, so its "
                "time is not counted as overhead; every latency on the real clock includes all of it."
            )
        )
    return Section("overhead", "What deciding costs", tuple(blocks))


def _histogram(live: Mapping[str, Any]) -> BarChart | None:
    """Controller times of the single requests, up to their 99th percentile."""
    times = [float(r["controller_ms"]) for r in live.get("records", ()) if r.get("system") == "guarded"]
    if len(times) < BINS:
        return None
    counts, edges = np.histogram(times, bins=BINS, range=(0.0, float(np.quantile(times, 0.99))))
    names = tuple(f"{(a + b) / 2:.2f}" for a, b in pairwise(edges))
    bars = Bars("requests", tuple(float(100 * c / len(times)) for c in counts), ORANGE)
    note = f"p50 {np.median(times):.2f} ms, p99 {np.quantile(times, 0.99):.2f} ms; beyond p99 not drawn"
    return BarChart(
        "overhead_histogram", "Features, controller and guard in each live request", note, "ms", "requests (%)", names,
        (bars,),
    )  # fmt: skip
