"""The guard of a table: an upper bound on each setting's latency, and the settings that a budget allows.

`StaticGuard` has one bound a setting, a quantile of the latencies measured on the training samples. Where the features
tell the time, it has bounds for each input as well (`InputBounds`, fitted by `budgetvlm.guard.input_bounds`).
Shapes: S samples, K settings, B requests, D features. All times in ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from budgetvlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 1
LATENCY_SOURCE, MEASURED = "latency_source", "measured"  # a label that says whose latency was predicted, not timed
LEAST_TIMED = 20  # fewer timed samples than this say less about a tail than predicted ones


@dataclass(frozen=True, eq=False)
class InputBounds:
    """Bounds whose logarithm is linear in the features, within the range that was seen in training.

    Attributes:
        center: mean training features, image and language side by side, ``[D]``.
        weight, bias: of the logarithm, ``[D, K]`` and ``[K]``.
        low, high: limits of the logarithm, ``[K]``; infinity for a setting that was never measured.
    """

    center: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def of(self, features: Features) -> np.ndarray:
        """Bounds of these samples, ``[S, K]``."""
        log_bounds = (np.hstack([features.image, features.language]) - self.center) @ self.weight + self.bias
        bounds: np.ndarray = np.exp(log_bounds.clip(self.low, self.high))
        return bounds


@dataclass(frozen=True, eq=False)
class StaticGuard:
    """One latency bound for each setting, and perhaps others that depend on the input.

    Attributes:
        bounds_ms: float64 ``[K]``; setting k is allowed where ``bounds_ms[k] <= budget``. Infinity marks a setting
            that was never measured and is never allowed.
        quantile: the quantile that the bounds are, in (0, 1].
        by_input: bounds that take the place of `bounds_ms` for samples with features; None: the features tell too
            little. A setting without a bound in `bounds_ms` is never allowed in either case.
        why: one sentence: which bounds were taken, and for what reason.

    Raises:
        ConfigError: bounds that are not a list of positive numbers, no finite bound, a quantile outside (0, 1].
    """

    bounds_ms: np.ndarray
    quantile: float = 0.95
    by_input: InputBounds | None = None
    why: str = ""

    def __post_init__(self) -> None:
        bounds = np.asarray(self.bounds_ms, dtype=np.float64)
        problems = list(_problems(bounds, self.quantile))
        if problems:
            raise ConfigError("not a guard: " + "; ".join(problems))
        object.__setattr__(self, "bounds_ms", bounds)

    @classmethod
    def fit(cls, latency_ms: np.ndarray, quantile: float = 0.95) -> StaticGuard:
        """Bounds from measured latencies ``[S, K]``; NaN cells (not measured) are left out.

        Raises:
            DataError: not a table of latencies, or nothing measured in it.
            ConfigError: a quantile outside (0, 1].
        """
        latency = np.asarray(latency_ms, dtype=np.float64)
        if latency.ndim != 2 or not latency.size:
            raise DataError(f"a guard needs latencies [samples, settings]; given an array of shape {latency.shape}")
        measured = ~np.isnan(latency).all(axis=0)
        if not measured.any():
            raise DataError("a guard needs measured latencies; every cell given is NaN. Profile the settings first.")
        if not 0 < quantile <= 1:
            raise ConfigError(f"quantile={quantile!r} cannot be used: give a number in (0, 1], for example 0.95")
        bounds = np.full(latency.shape[1], np.inf)
        bounds[measured] = np.nanquantile(latency[:, measured], quantile, axis=0)
        return cls(bounds, quantile)

    @classmethod
    def fit_table(cls, table: ProfileTable, quantile: float = 0.95) -> StaticGuard:
        """As `fit`, from a table's timed samples alone where they are enough: predicted latencies lack spread."""
        timed = timed_rows(table)
        rows = timed if timed.sum() >= LEAST_TIMED else np.ones_like(timed)
        return cls.fit(table.latency_ms[rows], quantile)

    @property
    def num_settings(self) -> int:
        return len(self.bounds_ms)

    @property
    def measured(self) -> np.ndarray:
        """Settings that have a bound, bool ``[K]``."""
        return np.isfinite(self.bounds_ms)

    @property
    def cheapest(self) -> int:
        """The setting with the smallest bound: the best effort where nothing is allowed."""
        return int(self.bounds_ms.argmin())

    def bounds_of(self, features: Features | None) -> np.ndarray:
        """Bounds of the samples with these features, ``[S, K]``, or ``[1, K]`` where the input changes nothing."""
        if self.by_input is None or features is None:
            return self.bounds_ms[None, :]
        return np.where(self.measured, self.by_input.of(features), np.inf)

    def feasible(self, budget_ms: np.ndarray | float, bounds_ms: np.ndarray | None = None) -> np.ndarray:
        """Which settings each budget ``[B]`` (or one number) allows, bool ``[B, K]``. A row may be all False.

        ``bounds_ms``: of `bounds_of`, a row for each budget or one for all; None: the bounds that know no input.
        """
        budget = np.atleast_1d(np.asarray(budget_ms, dtype=np.float64))
        bounds = self.bounds_ms if bounds_ms is None else bounds_ms
        return self.measured[None, :] & (bounds <= budget[:, None])

    def feasible_or_cheapest(self, budget_ms: np.ndarray | float, bounds_ms: np.ndarray | None = None) -> np.ndarray:
        """As `feasible`, but a row that allows nothing allows the setting with the smallest bound of all inputs."""
        mask = self.feasible(budget_ms, bounds_ms)
        mask[~mask.any(axis=1), self.cheapest] = True
        return mask

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record. What depends on the input travels in the controller's buffers."""
        bounds = [float(b) if np.isfinite(b) else None for b in self.bounds_ms]
        return {"schema_version": SCHEMA_VERSION, "bounds_ms": bounds, "quantile": self.quantile, "why": self.why}


def timed_rows(table: ProfileTable) -> np.ndarray:
    """Samples whose latency was measured and not predicted from others, bool ``[S]``; all, where no label tells."""
    source = table.groups.get(LATENCY_SOURCE, (MEASURED,) * table.num_samples)
    return np.array([name == MEASURED for name in source])


def _problems(bounds: np.ndarray, quantile: float) -> Iterator[str]:
    if bounds.ndim != 1 or not bounds.size:
        yield f"it needs one bound a setting, given an array of shape {bounds.shape}"
    elif not (bounds > 0).all() or not np.isfinite(bounds).any():
        yield f"bounds must be positive numbers of ms, at least one of them finite: {bounds.tolist()}"
    if not 0 < quantile <= 1:
        yield f"quantile={quantile!r} is outside (0, 1]"
