"""The result files of the accuracy sweep (exp5) and the latency sweep (exp6): the public door of the format.

One JSON document a setting; here it is written, in `profiling.results.reading` it is read. The format knows no
model, measures nothing and loads no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import write_json
from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KNOBS, Value
from budgetvlm.profiling.results.layout import (
    FORMATS,
    SCHEMA_VERSION,
    Kind,
    SettingResult,
    result_path,
    results_directory,
)
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, AccuracyRecord, LatencyRecord
from budgetvlm.profiling.results.reading import iter_results, read_file, result_files

__all__ = [
    "FORMATS",
    "AccuracyRecord",
    "Kind",
    "LatencyRecord",
    "SettingResult",
    "iter_results",
    "latency_statistics",
    "read_file",
    "result_files",
    "result_path",
    "results_directory",
    "write_accuracy_result",
    "write_latency_result",
]

REQUIRED_CONFIG = ("split", "max_new_tokens", "world_size", "versions")


def write_accuracy_result(
    directory: str | Path,
    dataset_name: str,
    knobs: Mapping[str, Value],
    records: Sequence[AccuracyRecord],
    *,
    num_total_blocks: int,
    active_block_indices: Sequence[int],
    config: Mapping[str, Any],
    rank: int | None = None,
) -> Path:
    """Write the exp5 file of one setting, whole or not at all.

    Args:
        directory: the exp5 directory; the file goes into its sub-directory for the data set.
        config: at least `REQUIRED_CONFIG`; data set, knobs and blocks are added here.

    Returns:
        The file's path.

    Raises:
        ConfigError: no samples, samples that occur twice, or a missing entry in ``config``.
        OutputError: it cannot be written.
    """
    scores = [record.score for record in records]
    blocks = {"num_total_blocks": num_total_blocks, "active_block_indices": list(active_block_indices)}
    summary = blocks | {"num_samples": len(records)}
    if scores:
        summary |= {"accuracy": float(np.mean(scores)), "std": float(np.std(scores))}
    return _write("accuracy", directory, dataset_name, knobs, records, summary, dict(config) | blocks, rank)


def write_latency_result(
    directory: str | Path,
    dataset_name: str,
    knobs: Mapping[str, Value],
    records: Sequence[LatencyRecord],
    *,
    num_total_blocks: int,
    active_block_indices: Sequence[int],
    config: Mapping[str, Any],
    rank: int | None = None,
) -> Path:
    """Write the exp6 file of one setting, whole or not at all. Arguments and errors as `write_accuracy_result`."""
    blocks = {"num_total_blocks": num_total_blocks, "active_block_indices": list(active_block_indices)}
    summary = blocks | {"num_samples": len(records)}
    if records:
        summary["accuracy"] = float(np.mean([record.accuracy for record in records]))
        for stage, name in {"total": "T_total_ms", **STAGE_FIELDS}.items():
            times = [getattr(record, name) for record in records]
            if None not in times:
                summary[f"latency_{stage}_ms"] = latency_statistics(times)
    return _write("latency", directory, dataset_name, knobs, records, summary, dict(config) | blocks, rank)


def latency_statistics(times_ms: Sequence[float]) -> dict[str, float]:
    """Return mean, std, P50, P95 and P99 of times in ms."""
    times = np.asarray(times_ms, dtype=np.float64)
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {
        "mean": float(times.mean()),
        "std": float(times.std()),
        "P50": float(p50),
        "P95": float(p95),
        "P99": float(p99),
    }


def _write(
    kind: Kind,
    directory: str | Path,
    dataset_name: str,
    knobs: Mapping[str, Value],
    records: Sequence[AccuracyRecord] | Sequence[LatencyRecord],
    summary: dict[str, Any],
    config: dict[str, Any],
    rank: int | None,
) -> Path:
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
        "summary": [setting | summary],
        FORMATS[kind].sample_keys[0]: [record.to_dict() | own for record in records],
        "config": {"dataset_name": dataset_name} | config | setting | ({} if rank is None else {"rank": rank}),
    }
    write_json(path, document)
    return path
