"""The first chapters: what came out, and what was measured and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from budgetvlm.evaluation.records import Estimate
from budgetvlm.guard.static import timed_rows
from budgetvlm.html_report.blocks import Block, DataTable, Section, Text, Tiles, milliseconds, percent
from budgetvlm.html_report.report_data import Material


def glance(material: Material) -> Section:
    """The few figures that a reader wants first."""
    evaluation = material.evaluation
    shares = evaluation.room_budget_shares
    level = f"{evaluation.options.get('level', 0.95):.0%}"
    text = (
        f"{evaluation.counts['evaluated_samples']} held-out samples, {evaluation.counts['settings']} settings of "
        f"{', '.join(evaluation.knobs)}. The full setting is right on {percent(evaluation.full_accuracy)} and takes "
        f"{milliseconds(evaluation.latency_reference_ms)} (median); budgets are shares of that time. Brackets are "
        f"{level} bootstrap intervals over images. “Points” are percentage points of accuracy, means over budgets of "
        f"{min(shares):g} to {max(shares):g}."
    )
    return Section("glance", "At a glance", (Tiles(tuple(_figures(material))), Text(text)))


def _figures(material: Material) -> Iterator[tuple[str, str]]:
    evaluation = material.evaluation
    result = evaluation.policy("controller")
    if result is not None and result.room is not None:
        yield _points(result.room.accuracy_gain), "accuracy over the best single setting for each budget"
        if result.room.visible_room_closed is not None:
            share = result.room.visible_room_closed
            yield percent(share.value, 0), "of what knowing each question's group would gain"
    first = result.at_accuracy[0] if result is not None and result.at_accuracy else None
    if first is not None and first.saved is not None:
        low, high = percent(first.saved.low, 0), percent(first.saved.high, 0)
        what = f"less time at {percent(first.accuracy_share, 0)} of the full accuracy [{low} to {high}]"
        yield percent(first.saved.value, 0), what
    if material.live is not None:
        found = material.live["systems"]["guarded"]["all"]
        low, high = (percent(number) for number in found["interval"])
        yield percent(found["violation_rate"]), f"late on the real clock [{low} to {high}]"
        yield percent(found["controller_ms"] / found["latency_ms"]), "of a request's time for features and controller"
    if result is None:
        yield percent(evaluation.full_accuracy), "accuracy of the full setting"
        yield milliseconds(evaluation.latency_reference_ms), "its median latency"


def _points(number: Estimate) -> str:
    return f"{100 * number.value:+.1f} points [{100 * number.low:+.1f}, {100 * number.high:+.1f}]"


def measured(material: Material) -> Section:
    """Data, device, warm-up, repeats, versions."""
    table = material.table
    blocks: list[Block] = [DataTable("Data", ("", ""), tuple(_data_rows(material)))]
    how = tuple(_how_rows(table.metadata))
    if how:
        blocks.append(DataTable("How it was measured", ("", "accuracy (exp5)", "latency (exp6)"), how))
    else:
        blocks.append(Text("The table does not say how it was measured."))
    blocks.append(DataTable("This report", ("", ""), tuple(_report_rows(material))))
    fill = table.metadata.get("latency_fill") or {}
    if "fitted_on" in fill:
        blocks.append(
            Text(
                f"Latency was measured on {fill['fitted_on']} samples at each setting and predicted for the others; "
                f"median error on those measured {percent(fill.get('median_relative_error'))}. Late requests are "
                "counted over the measured ones alone."
            )
        )
    elif "fitted_on_cells" in fill:
        blocks.append(
            Text(
                f"Latency was measured on {fill['fitted_on_cells']} cells (sample, setting) and predicted for "
                f"{fill['predicted_cells']}; median error on {fill['held_out_cells']} measured cells held out for the "
                f"check {percent(fill['held_out_error_p50'])}."
            )
        )
    return Section("measured", "What was measured, and how", tuple(blocks))


def _data_rows(material: Material) -> Iterator[tuple[str, str]]:
    table, source = material.table, material.source
    if "dataset_name" in source:
        yield "data set", str(source["dataset_name"])
    if "model_path" in source:
        yield "model", str(source["model_path"])
    sides = table.split or ()
    counts = ", ".join(f"{name} {sides.count(name)}" for name in dict.fromkeys(sides))
    yield "samples", f"{table.num_samples} ({counts})" if counts else str(table.num_samples)
    if "image_id" in table.groups:
        yield "images", str(len(set(table.groups["image_id"])))
    yield "timed samples", str(int(timed_rows(table).sum()))
    for name, values in table.knob_space.knobs:
        yield name, ", ".join(f"{value:g}" for value in values)
    cells = np.isfinite(table.accuracy) & np.isfinite(table.latency_ms)
    yield "settings", f"{table.num_settings}; {percent(float(cells.mean()))} of all cells known"


def _how_rows(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the two sweeps say of themselves, side by side."""
    sides = metadata.get("exp5_config") or {}, metadata.get("exp6_config") or {}
    flat = [_flat(side) for side in sides]
    for name, title in SHOWN.items():
        values = [side.get(name) for side in flat]
        if any(value is not None for value in values):
            yield title, *("–" if value is None else str(value) for value in values)  # type: ignore[misc]


SHOWN = {
    "hardware.device": "device", "hardware.gpu": "accelerator", "hardware.cpu": "processor",
    "hardware.cores": "cores", "hardware.threads": "threads of torch", "hardware.memory_gib": "memory (GiB)",
    "hardware.platform": "platform", "batch_size": "batch size", "warmup": "untimed requests a setting first",
    "repeats": "repeats", "statistic": "of the repeats", "path": "path of a request",
    "max_new_tokens": "longest answer (tokens)", "model_fingerprint": "fingerprint of the weights", "seed": "seed",
    "versions.budgetvlm": "budgetvlm", "versions.python": "Python", "versions.torch": "torch",
    "versions.transformers": "transformers", "versions.numpy": "numpy", "versions.pillow": "pillow",
}  # fmt: skip


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value
    return found


def _report_rows(material: Material) -> Iterator[tuple[str, str]]:
    evaluation = material.evaluation
    counts = evaluation.counts
    yield (
        "evaluated split",
        f"{evaluation.split}: {counts['evaluated_samples']} samples of {counts['evaluated_images']} images",
    )
    if counts.get("left_out_incomplete"):
        yield "left out as incomplete", str(counts["left_out_incomplete"])
    yield "controllers", ", ".join(run.name for run in material.runs) or "none"
    quantile = evaluation.guard.get("quantile")
    if quantile is not None:
        yield "guard on the table", f"{percent(quantile, 0)} quantile of each setting's training latencies"
    yield "bootstrap", f"{evaluation.options.get('resamples')} resamples of images"
    yield "versions", ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    if material.live is not None and "hardware" in material.live:
        hardware = material.live["hardware"]
        yield (
            "live run on",
            f"{hardware.get('cpu')}, {hardware.get('threads')} threads, device {hardware.get('device')}",
        )
