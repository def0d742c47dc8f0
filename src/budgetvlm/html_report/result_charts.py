"""What an evaluation and a comparison found, as charts: of the page, and of the picture that their commands write."""

from __future__ import annotations

from budgetvlm._io import time_numbers, time_text, time_unit
from budgetvlm.comparison.comparison_records import CompareReport
from budgetvlm.evaluation.policy_styles import GREY, POLICY_STYLES, ROLE_COLOURS, WITH_INTERVAL
from budgetvlm.evaluation.records import Estimate, EvaluationReport, PolicyResult
from budgetvlm.html_report.report_chart import ReportChart, Scatter, bar_figure, bars, curve, line_figure


def evaluation_charts(evaluation: EvaluationReport) -> tuple[ReportChart, ReportChart]:
    """Accuracy under a budget, and mean latency at equal accuracy."""
    return _under_budget(evaluation), _at_equal_accuracy(evaluation)


def comparison_charts(report: CompareReport) -> tuple[ReportChart, ReportChart]:
    """Each policy's gain over the lookup table, and its mean latency at the first accuracy target."""
    target = f"{100 * report.options['evaluation']['accuracy_shares'][0]:g}% of {report.accuracy_of} accuracy"
    gains, times = {}, {}
    for row in sorted(report.section("policies"), key=lambda row: row.gain):  # Plotly draws from the bottom up
        late = "" if row.competes or row.knows_more or row.room is None else ", too often late"
        name, colour = f"{row.full_name}{late}", ROLE_COLOURS[row.role]
        if row.room is not None:
            gains[name] = colour, row.room.accuracy_gain
        if row.first_latency is not None:
            times[name] = colour, row.first_latency
    unit, scale = time_unit(max((found.value for _, found in times.values()), default=0.0))
    without = f"mean latency ({unit}), without a budget"
    return (
        _bars_of("comparison_gain", "Everything that was compared", gains, 100, "points over the lookup table"),
        _bars_of("comparison_latency", f"Mean latency at {target}", times, scale, without),
    )


def _bars_of(key: str, title: str, found: dict[str, tuple[str, Estimate]], scale: float, label: str) -> ReportChart:
    """One bar for each policy, name -> colour and number, with its interval."""
    colours, numbers = [colour for colour, _ in found.values()], [number for _, number in found.values()]
    interval = [(scale * number.low, scale * number.high) for number in numbers]
    trace = bars(label, list(found), [scale * number.value for number in numbers], colours, interval, flat=True)
    return ReportChart(key, title, bar_figure([trace], label, ""), "identical splits, budgets and guard")


def budget_curve(result: PolicyResult, shares: list[Estimate], notes: list[str] | None = None) -> list[Scatter]:
    """A policy's line of a share at each budget in %, with its interval where the policy's is drawn."""
    interval = [(100 * share.low, 100 * share.high) for share in shares] if result.name in WITH_INTERVAL else []
    _, scale = time_unit(result.at_budget[-1].budget_ms)
    x, y = [scale * at.budget_ms for at in result.at_budget], [100 * share.value for share in shares]
    return curve(result.name, x, y, POLICY_STYLES[result.name], interval, notes or [])


def _drawn(evaluation: EvaluationReport) -> list[PolicyResult]:
    """The policies that have a line of their own, from back to front."""
    return [result for name in POLICY_STYLES if (result := evaluation.policy(name)) is not None]


def _under_budget(evaluation: EvaluationReport) -> ReportChart:
    traces: list[Scatter] = []
    for result in _drawn(evaluation):
        at = result.at_budget
        notes = [f"{a.budget_share:.3g} × full; ±{50 * (a.accuracy.high - a.accuracy.low):.1f}" for a in at]
        traces += budget_curve(result, [a.accuracy for a in at], notes) if at else []
    level = (100 * evaluation.full_accuracy, "full setting, whatever the budget")
    budgets = evaluation.policies[0].at_budget
    unit, scale = time_unit(budgets[-1].budget_ms)
    figure = line_figure(traces, f"budget for each request ({unit}, × the full setting's median)",
                         "accuracy (%)", level)  # fmt: skip
    numbers, _ = time_numbers(*(at.budget_ms for at in budgets))
    ticks = {
        scale * at.budget_ms: f"{number}<br>{at.budget_share:.3g}×" for at, number in zip(budgets, numbers, strict=True)
    }
    figure.update_xaxes(tickvals=list(ticks), ticktext=list(ticks.values()))
    return ReportChart("accuracy_under_budget", "Accuracy under a budget", figure, _gain_text(evaluation))


def _gain_text(evaluation: EvaluationReport) -> str:
    """The controller's gain, where one was evaluated, and what the bands are."""
    result, bands = evaluation.policy("controller"), "bands: bootstrap intervals"
    if result is None or result.room is None:
        return bands
    gain, shares = result.room.accuracy_gain, evaluation.room_budget_shares
    over = f"{min(shares):.3g} to {max(shares):.3g}×"
    return (
        f"controller over lookup table, mean at {over}: {100 * gain.value:+z.1f} points "
        f"[{100 * gain.low:+z.1f}, {100 * gain.high:+z.1f}]; {bands}"
    )


def _at_equal_accuracy(evaluation: EvaluationReport) -> ReportChart:
    full = evaluation.statics[-1]
    unit, scale = time_unit(max(point.latency_ms for point in evaluation.statics))
    traces = [
        _static_points(evaluation, scale),
        Scatter(name="full setting", x=[scale * full.latency_ms], y=[100 * full.accuracy], mode="markers",
                marker={"color": GREY, "size": 14, "symbol": "star"}),
    ]  # fmt: skip
    for result in _drawn(evaluation):
        if result.frontier:
            x, y = zip(*((scale * p.latency_ms, 100 * p.accuracy) for p in result.vertices), strict=True)
            traces += curve(result.name, x, y, POLICY_STYLES[result.name])
    figure = line_figure(traces, f"mean latency ({unit})", "accuracy (%)")
    note = f"no budget; the price of a millisecond varies{_saving_text(evaluation)}"
    return ReportChart("latency_at_accuracy", "Mean latency at equal accuracy", figure, note)


def _saving_text(evaluation: EvaluationReport) -> str:
    """What the controller saves against the best blind mix at the first accuracy target, where both reach it."""
    mine, blind = evaluation.policy("controller"), evaluation.policy("best blind mix")
    if mine is None or blind is None or not mine.first_latency or not blind.first_latency:
        return ""
    at = mine.at_accuracy[0]
    if at.saved is None:
        return ""
    times = time_text(blind.first_latency.value, mine.first_latency.value, between=" → ")
    target = f"{100 * at.accuracy_share:g}% of {evaluation.accuracy_of} accuracy"
    return (
        f"; controller at {target}: {times}, {-100 * at.saved.value:+z.0f}% "
        f"[{-100 * at.saved.high:+z.0f}, {-100 * at.saved.low:+z.0f}]"
    )


def _static_points(evaluation: EvaluationReport, scale: float) -> Scatter:
    """One point for each setting, with the values of its knobs under the cursor if all settings were measured."""
    statics, settings = evaluation.statics, evaluation.options.get("settings") or []
    names = [", ".join(f"{name}={value:g}" for name, value in setting.items()) for setting in settings]
    known = len(names) == len(statics)
    return Scatter(
        name="single settings", x=[scale * p.latency_ms for p in statics], y=[100 * p.accuracy for p in statics],
        mode="markers", marker={"color": GREY, "size": 6}, text=names if known else None,
        hovertemplate=f"%{{x:.4g}}, %{{y:.4g}}{'<br>%{text}' if known else ''}<extra>%{{fullData.name}}</extra>",
    )  # fmt: skip
