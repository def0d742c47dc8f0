"""Other budgets or another price: nothing is trained, and what is known of them is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from budgetvlm.adaptation.new_machine import require_its_profile
from budgetvlm.controller.known_terms import known_terms
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.policy import ControllerPolicy
from budgetvlm.evaluation.ceiling import CeilingMetrics
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.evaluation.evaluator import under_budgets
from budgetvlm.evaluation.outcomes import LOOKUP, Contender
from budgetvlm.evaluation.records import AtBudget
from budgetvlm.features import Features
from budgetvlm.policies import LookupTable
from budgetvlm.table import ProfileTable


def at_terms(
    controller: GRPOController,
    budgets_ms: Sequence[float],
    price: float,
    table: ProfileTable,
    features: Features,
    split: str = "validation",
) -> list[dict[str, Any]]:
    """What a controller is worth at budgets and a price on held-out samples, one JSON-able record for each budget.

    Each says whether the controller extrapolates there, how many settings are allowed, and accuracy, mean time and late
    samples with 95% intervals; beside it what it gains over the lookup table, which the same guard guards.

    Args:
        table, features: with splits, whose ``split`` is reported.
    """
    known, reference_ms = known_terms(controller), float(controller.latency_reference_ms)
    shares = tuple(ms / reference_ms for ms in sorted(set(budgets_ms)))
    options = EvaluationOptions(split=split, budget_shares=shares, price=price, labels=())
    data = EvaluationData.of(table, features, options)
    require_its_profile(controller, data.means.reference_ms)
    contenders = [
        Contender("controller", "controller", (ControllerPolicy(controller),), ""),
        Contender(LOOKUP, "baseline", (LookupTable(data.means),), ""),
    ]
    measured = CeilingMetrics.measure(data, shares, under_budgets(data, contenders, options))
    allowed = [(data.test_bounds_ms <= share * reference_ms).sum(axis=1).mean() for share in shares]
    return [
        {"extrapolates": not known.hold(at.budget_share, price), "allowed": float(count), **_figures(at)}
        for at, count in zip(measured.at_budgets("controller"), allowed, strict=True)
    ]


def _figures(at: AtBudget) -> dict[str, Any]:
    estimates = {
        "accuracy": at.accuracy, "vs_lookup": at.vs_lookup, "mean_ms": at.mean_ms, "late": at.violation_rate,
    }  # fmt: skip
    found = {name: [one.value, one.low, one.high] for name, one in estimates.items()}
    return {"budget_ms": at.budget_ms, "budget_share": at.budget_share, **found, "setting": at.settings[0].setting}
