"""Writing the result file of one setting; `profiling.results.reading` reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import write_json
from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KNOBS, Value
from budgetvlm.profiling.results.layout import FORMATS, SCHEMA_VERSION, Kind, result_path
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, Measurement

REQUIRED_CONFIG = ("split", "max_new_tokens", "world_size", "versions")


def write_result(
    kind: Kind,
    directory: str | Path,
    dataset_name: str,
    knobs: Mapping[str, Value],
    records: Sequence[Measurement],
    *,
    blocks: Mapping[str, Any],
    config: Mapping[str, Any],
    rank: int | None = None,
) -> Path:
    """Write the file of one setting, whole or not at all.

    Args:
        directory: the exp5 or exp6 directory; the file goes into its sub-directory for the data set.
        records: of the kind that is written.
        blocks: ``num_total_blocks`` and ``active_block_indices`` of the model at this setting.
        config: at least `REQUIRED_CONFIG`; data set, knobs and blocks are added here.

    Returns:
        The file's path.

    Raises:
        ConfigError: no samples, samples that occur twice, or a missing entry in ``config``.
        OutputError: it cannot be written.
    """
    path = result_path(directory, dataset_name, kind, knobs, rank)
    missing = [name for name in REQUIRED_CONFIG if name not in config]
    if missing:
        raise ConfigError(f"a result file's config needs {', '.join(REQUIRED_CONFIG)}; missing: {', '.join(missing)}")
    if not records or len({record.sample_id for record in records}) != len(records):
        raise ConfigError(f"{path.name} needs a sample at least, and each only once; given {len(records)}")
    setting = {name: int(knobs[name]) for name in KNOBS if name in knobs}
    own = setting if kind == "latency" else {}
    document = {
        "schema_version": SCHEMA_VERSION,
        "summary": [setting | dict(blocks) | {"num_samples": len(records)} | _summary(kind, records)],
        FORMATS[kind].sample_keys[0]: [record.to_dict() | own for record in records],
        "config": {"dataset_name": dataset_name, **config, **blocks, **setting}
        | ({} if rank is None else {"rank": rank}),
    }
    write_json(path, document)
    return path


def latency_statistics(times_ms: Sequence[float]) -> dict[str, float]:
    """Return mean, std, P50, P95 and P99 of times in ms."""
    times = np.asarray(times_ms, dtype=np.float64)
    percentiles = {f"P{level}": float(np.percentile(times, level)) for level in (50, 95, 99)}
    return {"mean": float(times.mean()), "std": float(times.std()), **percentiles}


def _summary(kind: Kind, records: Sequence[Any]) -> dict[str, Any]:
    if kind == "accuracy":
        scores = [record.score for record in records]
        return {"accuracy": float(np.mean(scores)), "std": float(np.std(scores))}
    summary: dict[str, Any] = {"accuracy": float(np.mean([record.accuracy for record in records]))}
    for stage, name in {"total": "T_total_ms", **STAGE_FIELDS}.items():
        times = [getattr(record, name) for record in records]
        if None not in times:
            summary[f"latency_{stage}_ms"] = latency_statistics(times)
    return summary
