"""An evaluation as tables for people: on a terminal with rich, elsewhere as plain text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetvlm._io import time_text, time_unit
from budgetvlm.evaluation.outcomes import BEST_SETTING
from budgetvlm.evaluation.records import (
    AtAccuracy,
    AtBudget,
    AtMeanBudget,
    Estimate,
    EvaluationReport,
    HeldOutReport,
    PolicyFigures,
)

MAX_SETTINGS, UNKNOWN = 3, "–"
TEXT_WIDTH = 136  # of sentences between tables that are narrower


def width_of(content: RenderableType) -> int:
    """Return the width that tables need; a narrower terminal wraps lines rather than losing digits."""
    if isinstance(content, Group):
        return max(TEXT_WIDTH, *map(width_of, content.renderables))
    console = Console(width=10 * TEXT_WIDTH)
    return console.measure(content).maximum if isinstance(content, Table) else 0


def plain_text(content: RenderableType) -> str:
    """Tables without colours, for files and pipes."""
    console = Console(file=io.StringIO(), width=max(TEXT_WIDTH, width_of(content)), color_system=None)
    console.print(content)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def new_table(title: str, numbers: Iterable[str], first: str = "policy", caption: str | None = None) -> Table:
    """An empty table: a column of names on the left, columns of numbers on the right."""
    below = caption and f"{caption}\n"
    table = Table(title=title, caption=below, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def add_policy(table: Table, result: PolicyFigures, cells: Iterable[str], *, end_section: bool = False) -> None:
    """Add the row of one policy in the style of its role."""
    styles = {"controller": "bold green", "variant": "green", "run": "dim green"}
    style = "dim" if result.knows_more else styles.get(result.role, "")
    table.add_row(result.full_name, *cells, style=style, end_section=end_section)


def sample_counts(report: HeldOutReport) -> str:
    """One sentence about the evaluated samples and one about the full setting."""
    counts, unit = report.counts, report.unit
    units = "" if unit == "sample" else f" of {counts['evaluated_units']} {unit}s"
    return (
        f"{counts['evaluated_samples']} samples{units}, split {report.split}; {counts['settings']} settings. Full "
        f"setting: accuracy {100 * report.full_accuracy:.1f}%, median {time_text(report.latency_reference_ms)}."
    )


def tables(report: EvaluationReport) -> RenderableType:
    """All tables, one below the other."""
    return Group(
        _heading(report),
        accuracy_table(report),
        latency_table(report),
        _by_budget("Requests over the budget (%)", report, lambda at: _percent(at.violation_rate)),
        room_table(report),
        *dataset_tables(report.policies),
        mean_budget_table(report.policies),
        missed_table(report),
        equal_accuracy_table(report),
        settings_table(report),
    )


def _heading(report: EvaluationReport) -> Text:
    counts = report.counts
    predicted = counts["evaluated_samples"] - counts["evaluated_timed"]
    over = f"the {counts['evaluated_timed']} that were timed" if counts["evaluated_timed"] else "predicted latencies"
    note = f"Latency of {predicted} samples is predicted, not timed; violations are those of {over}."
    level = f"Intervals: {100 * report.options['level']:.0f}%, over {report.unit}s."
    said = [*report.notes, f"{sample_counts(report)} {level}", *([note] if predicted else []), ""]
    return Text("\n".join(said))


def accuracy_table(report: EvaluationReport) -> Table:
    """Accuracy of each policy at each budget."""
    return _by_budget("Accuracy under a budget (%, ± half the interval)", report, lambda at: _percent(at.accuracy))


def latency_table(report: EvaluationReport) -> Table:
    """Mean, median and 95% quantile of the latency of each policy at each budget, in one unit."""
    longest = max(at.p95_ms for result in report.policies for at in result.at_budget)
    unit, scale = time_unit(longest)
    digits = 0 if scale * longest >= 99.95 else 1 if scale * longest >= 9.995 else 2

    def cell(at: AtBudget) -> str:
        return "/".join(f"{scale * ms:.{digits}f}" for ms in (at.mean_ms.value, at.p50_ms, at.p95_ms))

    return _by_budget(f"Latency under a budget: mean / P50 / P95 ({unit})", report, cell)


def _by_budget(title: str, report: EvaluationReport, cell: Callable[[AtBudget], str]) -> Table:
    """One row for each policy, one column for each budget; ± is half of the interval's width."""
    table = new_table(title, map(_budget, report.policies[0].at_budget))
    for result in report.policies:
        if result.at_budget:
            add_policy(table, result, map(cell, result.at_budget))
    return table


def room_table(report: EvaluationReport) -> Table:
    """The means over the room budgets."""
    shares = ", ".join(f"{share:.3g}" for share in report.room_budget_shares)
    columns = ["points over\nlookup", "share of the\nvisible room", "share of the\nhindsight room"]
    table = new_table(f"Mean over the budgets {shares}", [*columns, "points over\npredict", "over\nbudget"])
    for result in report.policies:
        if room := result.room:
            gained = [_points(room.accuracy_gain), _share(room.visible_room_closed), _share(room.room_closed)]
            late = f"{100 * room.violation_rate.value:.1f}%"
            add_policy(table, result, [*gained, _points(room.vs_predict), late])
    return table


def dataset_tables(results: Sequence[PolicyFigures]) -> list[Table]:
    """Accuracy of each policy on each data set, in one table; none where there is one data set."""
    results = [result for result in results if result.on_dataset]
    if not results:
        return []
    compared = any(on.vs_own for on in results[0].on_dataset)
    title = "Accuracy on each data set (%), mean over the same budgets" + (
        "; points over its own controller" if compared else ""
    )
    table = new_table(title, [f"{on.dataset}\n({on.samples} samples)" for on in results[0].on_dataset])
    for result in results:
        cells = [_with_change(_percent(on.accuracy), on.vs_own, "{:+z.1f} ±{:.1f}") for on in result.on_dataset]
        add_policy(table, result, cells)
    return [table]


def mean_budget_table(results: Sequence[PolicyFigures]) -> Table:
    """Accuracy of each policy that takes a price at each budget on the mean latency, and points over the blind mix."""
    results = [result for result in results if result.at_mean_budget]
    budgets = results[0].at_mean_budget if results else ()
    title = "Accuracy at a mean budget (%), no request having a budget of its own; points over the best blind mix"
    beyond = any(at.budget_share > 1 for at in budgets)
    caption = (
        "a budget above what the slowest setting takes buys the best setting for every request" if beyond else None
    )
    table = new_table(title, [f"{time_text(at.budget_ms)}\non average" for at in budgets], caption=caption)
    for result in results:
        add_policy(table, result, map(_at_mean_budget, result.at_mean_budget))
    return table


def missed_table(report: EvaluationReport) -> Table:
    """How far each policy's mean is from the budget before feedback, and its accuracy there."""
    results = [result for result in report.policies if result.at_mean_budget and result.name != BEST_SETTING]
    budgets = results[0].at_mean_budget if results else ()
    title = (
        f"How far the mean is off (%), and accuracy (%), with the price solved on {report.tuning_split} samples and "
        "without feedback"
    )
    table = new_table(title, [f"{time_text(at.budget_ms)}\non average" for at in budgets])
    for result in results:
        add_policy(table, result, map(_missed, result.at_mean_budget))
    return table


def _missed(at: AtMeanBudget) -> str:
    if at.missed is None or at.solved_accuracy is None:
        return "–"
    return f"{100 * at.missed.value:+z.1f} ±{half_width(at.missed):.1f}, {100 * at.solved_accuracy.value:.1f}"


def _at_mean_budget(at: AtMeanBudget) -> str:
    if at.accuracy is None:
        return "not reached"
    return _with_change(f"{100 * at.accuracy.value:.1f}", at.vs_blind, "{:+z.1f} ±{:.1f}")


def equal_accuracy_table(report: EvaluationReport) -> Table:
    """Mean latency where each policy reaches a share of the best setting's accuracy, and what it saves."""
    title = "Mean latency at equal accuracy, without a budget, and its difference from the best blind mix's"
    results = [result for result in report.policies if result.at_accuracy]
    targets = results[0].at_accuracy if results else ()
    whose = "full" if report.best_setting is None else "the best"
    columns = [f"{100 * at.accuracy_share:g}% of {whose}\n(accuracy {100 * at.target_accuracy:.1f}%)" for at in targets]
    columns += ["share of the\nvisible saving*", "saved over\npredict*"]
    table = new_table(title, columns, caption="* at the first of these accuracies")
    for result in results:
        first = result.at_accuracy[0]
        saved = [_share(first.visible_saving_closed), _share(first.saved_vs_predict)]
        add_policy(table, result, [*map(_at_accuracy, result.at_accuracy), *saved])
    return table


def settings_table(report: EvaluationReport) -> Table:
    """The settings that the controller (or the first policy) chose most often."""
    result = report.policies[0]
    title = f"What the {result.name} chooses most often ({' / '.join(report.knobs)})"
    table = new_table(title, map(_budget, result.at_budget), first="")
    for rank in range(MAX_SETTINGS):
        table.add_row(f"{rank + 1}.", *(_setting(at, rank) for at in result.at_budget))
    return table


def _setting(at: AtBudget, rank: int) -> str:
    if rank >= len(at.settings):
        return ""
    chosen = at.settings[rank]
    return f"{'/'.join(f'{value:g}' for value in chosen.setting.values())} {100 * chosen.share:.0f}%"


def _budget(at: AtBudget) -> str:
    return f"{time_text(at.budget_ms)}\n({at.budget_share:.3g} x full)"


def half_width(number: Estimate) -> float:
    """Half of the interval's width, in percent."""
    return 50 * (number.high - number.low)


def _percent(number: Estimate) -> str:
    return f"{100 * number.value:.1f} ±{half_width(number):.1f}"


def _points(number: Estimate | None) -> str:
    if number is None or number.low == number.high == 0:
        return UNKNOWN
    return f"{100 * number.value:+z.1f} [{100 * number.low:+z.1f}, {100 * number.high:+z.1f}]"


def _share(number: Estimate | None) -> str:
    if number is None or number.low == number.high:
        return UNKNOWN if number is None else f"{100 * number.value:.0f}%"
    if number.value < -1:
        return "below -100%"
    value, low, high = (round(100 * part) for part in (number.value, number.low, number.high))
    return f"{value}% [{low}, {high}]"


def _at_accuracy(at: AtAccuracy) -> str:
    if at.latency_ms is None:
        return "not reached"
    slower = at.saved and Estimate(-at.saved.value, -at.saved.high, -at.saved.low)
    return _with_change(time_text(at.latency_ms.value), slower, "{:+z.0f}% ±{:.0f}")


def _with_change(text: str, change: Estimate | None, form: str) -> str:
    """Append a change in percent and half of its interval; none where a policy is compared with itself."""
    if change is None or change.low == change.high:
        return text
    return f"{text} {form.format(100 * change.value, half_width(change))}"
