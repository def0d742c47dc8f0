"""Names and places of result files, and what one file says of one setting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from budgetvlm.errors import KnobSpaceError
from budgetvlm.knobs import KNOBS, Value
from budgetvlm.profiling.results.measurements import AccuracyRecord, LatencyRecord

SCHEMA_VERSION = 1
WORDS = ("crops", "topk", "blocks")  # of the knobs, in names of files
Kind = Literal["accuracy", "latency"]


@dataclass(frozen=True)
class SettingResult:
    """All samples of one setting.

    Attributes:
        knobs: the setting, in the order of `KNOBS`; those that the model has.
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
        """Matches a file name; groups: the three knobs (None where the model lacks one) and the rank."""
        knobs = r"(?=_(?:crops|topk|blocks)\d)(?:_crops(\d+))?(?:_topk(\d+))?(?:_blocks(\d+))?"
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
    """Return the file of one setting, of one rank where ``rank`` is given.

    Raises:
        KnobSpaceError: the knobs are not whole numbers of (some of) max_crops, top_k and num_active_blocks.
    """
    if not knobs or set(knobs) - set(KNOBS) or any(int(value) != value for value in knobs.values()):
        given = ", ".join(f"{name}={value}" for name, value in knobs.items()) or "none"
        raise KnobSpaceError(f"result files are named by whole numbers of {', '.join(KNOBS)}; given: {given}")
    words = "".join(f"_{word}{int(knobs[name])}" for name, word in zip(KNOBS, WORDS, strict=True) if name in knobs)
    suffix = "" if rank is None else f"_rank{rank}"
    return results_directory(directory, dataset_name, kind) / f"{FORMATS[kind].stem}{words}{suffix}.json"
