"""A controller on a machine that was not profiled: new latencies, the same accuracies, nothing is trained.

A few requests tell how much longer each stage takes here than when it was profiled, and what each setting differs from
that. The profile's latencies are carried over by the ratio of what is predicted here and there, so that each sample
keeps how far it lies from its prediction. What follows from latencies is then made anew as training does it: the
settings' mean times, the full setting's median (the unit of budgets and prices), bounds, and the price of each mean.

Shapes: n requests, S samples, K settings, G stages. Times in ms.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.stats import binom

from budgetvlm._io import time_text
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.guard.input_bounds import fit_guard
from budgetvlm.guard.latency_model import PSEUDO_SAMPLES, LatencyModel, Sizes
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.table import ProfileTable

TABLE = "profile_table.parquet"  # beside a controller that was adapted
SAME_TIME = 0.01  # a relative difference that rounding in files may make
LEVEL = 0.95  # of the intervals of medians
_OF_LATENCY = "latency_", "bounds_ms", "input_bounds."  # buffers of a controller that depend on the machine


def require_its_profile(controller: GRPOController, given: float) -> None:
    """Raise DataError where a controller's unit of time is not that of its data, the full setting's time there in ms.

    It would be adapted from latencies that are not its own.
    """
    own = float(controller.latency_reference_ms)
    if not math.isclose(own, given, rel_tol=SAME_TIME):
        raise DataError(
            f"the controller was made where the full setting takes {time_text(own)}, and in this data it takes "
            f"{time_text(given)}. Give the data that it was made from; of a controller that was adapted before that is "
            f"--table DIR/{TABLE} with the --features of the profile."
        )


def latency_here(profiled: LatencyModel, log_scale: np.ndarray, ratio: np.ndarray) -> LatencyModel:
    """The latency model of this machine.

    Args:
        profiled: of the machine that was profiled.
        log_scale: log of how much longer each stage takes here, ``[G]``.
        ratio: measured / predicted time of some requests, where the prediction has these scales already, ``[n, K]``;
            NaN: not measured. A setting's median moves it the further from that of all, the more requests there are.
    """
    logs = np.log(ratio)
    typical = np.nanmedian(logs)
    count = np.isfinite(logs).sum(axis=0)
    own = np.array([np.nanmedian(column) if some else typical for column, some in zip(logs.T, count, strict=True)])
    correction = np.exp(typical + (own - typical) * count / (count + PSEUDO_SAMPLES))
    weights = profiled.weights * np.exp(log_scale)[:, None, None]
    return replace(profiled, weights=weights, correction=profiled.correction * correction)


def table_here(table: ProfileTable, profiled: LatencyModel, here: LatencyModel) -> ProfileTable:
    """The table as it would be had it been profiled here: latencies and stages by the ratio of both predictions."""
    sizes = Sizes.of_table(table)
    before, after = profiled.predict_stages(sizes), here.predict_stages(sizes)

    def carried(measured: np.ndarray, there: np.ndarray, now: np.ndarray) -> np.ndarray:
        moved = measured * np.divide(now, there, out=np.ones_like(now), where=there > 0)
        return moved.astype(np.float32)

    stages = {name: carried(ms, before[name], after[name]) for name, ms in table.stages_ms.items() if name in before}
    there, now = (np.sum(list(parts.values()), axis=0) for parts in (before, after))
    latency = carried(table.latency_ms, there, now)
    return replace(table, latency_ms=latency, stages_ms=stages)


def controller_here(
    controller: GRPOController, table: ProfileTable, features: Features, quantile: float = 0.95
) -> GRPOController:
    """The same policy with the latencies of a table of this machine.

    Args:
        table: with the splits of the controller's training; `table_here` makes it.
        features: of its samples, in any order.
        quantile: of the training samples' latencies, up to which a setting counts as within a budget.
    """
    timed = table.subset("train")
    guard = fit_guard(timed, features.aligned(timed.sample_ids), quantile)
    means = SettingMeans.fit(with_predictions(table, features).subset("train"))
    made = GRPOController(
        **{
            **controller.config,
            "latency_reference_ms": means.reference_ms,
            "latency_ms": [_known(ms) for ms in means.latency_ms],
            "bounds_ms": [_known(ms) for ms in guard.bounds_ms],
            "bounds_by_input": guard.by_input is not None,
        }
    )
    learnt = {name: value for name, value in controller.state_dict().items() if not name.startswith(_OF_LATENCY)}
    made.load_state_dict(learnt, strict=False)
    if made.input_bounds is not None and guard.by_input is not None:
        made.input_bounds.copy(guard.by_input)
    made.trained_on = controller.trained_on
    return made.eval()


def median_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """An interval of the median from a sample ``[n]``, whatever its distribution, by order statistics.

    It holds the median at least as often as ``level`` says; of fewer than six values it is unbounded at 95%.
    """
    ordered = np.concatenate([[-np.inf], np.sort(values), [np.inf]])
    below = int(binom.ppf((1 - level) / 2, len(values), 0.5))
    return float(ordered[below]), float(ordered[len(values) + 1 - below])


def _known(ms: float) -> float | None:
    return float(ms) if np.isfinite(ms) else None
