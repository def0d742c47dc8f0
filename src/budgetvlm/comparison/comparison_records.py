"""What a comparison found, as frozen records that become one JSON document; times are in ms if not named otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from budgetvlm.evaluation.records import Estimate, HeldOutReport, PolicyFigures


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(PolicyFigures):
    """One policy, in full or with something left out; its figures are means over its seeds.

    Attributes:
        key: of its entry. variant: what is left out, "" for nothing. section: see `CompareOptions`.
        status: "ok", or why there are no figures; the note then says more.
        comparable: whether it breaks no more budgets than the lookup table, see `CeilingMetrics.comparable`.
        regret: accuracy that the oracle has more, mean over the room budgets.
        best_other, vs_best_other: the best competitor besides it, and the paired difference in accuracy from that.
        fastest_other, faster: the same for mean latency at the first accuracy target; one minus the ratio.
        fit_seconds: time to fit one seed. decision_us: median time of a single decision in microseconds.
    """

    key: str
    section: str
    variant: str
    status: str
    comparable: bool = False
    regret: float | None = None
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
        """Whether it may be called the best: it is no bound, and breaks no more budgets than the lookup table."""
        return self.status == "ok" and not self.knows_more and self.comparable


@dataclass(frozen=True, kw_only=True)
class CompareReport(HeldOutReport):
    """The whole comparison.

    Attributes:
        rows: those of the section "policies" from best to worst, then the others.
    """

    rows: tuple[ComparisonRow, ...]

    def section(self, name: str) -> tuple[ComparisonRow, ...]:
        """Rows of one section, in order."""
        return tuple(row for row in self.rows if row.section == name)

    def row(self, key: str, variant: str = "") -> ComparisonRow | None:
        """The row of a policy, if there is one."""
        return next((row for row in self.rows if row.key == key and row.variant == variant), None)

    @property
    def ranks(self) -> dict[str, int]:
        """Places of the competitors by accuracy under a budget, 1 for the best; policies that do alike share one."""
        competing, ranks = [row for row in self.section("policies") if row.competes], dict[str, int]()
        for place, row in enumerate(competing, 1):
            alike = next(other for other in competing if other.at_budget == row.at_budget)
            ranks[row.key] = ranks.get(alike.key, place)
        return ranks
