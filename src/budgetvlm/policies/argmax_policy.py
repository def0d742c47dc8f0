"""What policies that predict accuracies share: standardised features, and the choice that follows from a prediction.

Shapes: B states, Di and Dl features of image and language, D = Di + Dl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from budgetvlm.features import Features
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.states import States


@dataclass(frozen=True, eq=False)
class FeatureScaler:
    """Mean and std ``[D]`` of the training features; a feature that never varies becomes 0."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, features: Features) -> FeatureScaler:
        """Take mean and std from the features of some samples."""
        raw = _side_by_side(features.image, features.language)
        std = raw.std(axis=0)
        return cls(raw.mean(axis=0), np.where(std > 1e-6, std, 1.0))

    def __call__(self, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Standardise features ``[B, Di]``, ``[B, Dl]`` -> float32 ``[B, D]``."""
        scaled: np.ndarray = ((_side_by_side(image, language) - self.mean) / self.std).astype(np.float32)
        return scaled

    def of(self, features: Features) -> np.ndarray:
        """Standardise the features of all samples."""
        return self(features.image, features.language)


def _side_by_side(image: np.ndarray, language: np.ndarray) -> np.ndarray:
    return np.concatenate([image, language], axis=1, dtype=np.float64)


Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class ArgmaxPolicy:
    """Chooses the feasible setting with the largest predicted accuracy minus price times mean latency.

    Attributes:
        means: of the training samples.
        predict: features ``[B, Di]``, ``[B, Dl]`` -> predicted accuracy of every setting, ``[B, K]``.
    """

    means: SettingMeans
    predict: Predict
    name: str

    def choose(self, states: States) -> np.ndarray:
        return self.means.choose(states.by_sample(self.predict), states.feasible, states.price)
