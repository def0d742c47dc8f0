"""Whether a controller for several data sets sacrifices one of them to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.outcomes import OWN, OWN_NOTE, Contender, outcomes
from budgetvlm.evaluation.records import PolicyFigures
from budgetvlm.features import Features
from budgetvlm.policies import Policy
from budgetvlm.policies.budget_grid import grid_and_notes
from budgetvlm.table import ProfileTable

SACRIFICED = 1.0  # points below a controller of its own that a data set may be


def on_data_sets(
    table: ProfileTable, features: Features, policy: Policy, own: Policy, options: EvaluationOptions
) -> tuple[PolicyFigures, ...]:
    """Accuracy of a policy and of its data sets' own controllers on each data set, and nothing else.

    Raises DataError: a split, features or measurements are missing.
    """
    data = EvaluationData.of(table, features, options)
    shares, _ = grid_and_notes(options.budget_shares, data.test_bounds_ms, data.means.reference_ms)
    requests = data.under_budgets(shares, options.price)
    contenders = (
        Contender("controller", "controller", (policy,), "for all data sets"),
        Contender(OWN, "labels", (own,), OWN_NOTE),
    )
    ceiling = CeilingMetrics.measure(data, shares, {one.name: outcomes(one, requests) for one in contenders})
    room = options.room_shares if shares == options.budget_shares else shares
    return tuple(
        PolicyFigures(name=c.name, role=c.role, runs=1, note=c.note, on_dataset=ceiling.on_datasets(c.name, room))
        for c in contenders
    )


def said_of_data_sets(results: Sequence[PolicyFigures]) -> Iterator[str]:
    """Yield a sentence where one data set is sacrificed to the others, or that none is; needs their own controllers."""
    known = [on for on in results[0].on_dataset if on.vs_own is not None] if results else []
    if not known:
        return
    worst = min(known, key=lambda on: on.vs_own.value if on.vs_own else 0.0)
    assert worst.vs_own is not None
    points, low, high = (100 * share for share in (worst.vs_own.value, worst.vs_own.low, worst.vs_own.high))
    found = f"{worst.dataset} is {points:+z.1f} points [{low:+z.1f}, {high:+z.1f}] from a controller of its own"
    if points < -SACRIFICED:
        yield f"A data set is sacrificed: {found}. Profile more of its samples, or give it that controller."
    else:
        yield f"No data set is sacrificed: the worst of them, {found}."
