"""An evaluation as tables for people: on a terminal with rich, elsewhere as plain text."""

from __future__ import annotations

import io

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table

from budgetvlm.evaluation.records import AtAccuracy, AtBudget, Estimate, EvaluationReport, PolicyResult

MAX_SETTINGS = 3


WIDTH = 128  # what the widest table needs; a narrower terminal wraps lines rather than losing digits


def plain_text(report: EvaluationReport, width: int = WIDTH) -> str:
    """All tables without colours, for files and pipes."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable(report))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def renderable(report: EvaluationReport) -> RenderableType:
    """All tables, one below the other."""
    return Group(
        _heading(report),
        accuracy_table(report),
        latency_table(report),
        violations_table(report),
        room_table(report),
        equal_accuracy_table(report),
        settings_table(report),
    )


def _heading(report: EvaluationReport) -> str:
    counts = report.counts
    predicted = counts["evaluated_samples"] - counts["evaluated_timed"]
    over = f"the {counts['evaluated_timed']} that were timed" if counts["evaluated_timed"] else "predicted latencies"
    note = (
        f"Latency of {predicted} samples is predicted, not timed; violations are those of {over}.\n"
        if predicted
        else ""
    )
    return (
        f"{counts['evaluated_samples']} samples of {counts['evaluated_images']} images, split {report.split}; "
        f"{counts['settings']} settings. Full setting: accuracy {100 * report.full_accuracy:.1f}%, median "
        f"{report.latency_reference_ms:.1f} ms. Intervals: {100 * report.options['level']:.0f}%, over images.\n{note}"
    )


def accuracy_table(report: EvaluationReport) -> Table:
    """Accuracy in % with half the interval's width."""
    table = _table("Accuracy under a budget (%)", report)
    for result in _with_budgets(report):
        table.add_row(_name(result), *(_percent(at.accuracy) for at in result.at_budget), style=_style(result))
    return table


def latency_table(report: EvaluationReport) -> Table:
    """Mean / P50 / P95 in ms."""
    table = _table("Latency under a budget: mean / P50 / P95 (ms)", report)
    for result in _with_budgets(report):
        table.add_row(_name(result), *(_latency(at) for at in result.at_budget), style=_style(result))
    return table


def violations_table(report: EvaluationReport) -> Table:
    """Violation rate in % with half the interval's width."""
    table = _table("Requests over the budget (%)", report)
    for result in _with_budgets(report):
        table.add_row(_name(result), *(_percent(at.violation_rate) for at in result.at_budget), style=_style(result))
    return table


def room_table(report: EvaluationReport) -> Table:
    """The means over the room budgets."""
    shares = ", ".join(f"{share:g}" for share in report.room_budget_shares)
    table = Table(title=f"Mean over the budgets {shares}", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("policy", no_wrap=True)
    columns = (
        "points over\nlookup",
        "share of the\nvisible room",
        "share of the\nhindsight room",
        "points over\npredict",
    )
    for column in (*columns, "over\nbudget"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in _with_budgets(report):
        room = result.room
        if room is None:
            continue
        table.add_row(
            _name(result),
            _points(room.accuracy_gain),
            _share(room.visible_room_closed),
            _share(room.room_closed),
            _points(room.vs_predict),
            f"{100 * room.violation_rate.value:.1f}%",
            style=_style(result),
        )
    return table


def equal_accuracy_table(report: EvaluationReport) -> Table:
    """Mean latency where each policy reaches a share of the full setting's accuracy, and what it saves."""
    title = "Mean latency at equal accuracy, without a budget, and its difference from the best blind mix's"
    table = Table(
        title=title,
        caption="* at the first of these accuracies",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    results = [result for result in report.policies if result.at_accuracy]
    for at in results[0].at_accuracy if results else ():
        title = f"{100 * at.accuracy_share:g}% of full\n(accuracy {100 * at.target_accuracy:.1f}%)"
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("share of the\nvisible saving*", justify="right")
    table.add_column("saved over\npredict*", justify="right")
    for result in results:
        first = result.at_accuracy[0]
        cells = [_at_accuracy(at) for at in result.at_accuracy]
        table.add_row(
            _name(result),
            *cells,
            _share(first.visible_saving_closed),
            _share(first.saved_vs_predict),
            style=_style(result),
        )
    return table


def settings_table(report: EvaluationReport) -> Table:
    """The settings that the controller (or the first policy) chose most often."""
    result = report.policies[0]
    knobs = " / ".join(report.knobs)
    table = Table(title=f"What the {result.name} chooses most often ({knobs})", box=SIMPLE_HEAD, title_justify="left")
    for at in result.at_budget:
        table.add_column(_budget(at), justify="right")
    for rank in range(MAX_SETTINGS):
        cells = []
        for at in result.at_budget:
            chosen = at.settings[rank] if rank < len(at.settings) else None
            values = "/".join(f"{value:g}" for value in chosen.setting.values()) if chosen else ""
            cells.append(f"{values} {100 * chosen.share:.0f}%" if chosen else "")
        table.add_row(*cells)
    return table


def _table(title: str, report: EvaluationReport) -> Table:
    """An empty table with one column a budget."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for at in report.policies[0].at_budget:
        table.add_column(_budget(at), justify="right", no_wrap=True)
    return table


def _with_budgets(report: EvaluationReport) -> list[PolicyResult]:
    return [result for result in report.policies if result.at_budget]


def _budget(at: AtBudget) -> str:
    return f"{at.budget_ms:.1f} ms\n({at.budget_share:g} x full)"


def _name(result: PolicyResult) -> str:
    return f"{result.name} (bound)" if result.role == "bound" else result.name


def _style(result: PolicyResult) -> str:
    return {"controller": "bold green", "bound": "dim", "run": "dim green"}.get(result.role, "")


def _percent(number: Estimate) -> str:
    return f"{100 * number.value:.1f} ±{50 * (number.high - number.low):.1f}"


def _points(number: Estimate | None) -> str:
    if number is None or number.low == number.high == 0:
        return "-"
    return f"{100 * number.value:+.1f} [{100 * number.low:+.1f}, {100 * number.high:+.1f}]"


def _share(number: Estimate | None) -> str:
    if number is None or number.low == number.high:
        return "-" if number is None else f"{100 * number.value:.0f}%"
    if number.value < -1:
        return "below -100%"
    value, low, high = (round(100 * part) for part in (number.value, number.low, number.high))
    return f"{value}% [{low}, {high}]"


def _latency(at: AtBudget) -> str:
    return "/".join(f"{ms:.3g}" for ms in (at.mean_ms.value, at.p50_ms, at.p95_ms))


def _at_accuracy(at: AtAccuracy) -> str:
    if at.latency_ms is None:
        return "not reached"
    text = f"{at.latency_ms.value:.1f} ms"
    if at.saved is None or at.saved.low == at.saved.high:
        return text
    return f"{text} {-100 * at.saved.value:+.0f}% ±{50 * (at.saved.high - at.saved.low):.0f}"
