"""The budgets and prices that a controller was trained on; beyond them it is told the nearest ones that it knows.

What is allowed and what time costs stay those of the request: the guard takes the true budget, and the true price is
taken off every setting's value. Only the values themselves, which are expected accuracies, are those at the nearest
budget and price, so that outside of its training a controller is a prediction with the best allowed setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.controller.training_options import StatePlan


@dataclass(frozen=True)
class KnownTerms:
    """What training drew from.

    Attributes:
        budgets: the least and the most, as shares of the full setting's time. No limit is infinity; where it was among
            them, so is every large budget, because beyond the largest bound all of them look the same.
        prices: the least and the most; no price at all is known where any is.
    """

    budgets: tuple[float, float] = (0.0, math.inf)
    prices: tuple[float, float] = (0.0, math.inf)

    @classmethod
    def of_plan(cls, plan: StatePlan, latency_shares: Sequence[float]) -> KnownTerms:
        """What a plan draws, where the settings take these shares of the full setting's time, all above 0."""
        ends = list(plan.wide_range) if plan.wide_share > 0 else []
        if plan.wide_share < 1:
            ends += [factor * share for factor in plan.budget_factors for share in latency_shares]
        priced = plan.price_share > 0
        prices = [plan.default_price, *(plan.price_range if priced else ())]
        return cls((min(ends), math.inf if priced else max(ends)), (min(prices), max(prices)))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> KnownTerms:
        """The terms of a `to_dict` document."""
        (least, most), prices = document["budgets"], document["prices"]
        return cls((least, math.inf if most is None else most), tuple(prices))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able document."""
        least, most = self.budgets
        return {"budgets": [least, most if most < math.inf else None], "prices": list(self.prices)}

    def hold(self, budget_share: float, price: float) -> bool:
        """Whether a budget and a price lie within."""
        return self.budgets[0] <= budget_share <= self.budgets[1] and price <= self.prices[1]


class Trained(Protocol):
    """What is read of a controller."""

    latency_ms: Tensor
    latency_reference_ms: Tensor
    trained_on: TrainedOn


def known_terms(controller: Trained) -> KnownTerms:
    """Of a trained controller; one that does not say what it was trained on was trained by the usual plan."""
    if controller.trained_on.terms:
        return KnownTerms.from_dict(controller.trained_on.terms)
    shares = (controller.latency_ms / controller.latency_reference_ms)[controller.latency_ms > 0]
    return KnownTerms.of_plan(StatePlan(), shares.tolist()) if len(shares) else KnownTerms()


def nearest(controller: Trained, budget: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """The budgets in ms and the prices that a controller knows and that are nearest to these."""
    known = known_terms(controller)
    least, most = (share * float(controller.latency_reference_ms) for share in known.budgets)
    return budget.clamp(least, most), price.clamp(*known.prices)
