"""Policies that read no input: what is done without a controller, and what a careful engineer does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import KnobSpaceError
from budgetvlm.knobs import KnobSpace
from budgetvlm.policies.setting_means import SettingMeans, argmax_cheapest
from budgetvlm.policies.states import Policy, States


@dataclass(frozen=True)
class Full:
    """Chooses the full setting (or the largest one that there is) whatever the budget, as without a controller."""

    means: SettingMeans
    name: str = "full setting"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), self.means.full, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Cheapest:
    """Chooses the setting with the least mean latency on the training samples."""

    means: SettingMeans
    name: str = "cheapest"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), int(np.nanargmin(self.means.latency_ms)), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class LookupTable:
    """Chooses the best single setting for each budget by the training means, as a careful engineer does."""

    means: SettingMeans
    name: str = "lookup table"

    def choose(self, states: States) -> np.ndarray:
        return self.means.choose(self.means.accuracy, states.feasible, states.price)


@dataclass(frozen=True)
class RandomFeasible:
    """Draws a feasible setting uniformly; the same seed gives the same draws."""

    seed: int = 0
    name: str = "random feasible"

    def choose(self, states: States) -> np.ndarray:
        keys = np.random.default_rng(self.seed).random(states.feasible.shape)
        return np.where(states.feasible, keys, -1.0).argmax(axis=1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Restricted:
    """Lets a policy move some knobs only; all others stay at their largest value.

    A request for which no such setting is allowed gets the cheapest allowed setting of all, as under the guard.

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
        empty = np.flatnonzero(~mask.any(axis=1))
        cheapest = argmax_cheapest(np.zeros(states.feasible.shape), states.feasible, self.latency_ms)
        mask[empty, cheapest[empty]] = True
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
