"""Simple policies that read no input, beside those that `budgetvlm compare` has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies import States
from budgetvlm.policies.setting_means import SettingMeans, argmax_cheapest

GREEDY_ORDER = ("max_crops", "num_active_blocks", "top_k")  # visual tokens, then depth, then width


@dataclass(frozen=True, eq=False)
class BestStatic:
    """Chooses one setting for every request and every budget."""

    setting: int
    name: str = "best static"

    @classmethod
    def fit(cls, means: SettingMeans, guard: StaticGuard, budgets_ms: np.ndarray) -> BestStatic:
        """Take the setting with the best training accuracy over some budgets ``[P]``; a late answer is worth 0.

        Where nothing fits any budget it is the setting with the smallest bound.
        """
        worth = np.nan_to_num(means.accuracy) * guard.feasible(budgets_ms).mean(axis=0)
        return cls(int(worth.argmax()) if worth.any() else guard.cheapest)

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), self.setting, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Greedy:
    """Raises one knob after the other as far as the budget allows, in a fixed order; it knows latencies alone.

    Attributes:
        order: knobs of the space, the first is raised first. Knobs that it leaves out stay at their smallest value.
        latency_ms: mean latency ``[K]``, for requests that do not even allow the smallest setting.
    """

    space: KnobSpace
    order: tuple[str, ...]
    latency_ms: np.ndarray
    name: str = "greedy"

    @classmethod
    def of(cls, space: KnobSpace, means: SettingMeans, order: tuple[str, ...] = GREEDY_ORDER) -> Greedy:
        """Raise known knobs in the usual order, then all others in the order of the space."""
        known = tuple(name for name in order if name in space.names)
        rest = tuple(name for name in space.names if name not in known)
        return cls(space, known + rest, means.latency_ms)

    def choose(self, states: States) -> np.ndarray:
        masks, row = np.unique(states.feasible, axis=0, return_inverse=True)
        return np.array([self._climb(mask) for mask in masks], dtype=np.int64)[row.reshape(-1)]

    def _climb(self, allowed: np.ndarray) -> int:
        current = 0
        if not allowed[current]:
            current = int(argmax_cheapest(np.zeros((1, len(allowed))), allowed[None], self.latency_ms)[0])
        indices = self.space.value_indices
        for name in self.order:
            column = self.space.names.index(name)
            others = np.arange(len(self.space.names)) != column
            line = (indices[:, others] == indices[current, others]).all(axis=1) & allowed
            current = int(np.flatnonzero(line).max())
        return current
