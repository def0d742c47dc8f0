"""Accuracy under a budget, mean latency at equal accuracy, and the tables of all policies."""

from __future__ import annotations

from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.comparison.comparison_tables import detail_table, ranking_table
from budgetvlm.evaluation.policy_styles import GREY, POLICY_STYLES, SKY, WITH_INTERVAL
from budgetvlm.evaluation.records import Estimate, EvaluationReport, PolicyResult
from budgetvlm.evaluation.text_tables import accuracy_table, equal_accuracy_table, room_table
from budgetvlm.html_report.page import ReportSection
from budgetvlm.html_report.report_chart import ReportChart, Scatter, bar_figure, bars, curve, line_figure
from budgetvlm.html_report.report_inputs import ReportInputs

DRAWN = ("controller", "predict + argmax", "lookup table", "best blind mix", "group lookup", "oracle")


def frontier(inputs: ReportInputs) -> ReportSection:
    """Accuracy against time, with a budget for each request and without one."""
    evaluation = inputs.evaluation
    charts = (_under_budget(evaluation), _at_equal_accuracy(evaluation))
    return ReportSection("frontier", "Accuracy against time", (charts,))


def _results(evaluation: EvaluationReport) -> list[PolicyResult]:
    found = (evaluation.policy(name) for name in DRAWN)
    return [result for result in found if result is not None]


def _under_budget(evaluation: EvaluationReport) -> ReportChart:
    traces: list[Scatter] = []
    for result in _results(evaluation):
        at = result.at_budget
        notes = [f"{a.budget_share:g} × full; ±{50 * (a.accuracy.high - a.accuracy.low):.1f}" for a in at]
        traces += budget_curve(result, [a.accuracy for a in at], notes) if at else []
    level = (100 * evaluation.full_accuracy, "full setting, whatever the budget")
    figure = line_figure(traces, "budget (ms)", "accuracy (%)", level)
    return ReportChart("accuracy_under_budget", "Accuracy under a budget", figure, "bands: bootstrap intervals")


def budget_curve(result: PolicyResult, shares: list[Estimate], notes: list[str] | None = None) -> list[Scatter]:
    """A policy's line of a share at each budget in %, with its interval where the policy's is drawn."""
    interval = [(100 * share.low, 100 * share.high) for share in shares] if result.name in WITH_INTERVAL else []
    x, y = [at.budget_ms for at in result.at_budget], [100 * share.value for share in shares]
    return curve(result.name, x, y, POLICY_STYLES[result.name], interval, notes or [])


def _at_equal_accuracy(evaluation: EvaluationReport) -> ReportChart:
    traces = [_static_points(evaluation)]
    for result in _results(evaluation):
        if result.frontier:
            x, y = zip(*((p.latency_ms, 100 * p.accuracy) for p in result.vertices), strict=True)
            traces += curve(result.name, x, y, POLICY_STYLES[result.name])
    note = "no budget; the price of a millisecond varies"
    figure = line_figure(traces, "mean latency (ms)", "accuracy (%)")
    return ReportChart("latency_at_accuracy", "Mean latency at equal accuracy", figure, note)


def _static_points(evaluation: EvaluationReport) -> Scatter:
    """One point for each setting, with the values of its knobs under the cursor if all settings were measured."""
    statics, settings = evaluation.statics, evaluation.options.get("settings") or []
    names = [", ".join(f"{name}={value:g}" for name, value in setting.items()) for setting in settings]
    known = len(names) == len(statics)
    return Scatter(
        name="single settings", x=[p.latency_ms for p in statics], y=[100 * p.accuracy for p in statics],
        mode="markers", marker={"color": GREY, "size": 6}, text=names if known else None,
        hovertemplate=f"%{{x:.4g}}, %{{y:.4g}}{'<br>%{text}' if known else ''}<extra>%{{fullData.name}}</extra>",
    )  # fmt: skip


def comparison(inputs: ReportInputs) -> ReportSection:
    """All policies as tables, and the policies of `budgetvlm compare` where its result is given."""
    evaluation, compared = inputs.evaluation, inputs.comparison
    values = {
        "tables": [accuracy_table(evaluation), room_table(evaluation), equal_accuracy_table(evaluation)],
        "compared": [ranking_table(compared), detail_table(compared)] if compared else [],
    }
    charts = ((_gains(compared),),) if compared else ()
    return ReportSection("comparison", "Comparison with everything simple", charts, values)


def _gains(compared: CompareReport) -> ReportChart:
    """Bars from the smallest gain to the largest, which Plotly draws from the bottom up."""
    rows = sorted((row for row in compared.section("policies") if row.room), key=lambda row: row.gain)
    gains = [row.room.accuracy_gain for row in rows if row.room]
    label, interval = "points over the lookup table", [(100 * gain.low, 100 * gain.high) for gain in gains]
    heights = [100 * gain.value for gain in gains]
    trace = bars(label, [row.full_name for row in rows], heights, SKY, interval, flat=True)
    figure = bar_figure([trace], label, "")
    return ReportChart("comparison_gain", "Everything that was compared", figure, "identical splits, budgets and guard")
