"""Predict each setting's accuracy by that of the nearest training samples, then take the best affordable one.

Shapes: S training samples, B states, K settings, D input dimensions.
"""

from __future__ import annotations

import numpy as np

from budgetvlm.features import Features
from budgetvlm.policies.argmax_policy import ArgmaxPolicy, FeatureScaler
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.table import ProfileTable

NUM_NEIGHBOURS = (10, 25, 50, 100)  # the number of neighbours is picked among these
BLOCK_DISTANCES = 10_000_000  # distances that are held at once


def fit_nearest(train: ProfileTable, features: Features, validation: ProfileTable, held_out: Features) -> ArgmaxPolicy:
    """The mean accuracy of the nearest training samples, their number picked on the validation split.

    Distances are Euclidean, between standardised features. A training cell that was not measured counts as the
    setting's mean; a setting without measurements is never feasible.
    """
    means, scaler = SettingMeans.fit(train), FeatureScaler.fit(features)
    examples = scaler.of(features)
    accuracy = np.where(np.isnan(train.accuracy), np.nan_to_num(means.accuracy), train.accuracy)
    counts = sorted({min(count, len(examples)) for count in NUM_NEIGHBOURS})
    order = nearest(scaler.of(held_out), examples, counts[-1])
    losses = [_squared_error(accuracy[order[:, :count]].mean(axis=1), validation.accuracy) for count in counts]
    best = counts[int(np.argmin(losses))]

    def predict(image: np.ndarray, language: np.ndarray) -> np.ndarray:
        """Features ``[B, Di]``, ``[B, Dl]`` -> accuracies ``[B, K]``."""
        mean: np.ndarray = accuracy[nearest(scaler(image, language), examples, best)].mean(axis=1)
        return mean

    return ArgmaxPolicy(means, predict, "kNN")


def nearest(x: np.ndarray, examples: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` examples ``[S, D]`` that are nearest to each ``x [B, D]``, the nearest first."""
    size = max(1, BLOCK_DISTANCES // len(examples))
    return np.concatenate([_nearest(x[i : i + size], examples, count) for i in range(0, len(x), size)])


def _nearest(x: np.ndarray, examples: np.ndarray, count: int) -> np.ndarray:
    distance = np.square(examples).sum(axis=1) - 2 * x @ examples.T  # squared, less |x|^2, which is the same in a row
    if count < len(examples):
        rows = np.argpartition(distance, count - 1, axis=1)[:, :count]
    else:
        rows = np.tile(np.arange(len(examples)), (len(x), 1))
    order = np.take_along_axis(distance, rows, axis=1).argsort(axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)


def _squared_error(predicted: np.ndarray, accuracy: np.ndarray) -> float:
    """Mean over the measured cells; infinity where there are none."""
    error = np.square(predicted - accuracy)
    return float(np.nanmean(error)) if np.isfinite(error).any() else np.inf
