"""A comparison as tables for people: on a terminal with rich, elsewhere as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetvlm._io import time_text
from budgetvlm.comparison.comparison_records import CompareReport, ComparisonRow
from budgetvlm.evaluation.records import Estimate
from budgetvlm.evaluation.text_tables import (
    UNKNOWN,
    add_policy,
    dataset_tables,
    half_width,
    mean_budget_table,
    new_table,
    sample_counts,
)

UNRANKED = "no rank: a bound, no budget for each request, or late more often than the guard and the lookup table allow"
TITLES = {
    "knobs": "Knobs that may move: points over the lookup table with all knobs, and latency at equal accuracy",
    "features": "Features that are read: points over the lookup table, and latency at equal accuracy",
    "samples": "Training and validation samples: points over the lookup table that has them all, and latency at equal "
    "accuracy",
}
VARIANT_NAMES = {
    ("knobs", ""): "all knobs", ("samples", ""): "all",
    ("features", ""): "image and question", ("features", "labels"): "true labels instead",
}  # fmt: skip


def tables(report: CompareReport) -> RenderableType:
    """All tables, one below the other."""
    parts: list[RenderableType] = [_heading(report), ranking_table(report), detail_table(report)]
    parts += [*dataset_tables(report.section("policies")), mean_budget_table(report.section("policies"))]
    return Group(*parts, *(left_out_table(report, section) for section in TITLES if report.section(section)))


def _heading(report: CompareReport) -> Text:
    counts = report.counts
    lines = [
        f"{sample_counts(report)} Seeds: {', '.join(map(str, report.options['seeds']))}. ±: half of the "
        f"{100 * report.options['evaluation']['level']:g}% interval, over {report.unit}s."
    ]
    if 0 < counts["evaluated_timed"] < counts["evaluated_samples"]:
        lines.append(f"Late requests are counted over the {counts['evaluated_timed']} samples that were timed.")
    return Text("\n".join([*report.notes, *lines, ""]))  # no markup: notes name extras in brackets


def ranking_table(report: CompareReport) -> Table:
    """Accuracy against the lookup table and the best other policy, and mean latency against the fastest other."""
    shares = ", ".join(f"{share:.3g}" for share in report.room_budget_shares)
    target = f"{100 * report.options['evaluation']['accuracy_shares'][0]:g}%"
    columns = [
        "rank",
        "points over\nlookup table",
        "points over\nbest other",
        "visible\nroom",
        "hindsight\nroom",
        "late",
    ]
    title = f"Mean over the budgets {shares} x full, and mean latency at {target} of {report.accuracy_of} accuracy"
    table = new_table(title, [*columns, f"latency at\n{target}", "latency over\nfastest other"], caption=UNRANKED)
    rows, ranks = report.section("policies"), report.ranks
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [str(ranks.get(row.key, "")), *_ranking_cells(row)]
        add_policy(table, row, cells, end_section=following is not None and _group(row) != _group(following))
    return table


def _ranking_cells(row: ComparisonRow) -> list[str]:
    room, bound = row.room, row.knows_more
    if room is None and not row.at_accuracy:
        return [row.status, *[""] * 6]
    under = [UNKNOWN, "", "", "", UNKNOWN] if room is None else [
        _points(room.accuracy_gain), "" if bound else _points(row.vs_best_other), _share(room.visible_room_closed),
        _share(room.room_closed), f"{100 * room.violation_rate.value:.1f}%",
    ]  # fmt: skip
    return [*under, _ms(row), "" if bound else _relative(row.faster)]


def detail_table(report: CompareReport) -> Table:
    """Accuracy by budget, regret, and what a policy costs."""
    rows = [row for row in report.section("policies") if row.at_budget]
    title = "Accuracy (%) under a budget; regret: points that hindsight has more; time to learn and to decide"
    budgets = [f"{time_text(at.budget_ms)}\n{at.budget_share:.3g} x" for at in rows[0].at_budget]
    table = new_table(title, [*budgets, "regret", "learnt\nin s", "decision\nin µs"])
    for row in rows:
        accuracies = [f"{100 * at.accuracy.value:.1f}" for at in row.at_budget]
        regret = "" if row.regret is None else f"{100 * row.regret:.1f}"
        costs = ["", ""] if row.knows_more else [f"{row.fit_seconds or 0:.1f}", f"{row.decision_us or 0:.0f}"]
        add_policy(table, row, [*accuracies, regret, *costs])
    return table


def left_out_table(report: CompareReport, section: str) -> Table:
    """What each set of knobs, part of the features or number of samples gives: one row for each variant.

    There is one column for each policy, two where it takes a price.
    """
    rows = report.section(section)
    named = {row.key: row.name.partition(" [")[0] for row in rows}
    priced = {row.key for row in rows if row.at_accuracy}
    columns = []
    for key, name in named.items():
        columns += [f"{name}\npoints", "\nlatency"] if key in priced else [f"{name}\npoints"]
    table = new_table(TITLES[section], columns, first=section)
    for variant in _variants(rows, section):
        cells = []
        for key in named:
            row = report.row(key, variant)
            cells.append("" if row is None else _points(row.room.accuracy_gain) if row.room else row.status)
            if key in priced:
                cells.append(UNKNOWN if row is None else _ms(row))
        table.add_row(VARIANT_NAMES.get((section, variant), variant), *cells)
    return table


def _variants(rows: Sequence[ComparisonRow], section: str) -> list[str]:
    """The variants of a section in the order of its table; "" is the policy in full."""
    names = list(dict.fromkeys(row.variant for row in rows))
    if section == "knobs":
        names.sort(key=lambda name: len(name.split("+")))
    return ["", *names] if section == "features" else [*names, ""]


def _group(row: ComparisonRow) -> tuple[bool, bool]:
    return row.knows_more, row.competes


def _points(number: Estimate | None) -> str:
    if number is None or number.low == number.high == 0:
        return UNKNOWN
    return f"{100 * number.value:+z.1f} ±{half_width(number):.1f}"


def _relative(saved: Estimate | None) -> str:
    """A saving as the change in latency that it is."""
    return UNKNOWN if saved is None else f"{-100 * saved.value:+z.0f}% ±{half_width(saved):.0f}"


def _ms(row: ComparisonRow) -> str:
    """Mean latency at the first accuracy target; a dash where it is not reached."""
    found = row.first_latency
    return UNKNOWN if found is None else time_text(found.value, (found.high - found.low) / 2)


def _share(number: Estimate | None) -> str:
    if number is None:
        return UNKNOWN
    return "< -100%" if number.value < -1 else f"{100 * number.value:.0f}%"
