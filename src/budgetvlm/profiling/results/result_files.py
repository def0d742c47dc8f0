"""The result file of one setting: its name, its place, what it holds, and how it is written.

`profiling.results.reading` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from budgetvlm._io import atomic_path
from budgetvlm.errors import ConfigError, KnobSpaceError
from budgetvlm.knobs import KNOBS, MODEL, Value
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, AccuracyRecord, LatencyRecord, Measurement
from budgetvlm.tasks.options import PLACES

SCHEMA_VERSION = 1
RESCORED = "asked_as"  # in the config of rescored results: the task by which the answers were asked for
MACHINES = "machines"  # in the config of latencies of several machines: name -> hardware
FILE_KNOBS = (MODEL, *KNOBS)  # that results may be of, in the order of their settings
WORDS = ("model", "crops", "topk", "blocks")  # of these, in names of files
REQUIRED_CONFIG = ("split", "max_new_tokens", "world_size", "versions")
Kind = Literal["accuracy", "latency"]


@dataclass(frozen=True)
class SettingResult:
    """All samples of one setting.

    Attributes:
        knobs: the setting, in the order of `FILE_KNOBS`; those that the model has.
        records: one `AccuracyRecord` or `LatencyRecord` a sample, ids unique.
        config: as stored in the (first) file: dataset_name, split, max_new_tokens, versions and so on.
        paths: the files it was read from.
        indexed: whether the files number the samples: a sample_id is then its index in the split.
        rank: of the samples, where they are those of one rank; None where they are all.
    """

    knobs: dict[str, Value]
    records: tuple[Any, ...]
    config: dict[str, Any]
    paths: tuple[Path, ...]
    indexed: bool = False
    rank: int | None = None


@dataclass(frozen=True)
class Format:
    """How the files of one kind are called and built.

    Attributes:
        experiment: stem of the directory's name, and name of the script that makes such files.
        stem: stem of the file's name.
        sample_keys: where the samples may be; the first one is where they are written.
        record: their type.
    """

    experiment: str
    stem: str
    sample_keys: tuple[str, ...]
    record: type[AccuracyRecord] | type[LatencyRecord]

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches a file name; groups: the knobs (None where there is none) and the rank."""
        knobs = f"(?=_(?:{'|'.join(WORDS)})\\d)" + "".join(rf"(?:_{word}(\d+))?" for word in WORDS)
        return re.compile(re.escape(self.stem) + knobs + r"(?:_rank(\d+))?\.json")


FORMATS: dict[Kind, Format] = {
    "accuracy": Format("exp5_accuracy", "exp5_accuracy_results", ("all_samples",), AccuracyRecord),
    "latency": Format("exp6_latency", "exp6_latency", ("per_sample_latencies", "all_samples"), LatencyRecord),
}


def results_directory(directory: str | Path, dataset_name: str, kind: Kind) -> Path:
    """Return where results are written: ``<directory>/exp5_accuracy_<dataset with - for _>`` or exp6_latency_...."""
    return Path(directory) / f"{FORMATS[kind].experiment}_{dataset_name.replace('_', '-')}"


def result_path(
    directory: str | Path, dataset_name: str, kind: Kind, knobs: Mapping[str, Value], rank: int | None = None
) -> Path:
    """Return the file of a setting (of one rank, if given). Raises KnobSpaceError: other knobs than `FILE_KNOBS`."""
    if not knobs or set(knobs) - set(FILE_KNOBS) or any(int(value) != value for value in knobs.values()):
        given = ", ".join(f"{name}={value}" for name, value in knobs.items()) or "none"
        raise KnobSpaceError(f"result files are named by whole numbers of {', '.join(FILE_KNOBS)}; given: {given}")
    words = "".join(f"_{word}{int(knobs[name])}" for name, word in zip(FILE_KNOBS, WORDS, strict=True) if name in knobs)
    suffix = "" if rank is None else f"_rank{rank}"
    return results_directory(directory, dataset_name, kind) / f"{FORMATS[kind].stem}{words}{suffix}.json"


def write_result(
    kind: Kind,
    directory: str | Path,
    dataset_name: str,
    knobs: Mapping[str, Value],
    records: Collection[Measurement],
    *,
    blocks: Mapping[str, Any],
    config: Mapping[str, Any],
    rank: int | None = None,
) -> Path:
    """Write the file of one setting, whole or not at all.

    Args:
        directory: the exp5 or exp6 directory; the file goes into its sub-directory for the data set.
        records: of the kind that is written; looked at several times.
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
    if not records or _some_twice(records):
        raise ConfigError(f"{path.name} needs a sample at least, and each only once; given {len(records)}")
    setting = {name: int(knobs[name]) for name in FILE_KNOBS if name in knobs}
    own = setting if kind == "latency" else {}
    summary = setting | dict(blocks) | {"num_samples": len(records)} | _summary(kind, records)
    more = {} if rank is None else {"rank": rank}
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(_text({"schema_version": SCHEMA_VERSION, "summary": [summary]})[:-1])
        file.write(f', "{FORMATS[kind].sample_keys[0]}": ')
        for number, record in enumerate(records):  # one at a time: there may be a million
            file.write((", " if number else "[") + _text(record.to_dict() | own))
        file.write("], " + _text({"config": {"dataset_name": dataset_name, **config, **blocks, **setting} | more})[1:])
        file.write("\n")
    return path


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _some_twice(records: Collection[Measurement]) -> bool:
    """Tell whether a sample occurs twice. Names are looked at only where their hashes are not all different."""
    hashes = np.fromiter((hash(record.sample_id) for record in records), np.int64, len(records))
    return len(np.unique(hashes)) < len(records) and len({record.sample_id for record in records}) < len(records)


def identity(config: Any) -> dict[str, Any]:
    """Return what a sweep is of, without places: the same data or weights under another path are the same."""
    if not isinstance(config, Mapping):
        return {}
    places = {"model_path"} if config.get("model_fingerprint") else set()
    task = {name: value for name, value in (config.get("task") or {}).items() if name not in PLACES}
    return {name: value for name, value in config.items() if name not in places} | {"task": task}


def latency_statistics(times_ms: Sequence[float]) -> dict[str, float]:
    """Return mean, std, P50, P95 and P99 of times in ms."""
    times = np.asarray(times_ms, dtype=np.float64)
    percentiles = {f"P{level}": float(np.percentile(times, level)) for level in (50, 95, 99)}
    return {"mean": float(times.mean()), "std": float(times.std()), **percentiles}


def _summary(kind: Kind, records: Collection[Any]) -> dict[str, Any]:
    if kind == "accuracy":
        scores = np.fromiter((record.score for record in records), np.float64, len(records))
        return {"accuracy": float(np.mean(scores)), "std": float(np.std(scores))}
    summary: dict[str, Any] = {"accuracy": float(np.mean([record.accuracy for record in records]))}
    for stage, name in {"total": "T_total_ms", **STAGE_FIELDS}.items():
        times = [getattr(record, name) for record in records]
        if None not in times:
            summary[f"latency_{stage}_ms"] = latency_statistics(times)
    return summary
