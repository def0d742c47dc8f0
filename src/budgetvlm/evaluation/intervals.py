"""Bootstrap intervals over units (images, documents; see `ProfileTable.unit`): a unit's samples are drawn together.

Numbers that have an interval are arrays ``[1 + R, ...]``: the number itself, then what it is in every resample, so
that arithmetic with them is paired by resample.
Shapes: S samples, I units, R resamples; "..." stands for any number of quantities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.evaluation.records import Estimate


def ratio(number: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``number / other``, ``[1 + R, ...]``; NaN wherever the other number is not positive."""
    return number / np.where(other > 0, other, np.nan)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """R resamples of I units, drawn once, so that everything that is computed with them is paired.

    Attributes:
        unit: the number of each sample's unit, int64 ``[S]``.
        weights: how often each unit was drawn, float64 ``[R, I]``.
        level: the level of the intervals, in (0, 1).
    """

    unit: np.ndarray
    weights: np.ndarray
    level: float = 0.95

    @classmethod
    def draw(cls, units: Sequence[str], resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Bootstrap:
        """Draw I of I units with replacement, R times; ``units`` names each sample's unit, ``[S]``.

        Raises DataError: there is one unit alone, which can be no sample of anything.
        """
        _, unit = np.unique(np.asarray(units), return_inverse=True)
        count = int(unit.max()) + 1
        if count < 2:
            raise DataError(
                f"all {len(units)} evaluated samples belong to one group ({units[0]}), so nothing tells how far its "
                "figures would carry; measure another group, or give the label of smaller ones with --groups "
                "(sample_id: each sample by itself)"
            )
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
        return cls(unit.reshape(-1), draws.astype(np.float64), level)

    @property
    def num_units(self) -> int:
        return self.weights.shape[1]

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean over the samples of each resample: ``[S]`` or ``[S, P]`` -> ``[R]`` or ``[R, P]``."""
        size = np.bincount(self.unit, minlength=self.num_units).astype(np.float64)
        flat = values.reshape(len(values), -1).astype(np.float64)
        sums = np.zeros((self.num_units, flat.shape[1]))
        np.add.at(sums, self.unit, flat)
        means = (self.weights @ sums) / (self.weights @ size)[:, None]
        return means.reshape(len(self.weights), *values.shape[1:])

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean over the samples ``[S, ...]``, overall and in each resample, ``[1 + R, ...]``."""
        return np.concatenate([values.mean(axis=0, dtype=np.float64)[None], self.means(values)])

    def interval(self, resampled: np.ndarray) -> np.ndarray:
        """Percentile interval over the first axis, ``[R, ...]`` -> ``[2, ...]``; NaN resamples are left out.

        It is NaN where every resample is NaN.
        """
        tail = (1 - self.level) / 2
        known = ~np.isnan(resampled).all(axis=0)
        filled = np.where(known, resampled, 0.0)
        return np.where(known, np.nanquantile(filled, [tail, 1 - tail], axis=0), np.nan)

    def above(self, number: np.ndarray, least: float) -> bool:
        """Whether a number ``[1 + R]`` is clearly above another one: its whole interval is."""
        return bool(number[0] > least and self.interval(number[1:])[0] > least)

    def estimate(self, number: np.ndarray) -> Estimate:
        """A single number ``[1 + R]`` with its interval."""
        low, high = self.interval(number[1:])
        return Estimate(float(number[0]), float(low), float(high))
