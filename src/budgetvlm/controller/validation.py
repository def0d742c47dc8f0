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
from budgetvlm.policies.budget_grid import BUDGET_SHARES, grid_and_notes
from budgetvlm.policies.evidence import clearly_positive
from budgetvlm.policies.setting_means import SettingMeans, column_means
from budgetvlm.table import ProfileTable

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

    @cached_property
    def _grid(self) -> tuple[tuple[float, ...], list[str]]:
        bounds = self.guard.bounds_ms[None] if self.bounds_ms is None else self.bounds_ms.cpu().numpy()
        return grid_and_notes(BUDGET_SHARES, bounds, self.expected.reference_ms)

    @property
    def budget_shares(self) -> tuple[float, ...]:
        """The budgets, as shares of the full setting's median latency: the usual ones where they leave a choice."""
        return self._grid[0]

    @property
    def notes(self) -> list[str]:
        """Sentences about budgets without a choice, and about a largest setting that is not the best."""
        best = self.expected.said_of_best(self.table.knob_space)
        return [*self._grid[1], *([best] if best else [])]

    @property
    def contexts(self) -> list[tuple[float, float]]:
        """Pairs of a budget in ms and a price, ``[C]``: first budgets; prices only for the constrained objective."""
        budgets = [(share * self.expected.reference_ms, self.default_price) for share in self.budget_shares]
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
        count = len(self.budget_shares)
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
        """(controller - lookup) / (oracle - lookup), in mean accuracy over the budgets; None without a clear room."""
        low, room = self._room
        return None if room is None else (accuracy - low) / room

    @cached_property
    def _room(self) -> tuple[float, float | None]:
        """The lookup table's mean accuracy over the budgets, and what hindsight adds if that is clearly above zero."""
        budgets = np.array([budget for budget, _ in self.contexts[: len(self.budget_shares)]])
        count = self.table.num_samples
        bounds = None if self.bounds_ms is None else self.bounds_ms.cpu().numpy()
        masks = [self.guard.feasible_or_cheapest(np.full(count, budget), bounds) for budget in budgets]
        found = []
        for known in (self.expected.accuracy, self.table.accuracy):
            chosen = np.stack([self.expected.choose(known, mask, self.default_price) for mask in masks])
            found.append(self._looked_up(chosen)[0])
        lookup, oracle = found
        room = float(np.nanmean(oracle) - np.nanmean(lookup))
        clear = room >= SMALLEST_ROOM and clearly_positive(column_means(oracle - lookup), self.table.units)
        return float(np.nanmean(lookup)), room if clear else None


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
