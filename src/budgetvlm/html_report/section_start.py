"""The first and the last section: what came out, and what was measured and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from budgetvlm.guard.static import timed_rows
from budgetvlm.html_report.report_chart import ReportSection
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
    table, metadata = inputs.table, inputs.table.metadata
    values = {
        "inputs": inputs,
        "split": Counter(table.split or ()),
        "timed": int(timed_rows(table).sum()),
        "known": float((np.isfinite(table.accuracy) & np.isfinite(table.latency_ms)).mean()),
        "measurements": list(_measurement_rows(metadata)),
        "fill": metadata.get("latency_fill") or {},
    }
    return ReportSection("measured", "What was measured, and how", values=values)


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
