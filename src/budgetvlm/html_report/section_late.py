"""Requests over their budget, by budget and by group: on the table, and on the real clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from budgetvlm._io import time_text, time_unit
from budgetvlm.evaluation.labels import natural
from budgetvlm.evaluation.policy_styles import GREY, ORANGE, PolicyStyle
from budgetvlm.evaluation.records import EvaluationReport
from budgetvlm.html_report.controller_choices import ControllerChoices, late_share, mean_accuracy
from budgetvlm.html_report.report_chart import (
    SMALLER_IS_BETTER,
    Bar,
    Number,
    ReportChart,
    ReportSection,
    Scatter,
    bar_figure,
    bars,
    curve,
    heat_figure,
    line_figure,
)
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.html_report.result_charts import budget_curve

DRAWN = ("controller", "predict + argmax", "lookup table")
SYSTEM_COLOURS = {"guarded": ORANGE, "unguarded": GREY}
PHASES = {"before": "before the load", "loaded": "under load", "after": "after the load"}
SMALL = 30  # timed samples below which a group's share says little
WHISKERS = "whiskers: 95% Wilson intervals"


def late(inputs: ReportInputs) -> ReportSection:
    """Late requests of the evaluation, of the controllers by group, and of the live run."""
    table: list[tuple[ReportChart, ...]] = [(_by_budget(inputs.evaluation),)]
    if inputs.choices is not None:
        table.append(_by_group(inputs.choices))
    live = _live_charts(inputs.live) if inputs.live is not None else []
    values = {"live": inputs.live, "table_rows": len(table), "phases": PHASES}
    return ReportSection("late", "Requests over their budget", (*table, *live), values)


def _by_budget(evaluation: EvaluationReport) -> ReportChart:
    traces: list[Scatter] = []
    for result in (evaluation.policy(name) for name in DRAWN):
        if result is not None and result.at_budget:
            traces += budget_curve(result, [a.violation_rate for a in result.at_budget])
    timed = evaluation.counts.get("evaluated_timed")
    unit, _ = time_unit(evaluation.policies[0].at_budget[-1].budget_ms)
    figure = line_figure(traces, f"budget ({unit})", "requests over the budget (%)")
    note = f"over {timed} timed samples" if timed else "predicted latencies"
    return ReportChart("late_by_budget", "Late by budget", figure, note)


def _by_group(choices: ControllerChoices) -> tuple[ReportChart, ReportChart]:
    """Late requests and accuracy of each group at each budget."""
    everything = {"all": np.ones(choices.table.num_samples, dtype=bool)} | choices.groups
    timed = {name: int((rows & choices.timed).sum()) for name, rows in everything.items()}
    few = any(0 < count < SMALL for count in timed.values())
    budgets = [time_text(b) for b in choices.budgets_ms]
    late_figure = heat_figure(
        budgets,
        [f"{name} ({count})" for name, count in timed.items() if count],
        [_percents(late_share(choices, everything[name])) for name, count in timed.items() if count],
        "%",
        ("budget", ""),
        scale=SMALLER_IS_BETTER,
    )
    accuracy_figure = heat_figure(
        budgets,
        [f"{name} ({int(rows.sum())})" for name, rows in everything.items()],
        [_percents(mean_accuracy(choices, rows)) for rows in everything.values()],
        "%",
        ("budget", ""),
        digits=0,
    )
    note = f"timed samples in brackets{f'; fewer than {SMALL} say little' if few else ''}"
    return (
        ReportChart("late_by_group", "The controller's late requests by group (%)", late_figure, note),
        ReportChart("accuracy_by_group", "The controller's accuracy by group (%)", accuracy_figure,
                    "samples in brackets"),
    )  # fmt: skip


def _percents(shares: list[float] | list[float | None]) -> list[Number]:
    return [None if share is None else 100 * share for share in shares]


def _live_charts(live: Mapping[str, Any]) -> list[tuple[ReportChart, ...]]:
    """Late requests on the real clock by budget, over time and by group, for each system; two charts a row."""
    promised = (100 * float(live["alpha"]), "promised")
    charts = [_live_bars(live, None, promised), _over_time(live, promised)]
    charts += [
        _live_bars(live, label, promised)
        for label, parts in live["systems"]["guarded"]["by_group"].items()
        if sum(bool(name) for name in parts) > 1
    ]
    return [tuple(charts[i : i + 2]) for i in range(0, len(charts), 2)]


def _live_bars(live: Mapping[str, Any], label: str | None, promised: tuple[float, str]) -> ReportChart:
    """Late requests by the values of a label, or by budget for None."""
    parts = {
        system: found["by_budget"] if label is None else found["by_group"].get(label, {})
        for system, found in live["systems"].items()
    }
    names = list(parts["guarded"]) if label is None else sorted(filter(None, parts["guarded"]), key=natural)
    traces = [_live_trace(system, found, names) for system, found in parts.items()]
    figure = bar_figure(traces, label or "budget (× full)", "late (%)", level=promised)
    key = "".join(letter if letter.isalnum() else "_" for letter in label or "budget")
    return ReportChart(f"live_late_by_{key}", f"Late on the real clock, by {label or 'budget'}", figure, WHISKERS)


def _live_trace(system: str, parts: Mapping[str, Any], names: list[str]) -> Bar:
    """Bars of one system; a gap where it has no requests of a name."""
    unknown = {"violation_rate": None, "interval": (None, None)}
    cells = [parts.get(name, unknown) for name in names]
    heights = _percents([cell["violation_rate"] for cell in cells])
    lows, highs = (_percents([cell["interval"][end] for cell in cells]) for end in (0, 1))
    colour = SYSTEM_COLOURS.get(system, GREY)
    return bars(system, names, heights, colour, list(zip(lows, highs, strict=True)))


def _over_time(live: Mapping[str, Any], promised: tuple[float, str]) -> ReportChart:
    traces: list[Scatter] = []
    for name, system in live["systems"].items():
        done = np.cumsum([part["requests"] for part in system["stretches"]]).tolist()
        rates = [100 * part["violation_rate"] for part in system["stretches"]]
        traces += curve(name, done, rates, PolicyStyle(SYSTEM_COLOURS.get(name, GREY), "solid", 2.5, "circle"))
    figure = line_figure(traces, "requests so far", "late (%)", promised)
    note = "each point: up to 100 requests"
    return ReportChart("live_late_over_time", "Late on the real clock, as the run went on", figure, note)
