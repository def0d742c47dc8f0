"""Policies: from states to settings. What the controller is measured against, and the bounds on what is possible.

Shapes: B states, K settings, S samples of the evaluated table. Every policy chooses among the same feasible settings.
`GroupLookup` and `Oracle` look at the evaluated table itself (labels, outcomes): they are bounds, never competitors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.expected import Expected, column_means
from budgetvlm.features import Features
from budgetvlm.guard import StaticGuard
from budgetvlm.table import ProfileTable

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController


@dataclass(frozen=True, eq=False)
class States:
    """B requests, each about one sample of an evaluated table.

    Attributes:
        table: the evaluated table; only the bounds may look at it.
        features: image ``[S, Di]`` and language ``[S, Dl]`` features of its samples, or None.
        sample_index: row of each state in the table, int64 ``[B]``.
        budget_ms: ``[B]``. feasible: bool ``[B, K]``, at least one a row. price: ``[B]``, see `budgetvlm.expected`.
    """

    table: ProfileTable
    features: Features | None
    sample_index: np.ndarray
    budget_ms: np.ndarray
    feasible: np.ndarray
    price: np.ndarray

    @classmethod
    def under_budget(
        cls, table: ProfileTable, features: Features | None, guard: StaticGuard, budget_ms: float, price: float
    ) -> States:
        """Every sample of a table once, under one budget and one price."""
        count = table.num_samples
        budget = np.full(count, float(budget_ms))
        feasible = guard.feasible_or_cheapest(budget)
        return cls(table, features, np.arange(count), budget, feasible, np.full(count, float(price)))

    @classmethod
    def unlimited(cls, table: ProfileTable, features: Features | None, guard: StaticGuard, price: float) -> States:
        """Every sample once, with no budget (infinity): every measured setting is allowed."""
        return cls.under_budget(table, features, guard, np.inf, price)

    @property
    def image(self) -> np.ndarray:
        """Image features, ``[B, Di]``. Raises DataError without features."""
        return self._features.image[self.sample_index]

    @property
    def language(self) -> np.ndarray:
        """Language features, ``[B, Dl]``. Raises DataError without features."""
        return self._features.language[self.sample_index]

    @property
    def _features(self) -> Features:
        if self.features is None:
            raise DataError("this policy reads features and none were given; pass the features of the table's samples")
        return self.features


class Policy(Protocol):
    """Anything that chooses a setting for each state."""

    @property
    def name(self) -> str: ...

    def choose(self, states: States) -> np.ndarray:
        """Setting number for each state, int64 ``[B]``."""
        ...


@dataclass(frozen=True)
class Full:
    """The full setting, whatever the budget: what is done without a controller."""

    name: str = "full setting"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), states.feasible.shape[1] - 1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Cheapest:
    """The setting with the least mean latency on the training samples."""

    expected: Expected
    name: str = "cheapest"

    def choose(self, states: States) -> np.ndarray:
        return np.full(len(states.budget_ms), int(np.nanargmin(self.expected.latency_ms)), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class LookupTable:
    """The best single setting for each budget by training means: what a careful engineer does."""

    expected: Expected
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
class GroupLookup:
    """A lookup table for each group of samples: knows the true group, so it bounds what is visible.

    Attributes:
        labels: names of the labels that make a group, for example ("kind", "difficulty").
        accuracy: mean training accuracy of each group, ``[number of groups, K]``, drawn towards the overall means by a
            few pseudo-samples; the last row, for groups not seen in training, is the overall means.
    """

    expected: Expected
    labels: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    accuracy: np.ndarray
    name: str = "group lookup"

    @classmethod
    def fit(
        cls,
        table: ProfileTable,
        labels: tuple[str, ...] = ("kind", "difficulty"),
        expected: Expected | None = None,
        pseudo_samples: float = 4.0,
    ) -> GroupLookup:
        """Group means of a training table.

        Raises:
            DataError: the table lacks one of the labels.
        """
        expected = expected or Expected.fit(table)
        rows = group_keys(table, labels)
        keys = tuple(sorted(set(rows)))
        number = _numbers(rows, keys)
        means = [_shrunk(table.accuracy[number == g], expected.accuracy, pseudo_samples) for g in range(len(keys))]
        return cls(expected, tuple(labels), keys, np.stack([*means, expected.accuracy]))

    def choose(self, states: States) -> np.ndarray:
        number = _numbers(group_keys(states.table, self.labels), self.keys)[states.sample_index]
        return self.expected.choose(self.accuracy[number], states.feasible, states.price)


def group_keys(table: ProfileTable, labels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The group of each sample, S tuples of labels.

    Raises:
        DataError: the table lacks one of the labels.
    """
    missing = [label for label in labels if label not in table.groups]
    if missing:
        raise DataError(
            f"the table has no label {', '.join(missing)}; it has {', '.join(table.groups) or 'none'}. Give labels "
            "that it has, or leave the group lookup out."
        )
    return list(zip(*(table.groups[label] for label in labels), strict=True))


def _numbers(rows: list[tuple[str, ...]], keys: tuple[tuple[str, ...], ...]) -> np.ndarray:
    """Number of each row's key, int64 ``[S]``; an unknown key gets ``len(keys)``."""
    number = {key: index for index, key in enumerate(keys)}
    return np.array([number.get(row, len(keys)) for row in rows], dtype=np.int64)


def _shrunk(accuracy: np.ndarray, prior: np.ndarray, pseudo_samples: float) -> np.ndarray:
    """Mean of ``[n, K]`` over measured cells, drawn towards ``prior [K]`` by a number of pseudo-samples."""
    count = (~np.isnan(accuracy)).sum(axis=0)
    mean = np.nan_to_num(column_means(accuracy))
    weight = count / np.maximum(count + pseudo_samples, 1e-9)
    return np.where(count > 0, weight * mean + (1 - weight) * prior, prior)


@dataclass(frozen=True, eq=False)
class Oracle:
    """The best setting for each sample with hindsight: a bound. Costs are expected latencies, not measured ones."""

    expected: Expected
    name: str = "oracle"

    def choose(self, states: States) -> np.ndarray:
        return self.expected.choose(states.table.accuracy[states.sample_index], states.feasible, states.price)


@dataclass(frozen=True, eq=False)
class ControllerPolicy:
    """A trained controller, choosing its most probable feasible setting."""

    controller: GRPOController
    name: str = "controller"

    def choose(self, states: States) -> np.ndarray:
        import torch

        self.controller.eval()
        with torch.no_grad():
            arrays = (states.image, states.language, states.budget_ms, states.price)
            logits = self.controller(*(torch.from_numpy(array.astype(np.float32)) for array in arrays))
            actions = self.controller.sample_actions(
                logits, deterministic=True, feasible=torch.from_numpy(states.feasible)
            )
        return actions["setting_index"].numpy().astype(np.int64)
