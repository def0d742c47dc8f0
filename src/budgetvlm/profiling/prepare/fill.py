"""Latency that was not timed, from what was.

The latency sweep runs at batch 1 and so times fewer samples than the accuracy sweep scores. At one setting a model's
time is nearly a sum of a fixed part and a part for each token, and the accuracy sweep counted the tokens: that is
`predict_times`. Where only some cells were timed, or not every setting, `predict_cells` has one model of all settings
predict the others. What comes out is an expected time: it lacks the scatter of a single request.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from budgetvlm.errors import DataError
from budgetvlm.guard.latency_model import LatencyModel, Sizes, relative_errors
from budgetvlm.table import ProfileTable

MIN_MEASURED = 8  # a fit of up to four coefficients to fewer times says nothing
MIN_CELLS = 40  # the same for the model of all settings
CHECKED = 0.2  # share of the measured cells that a model is checked on which was fitted on the others


def predict_times(
    measured_tokens: np.ndarray, measured_ms: np.ndarray, wanted_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit time = a + b . tokens with a, b >= 0 to each column of times, and predict the others.

    A prediction is never below the smallest time that was measured: tokens outside the fitted range cannot make
    a request free.

    Args:
        measured_tokens: counts ``[n, C]`` of the samples that were timed.
        measured_ms: their times ``[n, T]``; the first column is the total.
        wanted_tokens: counts ``[m, C]`` of the samples to predict.

    Returns:
        Predicted times ``[m, T]``, and |predicted - measured| / measured of the total on the ``n`` samples of the fit.
    """
    varies = np.ptp(measured_tokens, axis=0) > 0  # a count that never changes cannot be told from the fixed part
    known, wanted = _design(measured_tokens[:, varies]), _design(wanted_tokens[:, varies])
    coefficients = np.stack([nnls(known, column)[0] for column in measured_ms.T], axis=1)
    times = np.maximum(wanted @ coefficients, measured_ms.min(axis=0))
    total = measured_ms[:, 0]
    return times, np.abs(known @ coefficients[:, 0] - total) / total


def predict_cells(table: ProfileTable, seed: int = 0) -> tuple[ProfileTable, np.ndarray]:
    """Predict the cells that were not timed with a `LatencyModel` of those that were.

    ``table``: latencies and stages are NaN where not timed; token counts are known. ``seed``: draws the cells of the
    check. Returns the table with the times that were measured and else predicted ones, and |predicted - measured| /
    measured on cells that were held out from the fit, ``[n]``. Raises DataError: too few cells were timed.
    """
    measured = np.isfinite(table.latency_ms)
    if measured.sum() < MIN_CELLS:
        raise DataError(
            f"{int(measured.sum())} cells (sample, setting) were timed; to predict the others {MIN_CELLS} are needed. "
            "Time more."
        )
    places = np.flatnonzero(measured)
    held_out = np.zeros(measured.size, dtype=bool)
    held_out[np.random.default_rng(seed).permutation(places)[: int(CHECKED * len(places))]] = True
    held_out = held_out.reshape(measured.shape)
    # what is held out is predicted by a model of the rest, and everything else by a model of all
    check = LatencyModel.fit(_only(table, measured & ~held_out)).predict_table(table)
    errors = relative_errors(check, np.where(held_out, table.latency_ms, np.nan))
    sizes, model = Sizes.of_table(table), LatencyModel.fit(table)
    predicted = np.maximum(model.predict(sizes), np.nanmin(table.latency_ms))
    latency = np.where(measured, table.latency_ms, predicted).astype(np.float32)
    stages = {
        name: np.where(np.isfinite(known), known, model.predict_stages(sizes)[name]).astype(np.float32)
        for name, known in table.stages_ms.items()
    }
    return replace(table, latency_ms=latency, stages_ms=stages), errors


def _only(table: ProfileTable, cells: np.ndarray) -> ProfileTable:
    """Return the table with the times of these cells alone."""
    stages = {name: np.where(cells, values, np.nan).astype(np.float32) for name, values in table.stages_ms.items()}
    return replace(table, latency_ms=np.where(cells, table.latency_ms, np.nan).astype(np.float32), stages_ms=stages)


def _design(tokens: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(tokens)), tokens.astype(np.float64)])
