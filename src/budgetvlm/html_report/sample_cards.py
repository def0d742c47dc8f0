"""Picks samples that show when settings matter, and says what is right and what is chosen for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.labels import readable_labels
from budgetvlm.html_report.controller_choices import ControllerChoices
from budgetvlm.html_report.report_inputs import SamplePicture
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import column_means
from budgetvlm.table import ProfileTable


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
    """The first rows whose image and labels are new; any rows where these run out."""
    labels = [table.groups[name] for name in readable_labels(table)]
    images = table.groups.get("image_id", table.sample_ids)
    taken: list[int] = []
    seen: set[object] = set()
    for row in rows:
        marks: set[object] = {("image", images[row])}
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
        lines.append(f"{budget:.0f} ms: {setting} {mark} {took:.0f} ms{', late' if took > budget else ''}")
    labels = " · ".join(table.groups[label][row] for label in readable_labels(table))
    return SampleCard(picture, labels or table.sample_ids[row], tuple(lines))


def _short(space: KnobSpace, index: int) -> str:
    return " / ".join(f"{value:g}" for value in space.settings[index].values())
