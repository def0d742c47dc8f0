"""Which settings are chosen for which inputs: by budget, by group, and for samples that can be looked at."""

from __future__ import annotations

import numpy as np

from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.html_report.blocks import BarChart, Bars, Block, Example, Gallery, HeatMap, Row, Section, Text
from budgetvlm.html_report.choices import Choices, Picked, pick_examples
from budgetvlm.html_report.looks import ladder
from budgetvlm.html_report.report_data import Material, Shown
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import column_means

SORTS = {
    "easy": "Easy: right at the cheapest setting and at most others",
    "hard": "Hard: right only at dear settings",
    "never right": "Right at no setting",
}


def choices(material: Material) -> Section:
    """Charts and pictures; a sentence where no controller was given."""
    found = material.choices
    if found is None:
        text = "No controller was given (--checkpoint DIR), so nothing is chosen."
        return Section("choices", "Which settings for which inputs", (Text(text),))
    blocks: list[Block] = [Row(tuple(_knob_chart(found, name) for name in _moving(found.table.knob_space)))]
    if found.groups:
        blocks.append(_group_map(found))
    blocks += _galleries(material, found)
    return Section("choices", "Which settings for which inputs", tuple(blocks))


def _moving(space: KnobSpace) -> tuple[str, ...]:
    """Knobs with more than one value."""
    return tuple(name for name in space.names if len(space.values(name)) > 1) or space.names[:1]


def _knob_chart(found: Choices, knob: str) -> BarChart:
    everything = np.ones(found.table.num_samples, dtype=bool)
    shares = np.array([found.values(knob, everything, p) for p in range(len(found.shares))])
    values = found.table.knob_space.values(knob)
    bars = tuple(
        Bars(f"{value:g}", tuple(float(100 * share) for share in shares[:, i]), colour)
        for i, (value, colour) in enumerate(zip(values, ladder(len(values)), strict=True))
    )
    names = tuple(f"{b:.0f} ms" for b in found.budgets_ms)
    return BarChart(
        f"chosen_{knob}", f"{knob} by budget", "share of the evaluated samples", "budget", "chosen (%)", names, bars,
        stacked=True,
    )  # fmt: skip


def _group_map(found: Choices) -> HeatMap:
    p, knobs = found.middle(), _moving(found.table.knob_space)
    columns = [f"{knob} {value:g}" for knob in knobs for value in found.table.knob_space.values(knob)]
    cells = [
        tuple(100 * share for knob in knobs for share in found.values(knob, rows, p)) for rows in found.groups.values()
    ]
    title = f"What is chosen for which group, at {found.budgets_ms[p]:.0f} ms ({found.shares[p]:g} × full)"
    return HeatMap(
        "chosen_by_group", title,
        "% of the group's samples; each knob's values add up to 100", "", "", tuple(columns), tuple(found.groups),
        tuple(cells), "%", 0,
    )  # fmt: skip


def _galleries(material: Material, found: Choices) -> list[Block]:
    picked = [p for p in pick_examples(found.table) if found.table.sample_ids[p.row] in material.shown]
    galleries: list[Block] = []
    for why, caption in SORTS.items():
        examples = tuple(
            _example(found, p, material.shown[found.table.sample_ids[p.row]]) for p in picked if p.why == why
        )
        if examples:
            galleries.append(Gallery(caption, examples))
    return galleries


def _example(found: Choices, picked: Picked, shown: Shown) -> Example:
    """A sample, its cheapest right setting, and what the first controller chooses at three budgets."""
    table, row = found.table, picked.row
    right = np.flatnonzero(table.accuracy[row] >= 0.5)
    lines = [f"right: {', '.join(shown.answers)}"]
    if len(right):
        best = right[column_means(table.latency_ms)[right].argmin()]
        lines.append(
            f"cheapest right setting: {_short(table.knob_space, int(best))} ({len(right)} of {table.num_settings} are)"
        )
    for p in sorted({0, found.middle(), len(found.shares) - 1}):
        k = int(found.found.chosen[0, p, row])
        mark = "✓" if found.found.accuracy[0, p, row] >= 0.5 else "✗"
        took = float(found.found.latency_ms[0, p, row])
        late = ", late" if took > found.budgets_ms[p] else ""
        lines.append(f"{found.budgets_ms[p]:.0f} ms: {_short(table.knob_space, k)} {mark} {took:.0f} ms{late}")
    labels = " · ".join(table.groups[label][row] for label in readable_labels(table))
    return Example(shown.picture, labels or table.sample_ids[row], shown.question, tuple(lines))


def _short(space: KnobSpace, index: int) -> str:
    return " / ".join(f"{value:g}" for value in space.settings[index].values())
