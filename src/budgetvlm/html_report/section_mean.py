"""Accuracy at a budget on the mean latency, where no request has a budget of its own."""

from __future__ import annotations

from budgetvlm._io import time_unit
from budgetvlm.evaluation.policy_styles import POLICY_STYLES, WITH_INTERVAL
from budgetvlm.evaluation.records import AtMeanBudget, Estimate, EvaluationReport
from budgetvlm.evaluation.text_tables import mean_budget_table, missed_table
from budgetvlm.html_report.report_chart import Number, ReportChart, ReportSection, Scatter, curve, line_figure
from budgetvlm.html_report.report_inputs import ReportInputs


def mean(inputs: ReportInputs) -> ReportSection:
    """What each policy reaches at each mean budget, and how far its mean is off before feedback."""
    evaluation = inputs.evaluation
    known = any(result.at_mean_budget for result in evaluation.policies)
    charts = ((_accuracy(evaluation), _over_blind(evaluation)),) if known else ()
    tables = [mean_budget_table(evaluation.policies), missed_table(evaluation)] if known else []
    ceiling = evaluation.options.get("ceiling")
    values = {
        "tables": tables,
        "tuning_split": evaluation.tuning_split,
        "ceiling_ms": ceiling and ceiling * evaluation.latency_reference_ms,
    }
    return ReportSection("mean", "Accuracy at a mean budget", charts, values)


def _accuracy(evaluation: EvaluationReport) -> ReportChart:
    lines = [(name, [(at, at.accuracy) for at in budgets]) for name, budgets in _drawn(evaluation)]
    unit, scale = _unit(evaluation)
    traces = [trace for name, points in lines for trace in _line(name, points, scale, banded=name in WITH_INTERVAL)]
    figure = line_figure(traces, f"mean latency ({unit})", "accuracy (%)")
    return ReportChart("accuracy_at_mean_budget", "Accuracy at a mean budget", figure, "band: bootstrap interval")


def _over_blind(evaluation: EvaluationReport) -> ReportChart:
    shown = ("controller", "predict + argmax")
    lines = [(name, [(at, at.vs_blind) for at in budgets]) for name, budgets in _drawn(evaluation) if name in shown]
    unit, scale = _unit(evaluation)
    traces = [trace for name, points in lines for trace in _line(name, points, scale, banded=True)]
    figure = line_figure(traces, f"mean latency ({unit})", "points over the best blind mix", (0.0, "best blind mix"))
    return ReportChart("over_blind_mix", "What seeing the input is worth", figure, "bands: bootstrap intervals, paired")


def _unit(evaluation: EvaluationReport) -> tuple[str, float]:
    """The unit of the budgets, and what turns ms into it."""
    return time_unit(max(at.budget_ms for result in evaluation.policies for at in result.at_mean_budget))


def _drawn(evaluation: EvaluationReport) -> list[tuple[str, tuple[AtMeanBudget, ...]]]:
    """The policies that have a line of their own, from back to front, with what they reach."""
    found = ((name, evaluation.policy(name)) for name in POLICY_STYLES)
    return [(name, result.at_mean_budget) for name, result in found if result is not None and result.at_mean_budget]


def _line(
    name: str, points: list[tuple[AtMeanBudget, Estimate | None]], scale: float, *, banded: bool
) -> list[Scatter]:
    """A line through what is reached, in %, over the budgets, ``scale`` times their ms."""
    reached = sorted(
        ((scale * at.budget_ms, share) for at, share in points if share is not None), key=lambda point: point[0]
    )
    heights = [(100 * share.value, 100 * share.low, 100 * share.high) for _, share in reached]
    interval: list[tuple[Number, Number]] = [(low, high) for _, low, high in heights] if banded else []
    return curve(
        name, [time for time, _ in reached], [height for height, _, _ in heights], POLICY_STYLES[name], interval
    )
