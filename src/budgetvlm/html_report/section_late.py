"""Requests over their budget, by budget and by group: on the table, and on the real clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from budgetvlm.evaluation.labels import natural
from budgetvlm.evaluation.records import EvaluationReport
from budgetvlm.html_report.blocks import (
    BarChart,
    Bars,
    Block,
    DataTable,
    HeatMap,
    LineChart,
    Row,
    Section,
    Series,
    Text,
    percent,
)
from budgetvlm.html_report.choices import Choices
from budgetvlm.html_report.looks import ORANGE, QUIET, Look, look
from budgetvlm.html_report.report_data import Material
from budgetvlm.html_report.section_frontier import BANDS

SYSTEM_COLOURS = {"guarded": ORANGE, "unguarded": QUIET}
PHASES = {"before": "before the load", "loaded": "under load", "after": "after the load"}
SMALL = 30  # timed samples below which a group's share says little


def late(material: Material) -> Section:
    """Violations by budget and group."""
    blocks: list[Block] = [_by_budget(material.evaluation)]
    if material.choices is not None:
        blocks += _by_group(material.choices)
    blocks.append(
        Text(
            "On the table every policy is held to the same fixed bound for each setting, so what is late here is the "
            "spread of latencies that the bound does not cover, and requests whose budget nothing keeps."
        )
    )
    if material.live is not None:
        blocks += _live(material.live)
    else:
        blocks.append(Text("Not measured on the real clock; `budgetvlm evaluate --live --output_dir DIR` does that."))
    return Section("late", "Requests over their budget", tuple(blocks))


def _by_budget(evaluation: EvaluationReport) -> LineChart:
    drawn = [
        r for r in evaluation.policies if r.at_budget and r.name in ("controller", "lookup table", "predict + argmax")
    ]
    series = tuple(
        Series(
            r.name,
            tuple(a.budget_ms for a in r.at_budget),
            tuple(100 * a.violation_rate.value for a in r.at_budget),
            look(r.name),
            tuple(100 * a.violation_rate.low for a in r.at_budget) if r.name in BANDS else (),
            tuple(100 * a.violation_rate.high for a in r.at_budget) if r.name in BANDS else (),
        )
        for r in drawn
    )
    counts = evaluation.counts
    over = f"over {counts['evaluated_timed']} timed samples" if counts.get("evaluated_timed") else "predicted latencies"
    return LineChart("late_by_budget", "Late by budget", over, "budget (ms)", "requests over the budget (%)", series)


def _by_group(choices: Choices) -> list[Block]:
    everything = {"all": np.ones(choices.table.num_samples, dtype=bool)} | choices.groups
    timed = {name: int((rows & choices.timed).sum()) for name, rows in everything.items()}
    names = [f"{name} ({timed[name]})" for name in everything if timed[name]]
    cells = [tuple(_hundredfold(choices.late(rows))) for name, rows in everything.items() if timed[name]]
    accuracy = [tuple(_hundredfold(choices.accuracy(rows))) for rows in everything.values()]
    counts = [f"{name} ({int(rows.sum())})" for name, rows in everything.items()]
    budgets = tuple(f"{b:.0f} ms" for b in choices.budgets_ms)
    few = any(0 < count < SMALL for count in timed.values())
    note = f"timed samples in brackets{f'; fewer than {SMALL} say little' if few else ''}"
    return [
        Row(
            (
                HeatMap("late_by_group", "The controller's late requests by group (%)", note, "budget", "",
                        budgets, tuple(names), tuple(cells), "%", 1, upside=False),
                HeatMap("accuracy_by_group", "The controller's accuracy by group (%)", "samples in brackets", "budget",
                        "", budgets, tuple(counts), tuple(accuracy), "%", 0),
            )
        )
    ]  # fmt: skip


def _hundredfold(values: list[float] | list[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def _live(live: Mapping[str, Any]) -> list[Block]:
    """The same on the real clock, for the system with its guard and without."""
    alpha = float(live["alpha"])
    requests = live["systems"]["guarded"]["all"]["requests"]
    intro = (
        f"On the real clock: {requests} requests of each system, budgets as shares of "
        f"{live['reference_ms']:.1f} ms; at most {percent(alpha)} may be late. A request that nothing was expected to "
        "keep breaks no promise and is counted apart."
    )
    blocks: list[Block] = [Text(intro), _live_table(live)]
    blocks.append(Row((_live_bars(live, "by_budget", alpha), _stretches(live, alpha))))
    groups = [_live_group(live, label, alpha) for label in live["systems"]["guarded"]["by_group"]]
    known = [chart for chart in groups if chart is not None]
    blocks += [Row(tuple(known[i : i + 2])) for i in range(0, len(known), 2)]
    price = live.get("price_of_guarantee")
    if price:
        blocks.append(
            Text(
                f"What the promise costs: accuracy {percent(price['guard'])} with the guard's bounds, "
                f"{percent(price['true latencies'])} with a guard that knows the true latencies."
            )
        )
    return blocks


def _live_table(live: Mapping[str, Any]) -> DataTable:
    rows = []
    for name, system in live["systems"].items():
        parts = {name: system["all"]}
        if len(system.get("by_phase", {})) > 1:
            parts |= {f"{name}, {PHASES[p]}": system["by_phase"][p] for p in PHASES if p in system["by_phase"]}
        rows += [_live_row(title, part) for title, part in parts.items()]
    header = (
        "system",
        "late",
        "95% interval",
        "accuracy",
        "mean latency (ms)",
        "budget used (median)",
        "hurried",
        "cut short",
        "nothing fits",
    )
    return DataTable("Live run", header, tuple(rows))


def _live_row(title: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = part["interval"]
    return (
        title,
        percent(part["violation_rate"]),
        f"{percent(low)} to {percent(high)}",
        percent(part["accuracy"]),
        f"{part['latency_ms']:.1f}",
        percent(part.get("used_median"), 0),
        str(part.get("hurried", 0)),
        str(part["cut"]),
        str(part["infeasible"]),
    )


def _live_bars(live: Mapping[str, Any], part: str, alpha: float) -> BarChart:
    names = tuple(live["systems"]["guarded"][part])
    return BarChart(
        "live_late_by_budget", "Late on the real clock, by budget", "whiskers: 95% Wilson intervals",
        "budget (× full)", "late (%)", names, _bars(live, part, None, names), level=100 * alpha, level_name="promised",
    )  # fmt: skip


def _live_group(live: Mapping[str, Any], label: str, alpha: float) -> BarChart | None:
    names = tuple(sorted((n for n in live["systems"]["guarded"]["by_group"][label] if n), key=natural))
    if len(names) < 2:
        return None
    key = "".join(letter if letter.isalnum() else "_" for letter in label)
    return BarChart(
        f"live_late_by_{key}", f"Late on the real clock, by {label}", "whiskers: 95% Wilson intervals",
        label, "late (%)", names, _bars(live, "by_group", label, names), level=100 * alpha, level_name="promised",
    )  # fmt: skip


def _bars(live: Mapping[str, Any], part: str, label: str | None, names: tuple[str, ...]) -> tuple[Bars, ...]:
    found = []
    for system, figures in live["systems"].items():
        parts = figures[part] if label is None else figures[part].get(label, {})
        cells = [parts.get(name) for name in names]
        found.append(
            Bars(
                system,
                tuple(None if c is None else 100 * c["violation_rate"] for c in cells),
                SYSTEM_COLOURS.get(system, QUIET),
                tuple(None if c is None else 100 * c["interval"][0] for c in cells),
                tuple(None if c is None else 100 * c["interval"][1] for c in cells),
            )
        )
    return tuple(found)


def _stretches(live: Mapping[str, Any], alpha: float) -> LineChart:
    series = []
    for name, system in live["systems"].items():
        rates = [100 * part["violation_rate"] for part in system["stretches"]]
        done = np.cumsum([part["requests"] for part in system["stretches"]]).tolist()
        series.append(
            Series(name, tuple(done), tuple(rates), Look(SYSTEM_COLOURS.get(name, QUIET), "solid", 2.5, "circle"))
        )
    return LineChart(
        "live_late_over_time", "Late on the real clock, as the run went on", "each point: up to 100 requests",
        "requests so far", "late (%)", tuple(series), 100 * alpha, "promised",
    )  # fmt: skip
