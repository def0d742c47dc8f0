"""Requests as arrays, and the protocol of whatever chooses a setting for them. Shapes: B states, K settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.table import ProfileTable

PER_STATE = ("sample_index", "budget_ms", "feasible", "price")


@dataclass(frozen=True, eq=False)
class States:
    """B requests, each about one sample of an evaluated table.

    Attributes:
        table: the evaluated table; only the bounds may look at it.
        features: image ``[S, Di]`` and language ``[S, Dl]`` features of its samples, or None.
        sample_index: row of each state in the table, int64 ``[B]``.
        budget_ms: ``[B]``.
        feasible: the settings allowed, bool ``[B, K]``, at least one in each row.
        price: ``[B]``, see `policies.setting_means`.
    """

    table: ProfileTable
    features: Features | None
    sample_index: np.ndarray
    budget_ms: np.ndarray
    feasible: np.ndarray
    price: np.ndarray

    @classmethod
    def under_budget(
        cls,
        table: ProfileTable,
        features: Features | None,
        guard: StaticGuard,
        budget_ms: float,
        price: float,
        bounds_ms: np.ndarray | None = None,
    ) -> States:
        """Every sample of a table once, under one budget and one price.

        ``bounds_ms``: the samples' bounds; None: those of these features. A policy may see other features than the
        guard (a comparison leaves some out), and yet all policies choose among the same settings.
        """
        count = table.num_samples
        budget = np.full(count, float(budget_ms))
        feasible = guard.feasible_or_cheapest(budget, guard.bounds_of(features) if bounds_ms is None else bounds_ms)
        return cls(table, features, np.arange(count), budget, feasible, np.full(count, float(price)))

    @classmethod
    def unlimited(cls, table: ProfileTable, features: Features | None, guard: StaticGuard, price: float) -> States:
        """Every sample once, with no budget (infinity): every measured setting is allowed."""
        return cls.under_budget(table, features, guard, np.inf, price, guard.bounds_ms)

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """Several lists of requests about one table as one list."""
        arrays: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in PER_STATE}
        return replace(parts[0], **arrays)

    def rows(self, rows: slice | np.ndarray) -> States:
        """Some of the requests, in the order given."""
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in PER_STATE}
        return replace(self, **arrays)

    def allowing(self, feasible: np.ndarray) -> States:
        """The same requests with another mask ``[B, K]``."""
        return replace(self, feasible=feasible)

    @property
    def image(self) -> np.ndarray:
        """Image features, ``[B, Di]``. Raises DataError without features."""
        return self._features.image[self.sample_index]

    @property
    def language(self) -> np.ndarray:
        """Language features, ``[B, Dl]``. Raises DataError without features."""
        return self._features.language[self.sample_index]

    def by_sample(self, predict: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """The rows of ``predict(image, language)`` for every state, ``[B, K]``, computed once for each distinct sample.

        Raises DataError without features.
        """
        rows, state = np.unique(self.sample_index, return_inverse=True)
        distinct: np.ndarray = predict(self._features.image[rows], self._features.language[rows])
        return distinct[state.reshape(-1)]

    @property
    def _features(self) -> Features:
        if self.features is None:
            raise DataError("this policy reads features and none were given; pass the features of the table's samples")
        return self.features


class Policy(Protocol):
    """Chooses a setting for each state."""

    @property
    def name(self) -> str: ...

    def choose(self, states: States) -> np.ndarray:
        """The number of a setting for each state, int64 ``[B]``."""
        ...
