"""The mean accuracy and latency of each setting, and the choice that follows from a score.

The means come from the training split. A price is in accuracy for one reference latency, which is the full setting's
median latency there. Shapes: S samples, K settings, B states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable


def column_means(values: np.ndarray) -> np.ndarray:
    """Mean of each column of ``[S, K]`` over its measured cells, float64 ``[K]``; NaN where nothing was measured."""
    measured = ~np.isnan(values)
    total = np.where(measured, values, 0.0).sum(axis=0, dtype=np.float64)
    count = measured.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True, eq=False)
class SettingMeans:
    """Mean accuracy ``[K]``, mean latency in ms ``[K]`` (NaN: never measured) and the reference latency in ms."""

    accuracy: np.ndarray
    latency_ms: np.ndarray
    reference_ms: float

    @classmethod
    def fit(cls, table: ProfileTable) -> SettingMeans:
        """Averages over the samples of a table, usually its training split.

        The reference is the full setting's or, where no model has that, the largest one's that was measured.

        Raises:
            DataError: no latency was measured.
        """
        timed = np.flatnonzero(np.isfinite(table.latency_ms).any(axis=0))
        if not len(timed):
            raise DataError("no latency was measured on these samples; budgets and prices are relative to it")
        reference_ms = float(np.nanmedian(table.latency_ms[:, timed[-1]]))
        return cls(column_means(table.accuracy), column_means(table.latency_ms), reference_ms)

    @property
    def measured(self) -> np.ndarray:
        """Settings with both averages known, bool ``[K]``."""
        return np.isfinite(self.accuracy) & np.isfinite(self.latency_ms)

    @property
    def full(self) -> int:
        """The full setting, or the largest measured one where it was not measured."""
        return len(self.accuracy) - 1 - int(self.measured[::-1].argmax())

    @property
    def best(self) -> int:
        """The most accurate measured setting; of equal ones the last, which is usually the largest."""
        accuracy = np.where(self.measured, self.accuracy, -np.inf)
        return len(accuracy) - 1 - int(accuracy[::-1].argmax())

    def said_of_best(self, space: KnobSpace) -> str | None:
        """A sentence where the largest setting is not the most accurate one; None where it is."""
        best, full = self.best, self.full
        if best == full:
            return None
        name, largest = (", ".join(f"{n}={v:g}" for n, v in space.settings[k].items()) for k in (best, full))
        return (
            f"The largest setting ({largest}: {self.accuracy[full]:.1%}) is not the most accurate on the training "
            f"samples: {name} is ({self.accuracy[best]:.1%})."
        )

    @property
    def latency_share(self) -> np.ndarray:
        """Mean latency / reference, ``[K]``."""
        return self.latency_ms / self.reference_ms

    def choose(self, accuracy: np.ndarray, feasible: np.ndarray, price: np.ndarray | float) -> np.ndarray:
        """The feasible setting with the largest ``accuracy - price * mean latency / reference``, int64 ``[B]``.

        Args:
            accuracy: predicted or known accuracy of each setting, ``[K]`` or ``[B, K]``.
            feasible: bool ``[B, K]``.
            price: number or ``[B]``.
        """
        cost = np.asarray(price, dtype=np.float64).reshape(-1, 1) * self.latency_share
        return argmax_cheapest(accuracy - cost, feasible, self.latency_ms)


def argmax_cheapest(score: np.ndarray, feasible: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
    """The column of the largest feasible score in each row, int64 ``[B]``; in a tie the one with the least latency.

    Args:
        score: ``[B, K]``; a NaN is never chosen, and a row without a feasible score gets the cheapest setting of all.
        feasible: bool ``[B, K]``.
        latency_ms: ``[K]``.
    """
    order = np.argsort(latency_ms, kind="stable")
    masked = np.where(feasible & ~np.isnan(score), score, -np.inf)[:, order]
    return order[masked.argmax(axis=1)].astype(np.int64)
