"""Adapt a controller to the machine that it runs on: measure a few requests, and make anew what depends on latency."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import write_json
from budgetvlm.adaptation.new_machine import (
    TABLE,
    controller_here,
    latency_here,
    median_interval,
    require_its_profile,
    table_here,
)
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import PriceCurve
from budgetvlm.controller.price_sweep import price_curve_of
from budgetvlm.features import Features
from budgetvlm.features.cheap import extractor_file
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.guard.saved import save_guard
from budgetvlm.live.calibrate_here import USUAL_REQUESTS, measure_here
from budgetvlm.live.calibration import Measured, calibrated, for_scales, log_scales
from budgetvlm.policies.setting_means import SettingMeans
from budgetvlm.policies.unmeasured import with_predictions
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Task

REPORT = "adapted.json"


@dataclass(frozen=True, eq=False)
class AdaptedToMachine:
    """A controller as if it had been profiled here.

    Attributes:
        controller, guard, curve: take the place of those that were given.
        table: the profile with this machine's latencies, predicted.
        report: what is known and how surely, JSON-able.
    """

    controller: GRPOController
    guard: AdaptiveGuard
    curve: PriceCurve
    table: ProfileTable
    report: dict[str, Any]

    def save(self, directory: Path, source: Path) -> None:
        """Write it as a controller's directory; what made its features is taken from that of the old controller."""
        self.controller.save_pretrained(directory)
        self.curve.save(directory)
        self.table.save(directory / TABLE)
        if (extractor := extractor_file(source)).is_file():
            shutil.copy2(extractor, directory)
        save_guard(self.guard.to_dict(), directory)
        write_json(directory / REPORT, self.report)


def adapt_to_machine(
    model: AdaptiveVLM,
    task: Task,
    table: ProfileTable,
    features: Features,
    requests: int = USUAL_REQUESTS,
    alpha: float = 0.05,
    **how: Any,
) -> AdaptedToMachine:
    """Measure requests here, each at every setting, and adapt the model's controller and guard; nothing is trained.

    A part of the requests tells how long each stage and each setting takes here; the others, which these have not seen,
    calibrate the guard (`budgetvlm.live.calibration`).

    Args:
        model: with the controller and the guard of the profile.
        table, features: of the profile that the controller was made from.
        requests, alpha: as ``samples`` and ``alpha`` of `calibrate`. how: split, used, seed, progress and concurrency.

    Raises as `calibrate` does, and DataError: the controller was made from other latencies than the table's.
    """
    table = model.controller.trained_on.with_splits(table, "the controller")
    means = SettingMeans.fit(with_predictions(table, features).subset("train"))
    require_its_profile(model.controller, means.reference_ms)
    measured, known = measure_here(model, task, requests, alpha=alpha, **how)
    return adapted(model, table, features, measured, known, alpha)


def adapted(
    model: AdaptiveVLM, table: ProfileTable, features: Features, measured: Measured, known: list[str], alpha: float
) -> AdaptedToMachine:
    """Adapt to requests that were measured, of samples with these digests; see `adapt_to_machine`."""
    profiled = model.guard
    assert isinstance(profiled, AdaptiveGuard)
    latency = latency_here(profiled.latency, *_against_profile(profiled, measured))
    here = table_here(table, profiled.latency, latency)
    controller = controller_here(model.controller, here, features)
    start = AdaptiveGuard(latency, profiled.lengths, rule=profiled.rule)
    guard = calibrated(AdaptiveVLM(model.vlm, controller, start), start, measured, alpha, hurries=profiled.rule.hurries)
    guard.origin = {"model": model.fingerprint, "samples": known}
    curve = price_curve_of(controller, with_predictions(here, features), features)
    return AdaptedToMachine(controller, guard, curve, here, _report(model, controller, guard, measured))


def _against_profile(guard: AdaptiveGuard, measured: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Log of each stage's scale ``[G]``, and measured / predicted time at these scales ``[rows, K]``.

    Of the requests alone that calibration takes for the same, so that the others stay unseen.
    """
    rows = range(for_scales(len(measured)))
    log_scale = log_scales(guard, measured, rows)
    predicted = np.zeros((len(rows), measured.latency_ms.shape[1]))
    for row, k in np.ndindex(predicted.shape):
        asked = measured.requests[row]
        stages = guard.latency.stages_of(k, asked.vision, asked.language, float(measured.output[row, k]))
        predicted[row, k] = stages @ np.exp(log_scale)
    took = measured.latency_ms[: len(rows)]
    return log_scale, np.where(took > 0, took, np.nan) / predicted


def _report(model: AdaptiveVLM, controller: GRPOController, guard: AdaptiveGuard, measured: Measured) -> dict[str, Any]:
    """What is known of this machine, and how surely."""
    settings = [
        {
            "setting": dict(model.settings[k]),
            "profiled_ms": float(model.controller.latency_ms[k]),
            "expected_ms": float(controller.latency_ms[k]),
            "measured_median_ms": float(np.median(measured.latency_ms[:, k])),
            "interval_ms": median_interval(measured.latency_ms[:, k]),
        }
        for k in np.flatnonzero(model.known).tolist()
    ]
    return {
        "requests": len(measured),
        "answers": int((measured.latency_ms > 0).sum()),
        "reference_ms": {
            "profiled": float(model.controller.latency_reference_ms), "here": float(controller.latency_reference_ms),
        },
        "settings": settings,
        "alpha": guard.alpha,
        "factor": math.exp(guard.margin.log_margin()),
        "accuracy": "as profiled",
    }  # fmt: skip
