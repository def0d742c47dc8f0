"""Accuracy under a budget, mean latency at equal accuracy, and the table of all policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from budgetvlm.evaluation.records import Estimate, EvaluationReport, FrontierPoint, PolicyResult
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
from budgetvlm.html_report.looks import QUIET, SKY, Look, look
from budgetvlm.html_report.report_data import Material

DRAWN = ("controller", "predict + argmax", "lookup table", "best blind mix", "group lookup", "oracle")
BANDS = ("controller", "lookup table")


def frontier(material: Material) -> Section:
    """Both faces, as charts."""
    evaluation = material.evaluation
    return Section(
        "frontier",
        "Accuracy against time",
        (
            Row((_under_budget(evaluation), _at_equal_accuracy(evaluation))),
            Text(
                "On the left each request has a budget, and every policy chooses among the settings whose bound "
                "keeps it. On the right there is no budget: along each line the price of a millisecond varies, and "
                "drawing between two points at random gives the line between them. The oracle knows the outcome and "
                "the group lookup knows the group of each question: bounds, no competitors."
            ),
        ),
    )


def _under_budget(evaluation: EvaluationReport) -> LineChart:
    series = tuple(
        _budget_series(result) for name in DRAWN for result in [evaluation.policy(name)] if result and result.at_budget
    )
    return LineChart(
        "accuracy_under_budget", "Accuracy under a budget", "bands: bootstrap intervals",
        "budget (ms)", "accuracy (%)", series, 100 * evaluation.full_accuracy, "full setting, whatever the budget",
    )  # fmt: skip


def _budget_series(result: PolicyResult) -> Series:
    at, band = result.at_budget, result.name in BANDS
    return Series(
        result.name,
        tuple(a.budget_ms for a in at),
        tuple(100 * a.accuracy.value for a in at),
        look(result.name),
        tuple(100 * a.accuracy.low for a in at) if band else (),
        tuple(100 * a.accuracy.high for a in at) if band else (),
        tuple(f"{a.budget_share:g} × full; ±{50 * (a.accuracy.high - a.accuracy.low):.1f}" for a in at),
    )


def _at_equal_accuracy(evaluation: EvaluationReport) -> LineChart:
    statics = evaluation.statics
    dots = Series(
        "single settings",
        *_xy(statics),
        Look(QUIET, "", 1.0, "circle"),
        notes=_setting_names(evaluation, len(statics)),
    )
    lines = [
        Series(name, *_xy(result.vertices), look(name))
        for name in DRAWN
        for result in [evaluation.policy(name)]
        if result and result.frontier
    ]  # fmt: skip
    return LineChart(
        "latency_at_accuracy", "Mean latency at equal accuracy", "no budget; the price of a millisecond varies",
        "mean latency (ms)", "accuracy (%)", (dots, *lines),
    )  # fmt: skip


def _xy(points: tuple[FrontierPoint, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(p.latency_ms for p in points), tuple(100 * p.accuracy for p in points)


def _setting_names(evaluation: EvaluationReport, count: int) -> tuple[str, ...]:
    settings = evaluation.options.get("settings") or []
    if len(settings) != count:  # some were not measured
        return ()
    return tuple(", ".join(f"{name}={value:g}" for name, value in setting.items()) for setting in settings)


def comparison(material: Material) -> Section:
    """All policies as tables, and the rows of a comparison where there is one."""
    evaluation = material.evaluation
    blocks: list[Block] = [_budget_table(evaluation), _room_table(evaluation), _equal_table(evaluation)]
    if material.comparison:
        blocks += _compared(material.comparison)
    return Section("comparison", "Comparison with everything simple", tuple(blocks))


def _budget_table(evaluation: EvaluationReport) -> DataTable:
    results = [result for result in evaluation.policies if result.at_budget]
    header = tuple(f"{at.budget_ms:.0f} ms ({at.budget_share:g}×)" for at in results[0].at_budget) if results else ()
    rows = tuple((_name(r), *(_plus_minus(at.accuracy) for at in r.at_budget)) for r in results)
    return DataTable("Accuracy (%) under a budget, ± half the interval", ("policy", *header), rows, _strong(results))


def _room_table(evaluation: EvaluationReport) -> DataTable:
    shares = ", ".join(f"{share:g}" for share in evaluation.room_budget_shares)
    results = [result for result in evaluation.policies if result.room is not None]
    rows = tuple(tuple(_room_row(result)) for result in results)
    header = (
        "policy",
        "points over the lookup table",
        "of the visible room",
        "of hindsight",
        "points over predict",
        "late",
    )
    return DataTable(f"Means over the budgets {shares}", header, rows, _strong(results))


def _room_row(result: PolicyResult) -> Iterator[str]:
    room = result.room
    assert room is not None
    yield _name(result)
    yield _bracket(room.accuracy_gain)
    yield _share(room.visible_room_closed)
    yield _share(room.room_closed)
    yield _bracket(room.vs_predict)
    yield percent(room.violation_rate.value)


def _equal_table(evaluation: EvaluationReport) -> DataTable:
    results = [result for result in evaluation.policies if result.at_accuracy]
    targets = results[0].at_accuracy if results else ()
    header = tuple(f"{percent(at.accuracy_share, 0)} of full ({percent(at.target_accuracy)})" for at in targets)
    rows = tuple((_name(r), *(_reached(at.latency_ms, at.saved) for at in r.at_accuracy)) for r in results)
    caption = "Mean latency (ms) at equal accuracy, and the time saved against the best blind mix of settings"
    return DataTable(caption, ("policy", *header), rows, _strong(results))


def _compared(rows: tuple[dict[str, Any], ...]) -> list[Block]:
    gains = [(str(row["name"]), (row.get("room") or {}).get("accuracy_gain")) for row in rows]
    known = [
        (name, gain) for name, gain in gains if isinstance(gain, dict) and isinstance(gain.get("value"), float | int)
    ]
    blocks: list[Block] = []
    if known:
        order = sorted(known, key=lambda pair: pair[1]["value"])
        bars = Bars(
            "points over the lookup table",
            tuple(100 * g["value"] for _, g in order),
            SKY,
            tuple(100 * g["low"] for _, g in order) if all(_has_interval(g) for _, g in order) else (),
            tuple(100 * g["high"] for _, g in order) if all(_has_interval(g) for _, g in order) else (),
        )
        blocks.append(
            BarChart(
                "comparison_gain",
                "Everything that was compared",
                "identical splits, budgets and guard",
                "points over the lookup table",
                "",
                tuple(name for name, _ in order),
                (bars,),
                flat=True,
            )
        )
    header = ("policy", "points over lookup", "late", "regret", "learning (s)", "one decision (µs)")
    blocks.append(DataTable("From `budgetvlm compare`", header, tuple(_compared_row(row) for row in rows)))
    return blocks


def _has_interval(gain: dict[str, Any]) -> bool:
    return isinstance(gain.get("low"), float | int) and isinstance(gain.get("high"), float | int)


def _compared_row(row: dict[str, Any]) -> tuple[str, ...]:
    room = row.get("room") or {}
    gain, late = room.get("accuracy_gain") or {}, room.get("violation_rate") or {}
    bound = " (bound)" if row.get("role") == "bound" else ""
    points = (
        f"{100 * gain['value']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        if _has_interval(gain)
        else "–"
    )
    return (
        f"{row['name']}{bound}",
        points,
        percent(late.get("value")),
        _number(row.get("regret"), 100, 1),
        _number(row.get("fit_seconds"), 1, 1),
        _number(row.get("decision_us"), 1, 0),
    )


def _number(value: Any, scale: float, digits: int) -> str:
    return f"{scale * value:.{digits}f}" if isinstance(value, float | int) else "–"


def _name(result: PolicyResult) -> str:
    return f"{result.name} (bound)" if result.role == "bound" else result.name


def _strong(results: list[PolicyResult]) -> tuple[int, ...]:
    return tuple(number for number, result in enumerate(results) if result.role == "controller")


def _plus_minus(number: Estimate) -> str:
    return f"{100 * number.value:.1f} ±{50 * (number.high - number.low):.1f}"


def _bracket(number: Estimate | None) -> str:
    if number is None or number.low == number.high == 0:
        return "–"
    return f"{100 * number.value:+.1f} [{100 * number.low:+.1f}, {100 * number.high:+.1f}]"


def _share(number: Estimate | None) -> str:
    return "–" if number is None else f"{100 * number.value:.0f}%"


def _reached(latency: Estimate | None, saved: Estimate | None) -> str:
    if latency is None:
        return "not reached"
    text = milliseconds(latency.value)
    if saved is None or saved.low == saved.high == 0:  # against itself
        return text
    return f"{text} ({-100 * saved.value:+.0f}%)"
