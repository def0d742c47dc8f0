"""A comparison as tables for people: on a terminal with rich, elsewhere as plain text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetvlm.comparison.comparison_records import CompareReport, ComparisonRow
from budgetvlm.evaluation.records import Estimate

WIDTH = 144  # what the widest table needs; a narrower terminal wraps lines rather than losing digits
VIEW_NAMES = {"": "image and question", "labels": "true labels instead"}


def plain_text(report: CompareReport, width: int = WIDTH) -> str:
    """All tables without colours, for files and pipes."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable(report))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def renderable(report: CompareReport) -> RenderableType:
    """All tables, one below the other."""
    parts: list[RenderableType] = [_heading(report), ranking_table(report), detail_table(report)]
    if report.section("knobs"):
        parts.append(knobs_table(report))
    if report.section("features"):
        parts.append(features_table(report))
    if report.section("samples"):
        parts.append(samples_table(report))
    return Group(*parts)


def _heading(report: CompareReport) -> Text:
    counts = report.counts
    predicted = counts["evaluated_samples"] - counts["evaluated_timed"]
    lines = [
        f"{counts['evaluated_samples']} samples of {counts['evaluated_images']} images, split {report.split}; "
        f"{counts['settings']} settings. Full setting: accuracy {100 * report.full_accuracy:.1f}%, median "
        f"{report.latency_reference_ms:.1f} ms. Seeds: {', '.join(map(str, report.options['seeds']))}. "
        f"±: half of the {100 * report.options['evaluation']['level']:g}% interval, over images.",
    ]
    if predicted and counts["evaluated_timed"]:
        lines.append(f"Late requests are counted over the {counts['evaluated_timed']} samples that were timed.")
    return Text("\n".join([*lines, *report.notes, ""]))  # no markup: notes name extras in brackets


def ranking_table(report: CompareReport) -> Table:
    """Both faces, each against the lookup table and against the best other policy."""
    shares = ", ".join(f"{share:g}" for share in report.room_budget_shares)
    target = 100 * report.options["evaluation"]["accuracy_shares"][0]
    table = _table(f"Mean over the budgets {shares} x full, and mean latency at {target:g}% of the full accuracy")
    table.add_column("", justify="right")
    table.add_column("policy", no_wrap=True)
    for title in ("points over\nlookup table", "points over\nbest other", "visible\nroom", "hindsight\nroom", "late"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(f"ms at\n{target:g}%", justify="right", no_wrap=True)
    table.add_column("latency over\nfastest other", justify="right", no_wrap=True)
    rows = report.section("policies")
    rank = 0
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        rank += row.competes
        table.add_row(
            str(rank) if row.competes else "", _name(row), *_ranking_cells(row), style=_style(row),
            end_section=following is not None and _group(row) != _group(following),
        )  # fmt: skip
    return table


def _ranking_cells(row: ComparisonRow) -> list[str]:
    if row.room is None:
        return [row.status, *[""] * 6]
    room = row.room
    return [
        _points(room.accuracy_gain),
        _points(row.vs_best_other) if row.role != "bound" else "",
        _share(room.visible_room_closed),
        _share(room.room_closed),
        f"{100 * room.violation_rate.value:.1f}%",
        _ms(row),
        _relative(row.faster) if row.role != "bound" else "",
    ]


def detail_table(report: CompareReport) -> Table:
    """Accuracy by budget, regret, and what a policy costs."""
    rows = [row for row in report.section("policies") if row.at_budget]
    table = _table("Accuracy (%) under a budget; regret: points that hindsight has more; time to learn and to decide")
    table.add_column("policy", no_wrap=True)
    for at in rows[0].at_budget:
        table.add_column(f"{at.budget_ms:.4g} ms\n{at.budget_share:.3g} x", justify="right", no_wrap=True)
    for title in ("regret", "learnt\nin s", "decision\nin µs"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        accuracies = [f"{100 * at.accuracy.value:.1f}" for at in row.at_budget]
        regret = "" if row.regret is None else f"{100 * row.regret:.1f}"
        costs = ["", ""] if row.role == "bound" else [f"{row.fit_seconds or 0:.1f}", f"{row.decision_us or 0:.0f}"]
        table.add_row(_name(row), *accuracies, regret, *costs, style=_style(row))
    return table


def knobs_table(report: CompareReport) -> Table:
    """What each set of knobs gives, all others at their largest value."""
    names = {row.variant: len(row.variant.split("+")) for row in report.section("knobs")}
    variants = [*sorted(names, key=lambda name: names[name]), ""]
    title = "Knobs that may move: points over the lookup table with all knobs, and ms at equal accuracy"
    every = "all knobs"
    return _by_variant(report, title, "knobs", variants, lambda variant: variant or every)


def features_table(report: CompareReport) -> Table:
    """What each part of the features gives."""
    variants = ["", *dict.fromkeys(row.variant for row in report.section("features"))]
    title = "Features that are read: points over the lookup table, and ms at equal accuracy"
    return _by_variant(report, title, "features", variants, lambda variant: VIEW_NAMES.get(variant, variant))


def samples_table(report: CompareReport) -> Table:
    """Sample efficiency: accuracy with fewer samples, against the lookup table that has them all."""
    variants = [*dict.fromkeys(row.variant for row in report.section("samples")), ""]
    title = "Training and validation samples: points over the lookup table that has them all, and ms at equal accuracy"
    return _by_variant(report, title, "samples", variants, lambda variant: variant or "all")


def _by_variant(
    report: CompareReport, title: str, first: str, variants: Sequence[str], label: Callable[[str], str]
) -> Table:
    """A row a variant, two columns a policy."""
    section = report.section(first)
    keys = list(dict.fromkeys(row.key for row in section))
    named = {row.key: row.name.partition(" [")[0] for row in section}
    table = _table(title)
    table.add_column(first, no_wrap=True)
    priced = {row.key for row in section if row.at_accuracy}
    for key in keys:
        table.add_column(f"{named[key]}\npoints", justify="right", no_wrap=True)
        if key in priced:
            table.add_column("\nms", justify="right", no_wrap=True)
    for variant in variants:
        cells = []
        for key in keys:
            row = report.row(key, variant)
            cells.append("" if row is None else _points(row.room.accuracy_gain) if row.room else row.status)
            if key in priced:
                cells.append("-" if row is None else _ms(row))
        table.add_row(label(variant), *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1))


def _group(row: ComparisonRow) -> tuple[bool, bool]:
    return row.role == "bound", row.competes


def _name(row: ComparisonRow) -> str:
    return f"{row.name} (bound)" if row.role == "bound" else row.name


def _style(row: ComparisonRow) -> str:
    return {"controller": "bold green", "variant": "green", "bound": "dim"}.get(row.role, "")


def _points(number: Estimate | None) -> str:
    if number is None or number.low == number.high == 0:
        return "-"
    return f"{100 * number.value:+.1f} ±{50 * (number.high - number.low):.1f}"


def _relative(saved: Estimate | None) -> str:
    """A saving as the change in latency that it is."""
    if saved is None:
        return "-"
    return f"{-100 * saved.value:+.0f}% ±{50 * (saved.high - saved.low):.0f}"


def _ms(row: ComparisonRow) -> str:
    """Mean latency at the first accuracy target; a dash where it is not reached."""
    found = row.at_accuracy[0].latency_ms if row.at_accuracy else None
    return "-" if found is None else f"{found.value:.1f} ±{(found.high - found.low) / 2:.1f}"


def _share(number: Estimate | None) -> str:
    if number is None:
        return "-"
    return "< -100%" if number.value < -1 else f"{100 * number.value:.0f}%"
