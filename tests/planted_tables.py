"""Profile tables with known answers: hidden classes, visible through noisy features, that need different knobs."""

from dataclasses import dataclass

import numpy as np

from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"max_crops": [1, 4, 12], "top_k": [2, 4, 8], "num_active_blocks": [2, 4, 8]})
# which of the three knobs each kind of question needs
NEEDS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]])
SHARE = np.array([[1.0, 1.7, 2.4], [1.0, 1.35, 1.9], [1.0, 1.5, 2.3]])  # what each knob's values cost


@dataclass(frozen=True)
class Planted:
    """A table, its features, and the true accuracy of every setting on every sample ``[S, K]``."""

    table: ProfileTable
    features: Features
    truth: np.ndarray


def planted(train: int, validation: int, test: int, seed: int = 0, width: int = 128, noise: float = 1.0) -> Planted:
    """Kinds (seen in the language feature) x difficulties (in the image feature), right or wrong by a coin."""
    rng = np.random.default_rng(seed)
    count = train + validation + test
    kind, difficulty = rng.integers(len(NEEDS), size=count), rng.integers(3, size=count)
    truth = _accuracy()[kind, difficulty]
    luck = np.where(rng.random(truth.shape) < 0.6, rng.random((count, 1)), rng.random(truth.shape))
    latency = _latency() * rng.lognormal(0.0, 0.05, truth.shape)
    looks = np.random.default_rng(1)  # the same way of looking for every seed
    language = 0.5 * looks.normal(size=(len(NEEDS), width))[kind] + noise * rng.normal(size=(count, width))
    image = 0.25 * looks.normal(size=(3, width))[difficulty] + noise * rng.normal(size=(count, width))
    ids = tuple(f"s{i}" for i in range(count))
    table = ProfileTable.from_arrays(
        SPACE,
        ids,
        luck < truth,
        latency,
        groups={"kind": kind, "difficulty": difficulty},
        split=["train"] * train + ["validation"] * validation + ["test"] * test,
    )
    return Planted(table, Features(ids, image, language), truth)


def _accuracy() -> np.ndarray:
    """Accuracy of each kind, difficulty and setting; a needed knob that is short costs most. ``[6, 3, K]``"""
    short = 2 - SPACE.value_indices  # [K, 3]
    missing = np.maximum(0, short[None] - (2 - np.arange(3))[:, None, None])  # [difficulty, K, 3]
    penalty = 1.2 * np.einsum("dkn,cn->cdk", missing, NEEDS) + 0.03 * short.sum(axis=1)
    return 0.92 * np.exp(-penalty)


def _latency() -> np.ndarray:
    """Mean latency of each setting in ms ``[K]``."""
    column = SPACE.value_indices.T
    return 5.0 + 9.0 * SHARE[0][column[0]] * SHARE[1][column[1]] * SHARE[2][column[2]]


def tiny(samples: int = 60, seed: int = 0, split: bool = True) -> tuple[ProfileTable, Features]:
    """A small table for tests of the machinery; 2 x 2 settings, features of width 3 and 2, no test split."""
    rng = np.random.default_rng(seed)
    space = KnobSpace({"max_crops": [1, 4], "top_k": [2, 8]})
    ids = tuple(f"s{i}" for i in range(samples))
    accuracy = rng.random((samples, 4)) < np.array([0.3, 0.5, 0.6, 0.8])
    latency = np.array([10.0, 20.0, 30.0, 40.0]) * rng.lognormal(0.0, 0.05, (samples, 4))
    sides = ["train"] * (samples * 2 // 3) + ["validation"] * (samples - samples * 2 // 3)
    table = ProfileTable.from_arrays(space, ids, accuracy, latency, split=sides if split else None)
    return table, Features(ids, rng.normal(size=(samples, 3)), rng.normal(size=(samples, 2)))
