"""The rows of a comparison: what the choices of all cells are worth, each compared with the best of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from budgetvlm.comparison.comparison_records import ComparisonRow
from budgetvlm.comparison.fits import OK, Cell
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.mean_budget import MeanBudgetMetrics, PriceSweep
from budgetvlm.evaluation.outcomes import BLIND, BLIND_NOTE, ORACLE, Outcomes
from budgetvlm.table import ProfileTable


def comparison_rows(
    cells: Sequence[Cell], data: EvaluationData, options: EvaluationOptions
) -> tuple[tuple[ComparisonRow, ...], tuple[str, ...]]:
    """One row for the cells of each name: the section "policies" from best to worst, then the other sections.

    Then the sentences about what their figures cannot say.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.spec.name, []).append(cell)
    made = {name: group for name, group in groups.items() if all(cell.status == OK for cell in group)}
    metrics = _Metrics.measure(made, data, options)
    rows = [metrics.row(group) for group in groups.values()]
    main = [*(row for row in rows if row.section == "policies"), metrics.blind_row()]
    compared = [metrics.compared(row, [other for other in main if other is not row]) for row in main]
    ordered = (*sorted(compared, key=_order), *(row for row in rows if row.section != "policies"))
    return ordered, (*metrics.ceiling.notes(options.room_shares), *metrics.mean_budget.notes())


def _order(row: ComparisonRow) -> tuple[bool, bool, float]:
    """Competitors from best to worst, then those that break budgets or have no figures, then the bounds."""
    return row.knows_more, not row.competes, -row.gain


@dataclass(frozen=True, eq=False)
class _Metrics:
    """What all finished cells are worth, under a ceiling and under a mean budget."""

    options: EvaluationOptions
    ceiling: CeilingMetrics
    mean_budget: MeanBudgetMetrics

    @classmethod
    def measure(cls, made: dict[str, list[Cell]], data: EvaluationData, options: EvaluationOptions) -> _Metrics:
        """Look up the cells' choices in the evaluated samples."""
        under = {name: cell_outcomes(group, "budgets", data.test) for name, group in made.items()}
        sweeps = {
            name: PriceSweep(
                options.swept,
                cell_outcomes(group, "tuning_prices", data.tuning),
                cell_outcomes(group, "prices", data.test),
            )
            for name, group in made.items()
            if group[0].spec.entry.priced
        }
        ceiling = CeilingMetrics.measure(data, options.budget_shares, under)
        return cls(options, ceiling, MeanBudgetMetrics.measure(data, options, sweeps))

    def row(self, group: Sequence[Cell]) -> ComparisonRow:
        """One policy's figures, means over its seeds; or why there are none."""
        spec, entry, name = group[0].spec, group[0].spec.entry, group[0].spec.name
        bad = next((cell for cell in group if cell.status != OK), None)
        row = ComparisonRow(
            key=entry.key, name=name, role=entry.role, section=spec.section, variant=spec.variant,
            status=bad.status if bad else OK, note=bad.note if bad else entry.note, runs=len(group),
        )  # fmt: skip
        if bad:
            return row
        shares = self.options.room_shares
        return replace(
            row,
            at_budget=self.ceiling.at_budgets(name),
            room=self.ceiling.room(name, shares),
            on_dataset=self.ceiling.on_datasets(name, shares),
            comparable=self.ceiling.comparable(name, shares),
            regret=self.ceiling.gain(ORACLE, name, shares).value,
            at_accuracy=self.mean_budget.at_accuracy(name),
            at_mean_budget=self.mean_budget.at_mean_budget(name),
            fit_seconds=float(np.mean([cell.fit_seconds for cell in group])),
            decision_us=float(np.median([cell.decision_us for cell in group])),
        )

    def blind_row(self) -> ComparisonRow:
        """The best input-blind mix: it keeps no budget for each request, so it has a mean latency alone."""
        return ComparisonRow(
            key="mix", name=BLIND, role="baseline", section="policies", variant="", status=OK, note=BLIND_NOTE, runs=1,
            at_accuracy=self.mean_budget.at_accuracy(BLIND), at_mean_budget=self.mean_budget.at_mean_budget(BLIND),
        )  # fmt: skip

    def compared(self, row: ComparisonRow, others: Sequence[ComparisonRow]) -> ComparisonRow:
        """The row, compared with the best of the others by accuracy and with the fastest of them."""
        rivals = [other for other in others if other.competes]
        if row.room is not None and rivals:
            best = max(rivals, key=lambda other: other.gain)
            gain = self.ceiling.gain(row.name, best.name, self.options.room_shares)
            row = replace(row, best_other=best.name, vs_best_other=gain)
        timed = {o.name: o.first_latency.value for o in others if (o.competes or o.key == "mix") and o.first_latency}
        if row.first_latency is None or not timed:
            return row
        fastest = min(timed, key=lambda name: timed[name])
        faster = self.mean_budget.faster(row.name, fastest, self.options.accuracy_shares[0])
        return replace(row, fastest_other=fastest, faster=faster)


def cell_outcomes(group: Sequence[Cell], choices: str, table: ProfileTable) -> Outcomes:
    """What the seeds of one policy chose on a table; hindsight pays mean latencies."""
    chosen = np.stack([getattr(cell, choices) for cell in group]).astype(np.int64)
    return Outcomes.look_up(table, chosen, charged_expected=group[0].spec.name == ORACLE)
