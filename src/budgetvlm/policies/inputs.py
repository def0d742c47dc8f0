"""What policies outside the controller read: both features side by side, standardised. Shapes: B states, D inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from budgetvlm.features import Features


@dataclass(frozen=True, eq=False)
class Inputs:
    """Mean and std ``[D]`` of the training features; inputs that never vary become 0."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, features: Features) -> Inputs:
        raw = side_by_side(features.image, features.language)
        std = raw.std(axis=0)
        return cls(raw.mean(axis=0), np.where(std > 1e-6, std, 1.0))

    def __call__(self, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Features ``[B, Di]``, ``[B, Dl]`` -> float32 ``[B, D]``."""
        out: np.ndarray = ((side_by_side(image, language) - self.mean) / self.std).astype(np.float32)
        return out

    def of(self, features: Features) -> np.ndarray:
        return self(features.image, features.language)


def side_by_side(image: np.ndarray, language: np.ndarray) -> np.ndarray:
    """``[B, Di]`` and ``[B, Dl]`` -> float64 ``[B, D]``."""
    return np.concatenate([image, language], axis=1, dtype=np.float64)
