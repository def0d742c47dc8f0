"""Which settings are chosen for which inputs: by budget, by group, and for samples with their pictures."""

from __future__ import annotations

import numpy as np

from budgetvlm.html_report.controller_choices import ControllerChoices, value_shares
from budgetvlm.html_report.report_chart import ReportChart, ReportSection, bar_figure, bars, heat_figure, shades
from budgetvlm.html_report.report_inputs import ReportInputs
from budgetvlm.html_report.sample_cards import SampleCard, pick_samples, sample_card
from budgetvlm.knobs import KnobSpace

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
    values, budgets = found.table.knob_space.values(knob), [f"{b:.0f} ms" for b in found.budgets_ms]
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
    budget = f"{found.budgets_ms[middle]:.0f} ms ({found.shares[middle]:g} × full)"
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
