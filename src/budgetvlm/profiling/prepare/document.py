"""`controller_training_data.json`: the prepared profile as one JSON document, and back.

It holds the knob space, the samples with their labels and splits, accuracy and latency of every setting, the budgets
and how it was made. Numbers are rounded to what was measured: 1e-6 in accuracy, 1e-4 ms in time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import read_json
from budgetvlm.errors import DataError, KnobSpaceError
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.prepare.splits import describe_splits
from budgetvlm.table import ProfileTable

SCHEMA_VERSION = 2
BUDGET_MULTIPLIERS = (0.8, 1.0, 1.2)
REMEDY = "Make it again with budgetvlm prepare --force_recompute."


def to_document(table: ProfileTable, how: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a table with splits into a document; ``how`` is stored beside it: source, options, file names."""
    stages = sorted(table.stages_ms)
    return {
        "schema_version": SCHEMA_VERSION,
        **how,
        "knob_space": table.knob_space.to_dict(),
        "budgets": {"multipliers": list(BUDGET_MULTIPLIERS), "of": "a sample's latency_ms at a profiled setting"},
        "latency_reference_ms": latency_reference_ms(table),
        "splits": describe_splits(table),
        "metadata": table.metadata,
        "samples": [
            {"sample_id": name, "split": side, "groups": {label: table.groups[label][row] for label in table.groups}}
            for row, (name, side) in enumerate(zip(table.sample_ids, table.split or (), strict=True))
        ],
        "settings": [
            {
                **setting,
                "accuracy": _numbers(table.accuracy[:, k], 6),
                "latency_ms": _numbers(table.latency_ms[:, k], 4),
                "stages_ms": {stage: _numbers(table.stages_ms[stage][:, k], 4) for stage in stages},
                "tokens": {kind: _numbers(count[:, k], 1) for kind, count in sorted(table.tokens.items())},
            }
            for k, setting in enumerate(table.knob_space.settings)
        ],
    }


def read_document(path: str | Path) -> dict[str, Any]:
    """Read the document. Raises DataError: missing, truncated, foreign, or of another schema version."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Make it with budgetvlm prepare --output_data_path {path}")
    document = read_json(path)
    if not isinstance(document, dict) or not {"knob_space", "samples", "settings"} <= document.keys():
        raise DataError(f"{path} is no controller training data: it lacks knob_space, samples or settings. {REMEDY}")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise DataError(f"{path}: field schema_version is {found!r}; this version reads {SCHEMA_VERSION}. {REMEDY}")
    return document


def to_table(document: Mapping[str, Any], path: str | Path) -> ProfileTable:
    """Make the table of a document that came from ``path``. Raises DataError: a field is missing or cannot be."""
    try:
        space = KnobSpace(document["knob_space"])
        samples, settings = document["samples"], document["settings"]
        for setting, stored in zip(space.settings, settings, strict=True):
            if any(stored[name] != value for name, value in setting.items()):
                raise DataError(f"settings are not in the order of the knob space at {setting}")
        return ProfileTable.from_arrays(
            space,
            [sample["sample_id"] for sample in samples],
            _matrix([setting["accuracy"] for setting in settings]),
            _matrix([setting["latency_ms"] for setting in settings]),
            stages_ms=_matrices(settings, "stages_ms"),
            tokens=_matrices(settings, "tokens"),
            groups={name: [sample["groups"][name] for sample in samples] for name in samples[0]["groups"]},
            split=[sample["split"] for sample in samples],
            metadata=document["metadata"],
        )
    except KeyError as error:
        raise DataError(f"{path}: missing field {error.args[0]}. {REMEDY}") from None
    except (TypeError, ValueError, IndexError, DataError, KnobSpaceError) as error:
        raise DataError(f"{path} is damaged: {error}. {REMEDY}") from error


def latency_reference_ms(table: ProfileTable) -> float | None:
    """Return median latency of the full setting on the training samples, in ms; None if it was not profiled."""
    times = table.subset("train").latency_ms[:, -1]
    return None if np.isnan(times).all() else round(float(np.nanmedian(times)), 4)


def _numbers(values: np.ndarray, digits: int) -> list[float | None] | None:
    """Return rounded numbers with None for NaN, or None where nothing was measured."""
    if np.isnan(values).all():
        return None
    rounded: list[float] = np.round(values.astype(np.float64), digits).tolist()
    return [None if math.isnan(value) else value for value in rounded]


def _matrices(settings: list[dict[str, Any]], field: str) -> dict[str, np.ndarray]:
    return {name: _matrix([setting[field][name] for setting in settings]) for name in settings[0][field]}


def _matrix(columns: list[list[float | None] | None]) -> np.ndarray:
    """Return ``[S, K]`` from K columns; None becomes NaN."""
    count = max(len(column) for column in columns if column is not None)
    return np.array([[None] * count if column is None else column for column in columns], dtype=np.float32).T
