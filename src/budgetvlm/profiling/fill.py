"""Latency of samples that were not timed, from those that were.

The latency sweep runs at batch 1 and so times fewer samples than the accuracy sweep scores. At one setting a model's
time is nearly a sum of a fixed part and a part for each token, and the accuracy sweep counted the tokens. What comes
out is an expected time: it lacks the scatter of a single request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

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
    coefficients = np.stack([nnls(known, column)[0] for column in measured_ms.T], axis=1)
    times = np.maximum(wanted @ coefficients, measured_ms.min(axis=0))
    total = measured_ms[:, 0]
    return Filled(times, np.abs(known @ coefficients[:, 0] - total) / total)


def _design(tokens: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(tokens)), tokens.astype(np.float64)])
