"""What held-out samples say about predicted accuracies; samples of one group count as one observation.

Only differences between settings decide a choice, so only these are judged. Shapes: S samples, K settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.977  # two standard errors; with one, a third of all tables without anything to learn pass


def mean_and_margin(values: np.ndarray, group: Sequence[str] | np.ndarray) -> tuple[float, float]:
    """Return the mean of values ``[S]`` and how far it has to be above 0 to be so with `CONFIDENCE`.

    That is two standard errors over groups where these are many, and more where they are few, by Student's t; one group
    never is enough. NaN is left out.
    """
    from scipy.special import stdtrit  # Student's quantile

    known = ~np.isnan(values)
    values, (_, number) = values[known], np.unique(np.asarray(group)[known], return_inverse=True)
    if not len(values):
        return 0.0, np.inf
    sums = np.bincount(number.reshape(-1), values - values.mean())
    count = len(sums)
    if count == 1:
        return float(values.mean()), np.inf
    error = np.sqrt(np.square(sums).sum() * count / (count - 1)) / len(values)
    return float(values.mean()), float(stdtrit(count - 1, CONFIDENCE) * error)


def clearly_positive(values: np.ndarray, group: Sequence[str] | np.ndarray) -> bool:
    """Whether the mean of values ``[S]`` is above 0 with `CONFIDENCE`."""
    mean, margin = mean_and_margin(values, group)
    return mean > margin


def trust(predicted: np.ndarray, means: np.ndarray, accuracy: np.ndarray, group: Sequence[str] | np.ndarray) -> float:
    """The share of ``predicted - means`` to keep, 0 to 1: the slope of what was measured on what was predicted.

    It is shrunk as James and Stein do, to 0 where it is not above 0 with `CONFIDENCE` and hardly where it is far above,
    so that noise is not followed.

    Args:
        predicted: accuracies ``[S, K]`` of samples that the predictor was not fitted on. means: of the settings,
            ``[K]``. accuracy: as measured, ``[S, K]``, NaN where it was not. group: of each sample, ``[S]``.
    """
    x, y = (_differences(values - means, accuracy) for values in (predicted, accuracy))
    square = np.square(x).sum(axis=1)
    if square.sum() <= 0:
        return 0.0
    slope = (x * y).sum() / square.sum()
    least = mean_and_margin((x * y).sum(axis=1) - slope * square, group)[1] / square.mean()
    return float(min(slope, 1.0) * (1.0 - (least / slope) ** 2)) if slope > least else 0.0


def squared_error(predicted: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Squared error of the predicted differences between settings, summed over the measured ones, ``[S]``."""
    error: np.ndarray = np.square(_differences(predicted - accuracy, accuracy)).sum(axis=1)
    return error


def _differences(values: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Values ``[S, K]`` less the mean over the measured settings of their row; 0 where nothing was measured."""
    known = ~np.isnan(accuracy)
    total = np.where(known, values, 0.0).sum(axis=1, keepdims=True)
    return np.where(known, values - total / np.maximum(known.sum(axis=1, keepdims=True), 1), 0.0)
