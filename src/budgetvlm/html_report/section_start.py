"""The first and the last section: what came out, and what was measured and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from budgetvlm.guard.static import timed_rows
from budgetvlm.html_report.number_format import percent
from budgetvlm.html_report.page import ReportSection
from budgetvlm.html_report.report_inputs import ReportInputs

# Fields of the two measurements that are shown, with their names in the page.
MEASUREMENT_FIELDS = {
    "hardware.device": "device", "hardware.gpu": "accelerator", "hardware.cpu": "processor",
    "hardware.cores": "cores", "hardware.threads": "threads of torch", "hardware.memory_gib": "memory (GiB)",
    "hardware.platform": "platform", "batch_size": "batch size",
    "warmup": "untimed requests before each setting's first", "repeats": "repeats", "statistic": "of the repeats",
    "path": "path of a request", "max_new_tokens": "longest answer (tokens)",
    "model_fingerprint": "fingerprint of the weights", "seed": "seed", "versions.budgetvlm": "budgetvlm",
    "versions.python": "Python", "versions.torch": "torch", "versions.transformers": "transformers",
    "versions.numpy": "numpy", "versions.pillow": "pillow",
}  # fmt: skip


def glance(inputs: ReportInputs) -> ReportSection:
    """The few numbers that a reader wants first."""
    evaluation = inputs.evaluation
    values = {"evaluation": evaluation, "result": evaluation.policy("controller"), "live": inputs.live}
    return ReportSection("glance", "At a glance", values=values)


def measured(inputs: ReportInputs) -> ReportSection:
    """Data, device, warm-up, repeats and versions."""
    metadata = inputs.table.metadata
    values = {
        "data": list(_data_rows(inputs)),
        "measurements": list(_measurement_rows(metadata)),
        "report": list(_report_rows(inputs)),
        "fill": metadata.get("latency_fill") or {},
    }
    return ReportSection("measured", "What was measured, and how", values=values)


def _data_rows(inputs: ReportInputs) -> Iterator[tuple[str, str]]:
    table, source = inputs.table, inputs.source
    for name, title in (("dataset_name", "data set"), ("model_path", "model")):
        if name in source:
            yield title, str(source[name])
    split = table.split or ()
    counts = ", ".join(f"{name} {split.count(name)}" for name in dict.fromkeys(split))
    yield "samples", f"{table.num_samples} ({counts})" if counts else str(table.num_samples)
    if "image_id" in table.groups:
        yield "images", str(len(set(table.groups["image_id"])))
    yield "timed samples", str(int(timed_rows(table).sum()))
    for name, values in table.knob_space.knobs:
        yield name, ", ".join(f"{value:g}" for value in values)
    cells = np.isfinite(table.accuracy) & np.isfinite(table.latency_ms)
    yield "settings", f"{table.num_settings}; {percent(float(cells.mean()))} of all cells known"


def _measurement_rows(metadata: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """What the measurements of accuracy and latency say about themselves, side by side."""
    sides = [_flat(metadata.get(name) or {}) for name in ("exp5_config", "exp6_config")]
    for field, title in MEASUREMENT_FIELDS.items():
        if any(field in side for side in sides):
            yield title, *(str(side.get(field, "–")) for side in sides)


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as "outer.inner", without those that are None."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value
    return found


def _report_rows(inputs: ReportInputs) -> Iterator[tuple[str, str]]:
    evaluation = inputs.evaluation
    counts = evaluation.counts
    evaluated = f"{counts['evaluated_samples']} samples of {counts['evaluated_images']} images"
    yield "evaluated split", f"{evaluation.split}: {evaluated}"
    if counts.get("left_out_incomplete"):
        yield "left out as incomplete", str(counts["left_out_incomplete"])
    yield "controllers", ", ".join(run.name for run in inputs.runs) or "none"
    quantile = evaluation.guard.get("quantile")
    if quantile is not None:
        yield "guard on the table", f"{percent(quantile, 0)} quantile of each setting's training latencies"
    yield "bootstrap", f"{evaluation.options.get('resamples')} resamples of images"
    yield "versions", ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    hardware = (inputs.live or {}).get("hardware")
    if hardware is not None:
        where = f"{hardware.get('cpu')}, {hardware.get('threads')} threads, device {hardware.get('device')}"
        yield "live run on", where
