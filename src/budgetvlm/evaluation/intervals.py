"""Bootstrap intervals over images: samples that share an image are drawn together.

Numbers that have an interval are arrays ``[1 + R, ...]``: the number itself, then what it is in every resample, so
that arithmetic with them is paired by resample.
Shapes: S samples, I images, R resamples; "..." stands for any number of quantities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from budgetvlm.evaluation.records import Estimate


def ratio(number: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``number / other``, ``[1 + R, ...]``; NaN wherever the other number is not positive."""
    return number / np.where(other > 0, other, np.nan)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """R resamples of I images, drawn once, so that everything that is computed with them is paired.

    Attributes:
        image: the number of each sample's image, int64 ``[S]``.
        weights: how often each image was drawn, float64 ``[R, I]``.
        level: the level of the intervals, in (0, 1).
    """

    image: np.ndarray
    weights: np.ndarray
    level: float = 0.95

    @classmethod
    def draw(cls, images: Sequence[str], resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Bootstrap:
        """Draw I of I images with replacement, R times; ``images`` names each sample's image, ``[S]``."""
        _, image = np.unique(np.asarray(images), return_inverse=True)
        count = int(image.max()) + 1
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
        return cls(image.reshape(-1), draws.astype(np.float64), level)

    @property
    def num_images(self) -> int:
        return self.weights.shape[1]

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean over the samples of each resample: ``[S]`` or ``[S, P]`` -> ``[R]`` or ``[R, P]``."""
        size = np.bincount(self.image, minlength=self.num_images).astype(np.float64)
        flat = values.reshape(len(values), -1).astype(np.float64)
        sums = np.zeros((self.num_images, flat.shape[1]))
        np.add.at(sums, self.image, flat)
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

    def estimate(self, number: np.ndarray) -> Estimate:
        """A single number ``[1 + R]`` with its interval."""
        low, high = self.interval(number[1:])
        return Estimate(float(number[0]), float(low), float(high))
