"""Latency of samples that were not timed, from those that were.

The latency sweep runs at batch 1 and so times fewer samples than the accuracy sweep scores. At one setting a model's
time is nearly a sum of a fixed part and a part for each token, and the accuracy sweep counted the tokens. What comes
out is an expected time: it lacks the scatter of a single request.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

MIN_MEASURED = 8  # a fit of up to four coefficients to fewer times says nothing


@dataclass(frozen=True)
class Filled:
    """Predicted times of one setting.

    Attributes:
        times_ms: float64 ``[m, T]``.
        relative_errors: |predicted - measured| / measured of the first column, on the ``n`` samples of the fit.
    """

    times_ms: np.ndarray
    relative_errors: np.ndarray


def predict_times(measured_tokens: np.ndarray, measured_ms: np.ndarray, wanted_tokens: np.ndarray) -> Filled:
    """Fit time = a + b . tokens with a, b >= 0 to each column of times, and predict the others.

    A prediction is never below the smallest time that was measured: tokens outside the fitted range cannot make
    a request free.

    Args:
        measured_tokens: counts ``[n, C]`` of the samples that were timed.
        measured_ms: their times ``[n, T]``; the first column is the total.
        wanted_tokens: counts ``[m, C]`` of the samples to predict.
    """
    varies = np.ptp(measured_tokens, axis=0) > 0  # a count that never changes cannot be told from the fixed part
    known, wanted = _design(measured_tokens[:, varies]), _design(wanted_tokens[:, varies])
    coefficients = np.stack([nonnegative_least_squares(known, column) for column in measured_ms.T], axis=1)
    times = np.maximum(wanted @ coefficients, measured_ms.min(axis=0))
    total = measured_ms[:, 0]
    return Filled(times, np.abs(known @ coefficients[:, 0] - total) / total)


def nonnegative_least_squares(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of ||design x - target||, for a few columns: ``[n, C], [n] -> [C]``.

    The optimum is the plain least-squares solution on the columns where it is above 0 (Lawson and Hanson 1974,
    chapter 23), so that trying each of the 2^C sets of columns finds it.
    """
    count = design.shape[1]
    best, best_loss = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for columns in map(list, itertools.combinations(range(count), size)):
            solution = np.linalg.lstsq(design[:, columns], target, rcond=None)[0]
            loss = float(np.sum((design[:, columns] @ solution - target) ** 2))
            if solution.min() >= 0 and loss < best_loss:
                best, best_loss = np.zeros(count), loss
                best[columns] = solution
    return best


def _design(tokens: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(tokens)), tokens.astype(np.float64)])
