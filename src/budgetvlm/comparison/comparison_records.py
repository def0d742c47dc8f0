"""What a comparison found: frozen records, one JSON document. Accuracies are shares; times are ms if not named."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetvlm.evaluation.records import AtAccuracy, AtBudget, Estimate, Room, plain

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ComparisonRow:
    """One policy, in full or with something left out; means over its seeds.

    Attributes:
        key: in the roster. variant: what is left out, "" for nothing. section: see `CompareOptions`.
        status, note: "ok", or why there are no figures.
        at_budget, room, at_accuracy: see `budgetvlm.evaluation.records`.
        regret: accuracy that the oracle has more, mean over the room budgets.
        best_other, vs_best_other: the best competitor but this one, and the paired difference in accuracy from it.
        fastest_other, faster: the same for mean latency at the first accuracy target; one minus its ratio.
        fit_seconds: of one seed's learning; decision_us: median of single decisions.
    """

    key: str
    name: str
    role: str
    section: str
    variant: str
    status: str
    note: str
    runs: int
    at_budget: tuple[AtBudget, ...] = ()
    room: Room | None = None
    comparable: bool = False
    regret: float | None = None
    at_accuracy: tuple[AtAccuracy, ...] = ()
    best_other: str | None = None
    vs_best_other: Estimate | None = None
    fastest_other: str | None = None
    faster: Estimate | None = None
    fit_seconds: float | None = None
    decision_us: float | None = None

    @property
    def gain(self) -> float:
        """Mean accuracy over the lookup table's; minus infinity without figures."""
        return self.room.accuracy_gain.value if self.room else -float("inf")

    @property
    def competes(self) -> bool:
        """Whether it may be called the best: no bound, and within the budgets as the lookup table is."""
        return self.status == "ok" and self.role != "bound" and self.comparable

    @property
    def latency_ms(self) -> float | None:
        """Mean latency at the first accuracy target, where it is reached."""
        found = self.at_accuracy[0].latency_ms if self.at_accuracy else None
        return found.value if found else None


@dataclass(frozen=True)
class CompareReport:
    """The whole comparison; ``rows`` of section "policies" from best to worst, then the others.

    Attributes: as of `budgetvlm.evaluation.records.EvaluationReport`; ``notes`` are sentences about what is missing.
    """

    split: str
    counts: dict[str, int]
    latency_reference_ms: float
    full_accuracy: float
    room_budget_shares: tuple[float, ...]
    options: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    schema_version: int = SCHEMA_VERSION

    def section(self, name: str) -> tuple[ComparisonRow, ...]:
        """Rows of one section, in order."""
        return tuple(row for row in self.rows if row.section == name)

    def row(self, key: str, variant: str = "") -> ComparisonRow | None:
        """The row of a policy, if there is one."""
        return next((row for row in self.rows if row.key == key and row.variant == variant), None)

    def rank(self, key: str) -> int | None:
        """Place among the competitors by accuracy under a budget, 1 for the best."""
        order = [row.key for row in self.section("policies") if row.competes]
        return order.index(key) + 1 if key in order else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; NaN becomes None."""
        document: dict[str, Any] = plain(dataclasses.asdict(self))
        return document

    def table(self) -> str:
        """All tables as plain text."""
        from budgetvlm.comparison.comparison_tables import plain_text

        return plain_text(self)

    def plot(self, path: str | Path) -> None:
        """Draw the ranking into a PNG file. Raises OutputError."""
        from budgetvlm.comparison.gains_plot import plot_comparison

        plot_comparison(self, path)
