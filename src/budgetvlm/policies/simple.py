"""Policies that look at no input: what is done without a controller, and what a careful engineer does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import KnobSpaceError
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.states import Policy, States

GREEDY_ORDER = ("max_crops", "num_active_blocks", "top_k")  # visual tokens, then depth, then width


@dataclass(frozen=True)
class Full:
    """The full setting, whatever the budget: what is done without a controller."""

    name: str = "full setting"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), states.feasible.shape[1] - 1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Cheapest:
    """The setting with the least mean latency on the training samples."""

    expected: SettingMeans
    name: str = "cheapest"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), int(np.nanargmin(self.expected.latency_ms)), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class LookupTable:
    """The best single setting for each budget by training means: what a careful engineer does."""

    expected: SettingMeans
    name: str = "lookup table"

    def choose(self, states: States) -> np.ndarray:
        return self.expected.choose(self.expected.accuracy, states.feasible, states.price)


@dataclass(frozen=True)
class RandomFeasible:
    """A feasible setting drawn uniformly; the same draws for the same seed."""

    seed: int = 0
    name: str = "random feasible"

    def choose(self, states: States) -> np.ndarray:
        keys = np.random.default_rng(self.seed).random(states.feasible.shape)
        return np.where(states.feasible, keys, -1.0).argmax(axis=1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class BestStatic:
    """One setting for every request and every budget."""

    setting: int
    name: str = "best static"

    @classmethod
    def fit(cls, expected: SettingMeans, guard: StaticGuard, budgets_ms: np.ndarray) -> BestStatic:
        """The setting with the best training accuracy over some budgets ``[P]``; an answer that is late is worth 0.

        Where nothing fits any budget it is the setting with the smallest bound.
        """
        worth = np.nan_to_num(expected.accuracy) * guard.feasible(budgets_ms).mean(axis=0)
        return cls(int(worth.argmax()) if worth.any() else guard.cheapest)

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), self.setting, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Greedy:
    """Raises one knob after the other as far as the budget allows, in a fixed order; knows latencies alone.

    Attributes:
        order: knobs of the space, the first is raised first. Knobs that it leaves out stay at their smallest value.
        latency_ms: mean latency ``[K]``, for requests that do not even allow the smallest setting.
    """

    space: KnobSpace
    order: tuple[str, ...]
    latency_ms: np.ndarray
    name: str = "greedy"

    @classmethod
    def of(cls, space: KnobSpace, expected: SettingMeans, order: tuple[str, ...] = GREEDY_ORDER) -> Greedy:
        """Known knobs in the usual order, then all others in the order of the space."""
        known = tuple(name for name in order if name in space.names)
        rest = tuple(name for name in space.names if name not in known)
        return cls(space, known + rest, expected.latency_ms)

    def choose(self, states: States) -> np.ndarray:
        masks, row = np.unique(states.feasible, axis=0, return_inverse=True)
        return np.array([self._climb(mask) for mask in masks], dtype=np.int64)[row.reshape(-1)]

    def _climb(self, allowed: np.ndarray) -> int:
        current = 0
        if not allowed[current]:
            current = int(np.where(allowed, np.nan_to_num(self.latency_ms, nan=np.inf), np.inf).argmin())
        indices = self.space.value_indices
        for name in self.order:
            column = self.space.names.index(name)
            others = np.arange(len(self.space.names)) != column
            line = (indices[:, others] == indices[current, others]).all(axis=1) & allowed
            current = int(np.flatnonzero(line).max())
        return current


@dataclass(frozen=True, eq=False)
class Restricted:
    """A policy that may move some knobs only; all others stay at their largest value.

    A request for which no such setting is allowed gets what the guard falls back on, the cheapest one allowed.

    Attributes:
        free: bool ``[K]``, see `free_settings`.
        latency_ms: mean latency ``[K]``.
    """

    inner: Policy
    free: np.ndarray
    latency_ms: np.ndarray
    name: str = "restricted"

    def choose(self, states: States) -> np.ndarray:
        mask = states.feasible & self.free
        empty = ~mask.any(axis=1)
        cost = np.where(states.feasible, np.nan_to_num(self.latency_ms, nan=np.inf), np.inf)
        mask[empty, cost[empty].argmin(axis=1)] = True
        chosen: np.ndarray = self.inner.choose(states.allowing(mask))
        return chosen


def free_settings(space: KnobSpace, knobs: tuple[str, ...]) -> np.ndarray:
    """Settings in which all knobs but the named ones have their largest value, bool ``[K]``.

    Raises:
        KnobSpaceError: a knob that the space does not have.
    """
    unknown = [name for name in knobs if name not in space.names]
    if unknown:
        raise KnobSpaceError(f"no knob {', '.join(unknown)} in this space; its knobs are {', '.join(space.names)}")
    largest = np.array(space.sizes) - 1
    held = np.array([name not in knobs for name in space.names])
    free: np.ndarray = (space.value_indices[:, held] == largest[held]).all(axis=1)
    return free
