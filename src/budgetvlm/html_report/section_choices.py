"""Which settings are chosen for which inputs: by budget, by group, and for samples with their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm._io import time_text
from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.html_report.controller_choices import ControllerChoices, value_shares
from budgetvlm.html_report.report_chart import ReportChart, ReportSection, bar_figure, bars, heat_figure, shades
from budgetvlm.html_report.report_inputs import ReportInputs, SamplePicture
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import column_means
from budgetvlm.table import ProfileTable

KINDS = {
    "easy": "Easy: right at the cheapest setting and at most others",
    "hard": "Hard: right only at expensive settings",
    "never right": "Right at no setting",
}


def choices(inputs: ReportInputs) -> ReportSection:
    """Charts and samples of what the controllers choose."""
    title, found = "Which settings for which inputs", inputs.choices
    if found is None:
        return ReportSection("choices", title, values={"galleries": {}})
    charts = [tuple(_knob_chart(found, name) for name in moving_knobs(found.table.knob_space))]
    if found.groups:
        charts.append((_group_map(found),))
    return ReportSection("choices", title, tuple(charts), {"galleries": _galleries(inputs, found)})


def moving_knobs(space: KnobSpace) -> tuple[str, ...]:
    """Knobs with more than one value, or the first one where there is none."""
    return tuple(name for name in space.names if len(space.values(name)) > 1) or space.names[:1]


def _knob_chart(found: ControllerChoices, knob: str) -> ReportChart:
    everything = np.ones(found.table.num_samples, dtype=bool)
    shares = [value_shares(found, knob, everything, p) for p in range(len(found.shares))]  # [P][values]
    values, budgets = found.table.knob_space.values(knob), [time_text(b) for b in found.budgets_ms]
    traces = [
        bars(f"{value:g}", budgets, [100 * share for share in column], colour)
        for value, column, colour in zip(values, zip(*shares, strict=True), shades(len(values)), strict=True)
    ]
    figure = bar_figure(traces, "budget", "chosen (%)", stacked=True)
    return ReportChart(f"chosen_{knob}", f"{knob} by budget", figure, "share of the evaluated samples")


def _group_map(found: ControllerChoices) -> ReportChart:
    middle, space = found.middle, found.table.knob_space
    knobs = moving_knobs(space)
    columns = [f"{knob} {value:g}" for knob in knobs for value in space.values(knob)]
    cells = [
        [100 * share for knob in knobs for share in value_shares(found, knob, rows, middle)]
        for rows in found.groups.values()
    ]
    budget = f"{time_text(found.budgets_ms[middle])} ({found.shares[middle]:g} × full)"
    figure = heat_figure(columns, list(found.groups), cells, "%", digits=0)
    note = "% of the group's samples; each knob's values add up to 100"
    return ReportChart("chosen_by_group", f"What is chosen for which group, at {budget}", figure, note)


def _galleries(inputs: ReportInputs, found: ControllerChoices) -> dict[str, list[SampleCard]]:
    """Caption -> cards of the picked samples whose picture is there."""
    galleries: dict[str, list[SampleCard]] = {}
    for picked in pick_samples(found.table):
        picture = inputs.pictures.get(found.table.sample_ids[picked.row])
        if picture is not None:
            galleries.setdefault(KINDS[picked.kind], []).append(sample_card(found, picked.row, picture))
    return galleries


@dataclass(frozen=True)
class PickedSample:
    """The row of a sample to show and its kind: "easy", "hard" or "never right"."""

    row: int
    kind: str


@dataclass(frozen=True)
class SampleCard:
    """A sample with its picture, its labels and lines about its settings."""

    picture: SamplePicture
    labels: str
    lines: tuple[str, ...]


def pick_samples(table: ProfileTable, each: int = 3) -> list[PickedSample]:
    """Pick easy, hard and hopeless samples, where possible from different images and groups.

    Easy samples are right at the cheapest setting and at most others; hard ones only at expensive settings.

    Args:
        table: samples that were measured at every setting.
        each: how many easy and how many hard ones.
    """
    right = table.accuracy >= 0.5
    cost = np.nan_to_num(column_means(table.latency_ms), nan=np.inf)
    cheapest_right = np.where(right, cost, np.inf).min(axis=1)  # in ms, infinite where no setting is right
    share, solved, at_cheapest = right.mean(axis=1), np.isfinite(cheapest_right), right[:, cost.argmin()]
    by_share = np.argsort(-share, kind="stable")
    by_cost = np.lexsort((share, -np.where(solved, cheapest_right, -np.inf)))
    kinds = (
        ("easy", by_share[at_cheapest[by_share]], each),
        ("hard", by_cost[(solved & ~at_cheapest)[by_cost]], each),
        ("never right", np.flatnonzero(~solved), max(1, each // 3)),
    )
    return [PickedSample(row, kind) for kind, rows, count in kinds for row in _varied(table, rows.tolist(), count)]


def _varied(table: ProfileTable, rows: Sequence[int], count: int) -> list[int]:
    """The first rows whose unit and labels are new; any rows where these run out."""
    labels = [table.groups[name] for name in readable_labels(table)]
    taken: list[int] = []
    seen: set[object] = set()
    for row in rows:
        marks: set[object] = {("unit", table.units[row])}
        if labels:
            marks.add(("labels", *(label[row] for label in labels)))
        if not marks & seen:
            taken.append(row)
            seen |= marks
    return [*taken, *(row for row in rows if row not in taken)][:count]


def sample_card(choices: ControllerChoices, row: int, picture: SamplePicture) -> SampleCard:
    """A sample with its cheapest right setting and the first controller's choice at three budgets."""
    table, found = choices.table, choices.outcomes
    right = np.flatnonzero(table.accuracy[row] >= 0.5)
    lines = [f"right: {', '.join(picture.answers)}"]
    if len(right):
        best = right[column_means(table.latency_ms)[right].argmin()]
        setting = _short(table.knob_space, int(best))
        lines.append(f"cheapest right setting: {setting} ({len(right)} of {table.num_settings} are)")
    for p in sorted({0, choices.middle, len(choices.shares) - 1}):
        mark = "✓" if found.accuracy[0, p, row] >= 0.5 else "✗"
        took, budget = float(found.latency_ms[0, p, row]), choices.budgets_ms[p]
        setting = _short(table.knob_space, int(found.chosen[0, p, row]))
        lines.append(f"{time_text(budget)}: {setting} {mark} {time_text(took)}{', late' if took > budget else ''}")
    labels = " · ".join(table.groups[label][row] for label in readable_labels(table))
    return SampleCard(picture, labels or table.sample_ids[row], tuple(lines))


def _short(space: KnobSpace, index: int) -> str:
    return " / ".join(f"{value:g}" for value in space.settings[index].values())
