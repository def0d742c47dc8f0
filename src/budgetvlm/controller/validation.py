"""Measures a controller on samples that it was not trained on, by the settings that it chooses.

Shapes: V validation samples, K settings, C contexts (a budget and a price each).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from budgetvlm.controller.grpo import NEVER
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.reward import constrained_reward, guide_reward
from budgetvlm.controller.training_options import Objective, RewardWeights
from budgetvlm.controller.training_states import NO_LIMIT_MS
from budgetvlm.guard.static import StaticGuard
from budgetvlm.policies.setting_means import SettingMeans, column_means
from budgetvlm.table import ProfileTable

VALIDATION_BUDGET_SHARES = (0.35, 0.5, 0.6, 0.7, 0.85, 1.0)  # of the full setting's median latency
VALIDATION_PRICES = (0.03, 0.06, 0.1, 0.2, 0.4)  # prices that are validated without a budget
SMALLEST_ROOM = 1e-3  # below a tenth of a point of accuracy, a share of the room means nothing


@dataclass(frozen=True, eq=False)
class Validation:
    """Validation samples, and what a controller's choices on them are compared with.

    Attributes:
        table: the validation samples.
        encoded: their features as the controller reads them, ``[V, F]``.
        expected, guard: of the training samples.
        objective, weights: what ``reward_mean`` means.
        default_price: the price at the budgets.
        bounds_ms: the bounds of these samples, ``[V, K]``; None: they depend on no input.
    """

    table: ProfileTable
    encoded: Tensor
    expected: SettingMeans
    guard: StaticGuard
    objective: Objective
    weights: RewardWeights
    default_price: float
    bounds_ms: Tensor | None = None

    @property
    def contexts(self) -> list[tuple[float, float]]:
        """Pairs of a budget in ms and a price, ``[C]``: first budgets; prices only for the constrained objective."""
        budgets = [(share * self.expected.reference_ms, self.default_price) for share in VALIDATION_BUDGET_SHARES]
        prices = [(NO_LIMIT_MS, price) for price in VALIDATION_PRICES] if self.objective == "constrained" else []
        return budgets + prices

    def measure(self, controller: GRPOController) -> dict[str, float | None]:
        """Measure the controller's likeliest settings among those that the guard allows.

        Returns:
            ``reward_mean`` over all contexts; ``accuracy_mean``, ``latency_mean`` (ms), ``violation_rate`` and
            ``room_closed`` over the budgets. Cells that were not measured are left out. ``room_closed`` is None where
            hindsight has no room.
        """
        chosen = self._chosen(controller)
        count = len(VALIDATION_BUDGET_SHARES)
        budgets = np.array([budget for budget, _ in self.contexts[:count]])[:, None]
        accuracy, latency = self._looked_up(chosen)
        known = np.isfinite(latency[:count])
        violated = latency[:count] > budgets
        return {
            "reward_mean": float(np.nanmean(self._rewards(chosen, accuracy, latency))),
            "accuracy_mean": float(np.nanmean(accuracy[:count])),
            "latency_mean": float(np.nanmean(latency[:count])),
            "violation_rate": float(violated[known].mean()),
            "room_closed": self._room_closed(float(np.nanmean(accuracy[:count]))),
        }

    def rewards(self, controller: GRPOController) -> np.ndarray:
        """Each sample's reward, mean over all contexts, ``[V]``; NaN where no chosen setting was measured."""
        chosen = self._chosen(controller)
        return column_means(self._rewards(chosen, *self._looked_up(chosen)))

    def _chosen(self, controller: GRPOController) -> np.ndarray:
        """The likeliest allowed settings, ``[C, V]``."""
        with torch.no_grad():
            hidden = controller.feature_layer(self.encoded)
        return np.stack([_choose(controller, hidden, *context, self.bounds_ms) for context in self.contexts])

    def _looked_up(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Measured accuracy and latency of chosen settings ``[C, V]``; NaN where they were not measured."""
        rows = np.arange(self.table.num_samples)
        return self.table.accuracy[rows, chosen], self.table.latency_ms[rows, chosen]

    def _rewards(self, chosen: np.ndarray, accuracy: np.ndarray, latency: np.ndarray) -> np.ndarray:
        """Reward of each choice ``[C, V]``."""
        budget, price = (torch.tensor(column)[:, None] for column in zip(*self.contexts, strict=True))
        a, ms = torch.from_numpy(accuracy), torch.from_numpy(latency)
        if self.objective == "constrained":
            return constrained_reward(a, ms, self.expected.reference_ms, price).numpy()
        complexity = torch.from_numpy(self.table.knob_space.complexity[chosen])
        return guide_reward(a, ms, budget, complexity, self.weights).numpy()

    def _room_closed(self, accuracy: float) -> float | None:
        """(controller - lookup) / (oracle - lookup), in mean accuracy over the budgets."""
        low, high = self._room
        return (accuracy - low) / (high - low) if high - low >= SMALLEST_ROOM else None

    @cached_property
    def _room(self) -> tuple[float, float]:
        """Mean accuracy over the budgets of the lookup table and of the best choice in hindsight."""
        budgets = np.array([budget for budget, _ in self.contexts[: len(VALIDATION_BUDGET_SHARES)]])
        count = self.table.num_samples
        bounds = None if self.bounds_ms is None else self.bounds_ms.cpu().numpy()
        masks = [self.guard.feasible_or_cheapest(np.full(count, budget), bounds) for budget in budgets]
        means = []
        for known in (self.expected.accuracy, self.table.accuracy):
            chosen = np.stack([self.expected.choose(known, mask, self.default_price) for mask in masks])
            means.append(float(np.nanmean(self._looked_up(chosen)[0])))
        return means[0], means[1]


@torch.no_grad()
def choose(
    controller: GRPOController, encoded: Tensor, budget_ms: float, price: float, bounds_ms: Tensor | None = None
) -> np.ndarray:
    """The likeliest allowed setting for each row of encoded features ``[V, F]`` in one context, int64 ``[V]``.

    ``bounds_ms``: of `GRPOController.bounds_of`; None: those that know no input.
    """
    return _choose(controller, controller.feature_layer(encoded), budget_ms, price, bounds_ms)


@torch.no_grad()
def _choose(
    controller: GRPOController, hidden: Tensor, budget_ms: float, price: float, bounds_ms: Tensor | None
) -> np.ndarray:
    """Choose as `choose` does, from the output of the controller's first layer ``[V, H]``."""
    budget = torch.tensor([budget_ms], device=hidden.device, dtype=hidden.dtype)
    prices = torch.tensor([price], device=hidden.device, dtype=hidden.dtype)
    basis = controller.context_basis(budget, prices)
    allowed = controller.allowed(controller.feasible(budget, bounds_ms))
    offset = controller.price_term(prices).masked_fill(~allowed, NEVER)
    chosen = (controller.summed(controller.contextual_heads(hidden, basis)) + offset).argmax(dim=1)
    return np.asarray(chosen.cpu().numpy(), dtype=np.int64)
