"""The two sides of a join, read from their files: scores of samples (exp5) and times of samples (exp6).

Shapes: S samples, M measured settings, T times (the total, then its stages).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm.errors import DataError
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_COUNTS
from budgetvlm.profiling.results.result_files import AccuracyRecord, LatencyRecord, SettingResult, iter_results
from budgetvlm.table import first_few

Key = tuple[tuple[str, Any], ...]  # a setting, hashable


@dataclass(frozen=True)
class AccuracyColumns:
    """What the accuracy files hold: scores ``[S, M]``, token counts ``[S, M, 3]`` or None, labels of the samples.

    ``indexed``: the samples are numbered by their index in the split. ``left_out``: how many not every setting has.
    """

    settings: tuple[Key, ...]
    sample_ids: tuple[str, ...]
    scores: np.ndarray
    tokens: np.ndarray | None
    groups: dict[str, tuple[str, ...]]
    config: dict[str, Any]
    paths: tuple[Path, ...]
    indexed: bool = False
    left_out: int = 0

    def only(self, rows: np.ndarray) -> AccuracyColumns:
        """Keep some of the samples, by number ``[n]``."""
        return replace(
            self,
            sample_ids=tuple(self.sample_ids[row] for row in rows),
            scores=self.scores[rows],
            tokens=None if self.tokens is None else self.tokens[rows],
            groups={name: tuple(labels[row] for row in rows) for name, labels in self.groups.items()},
            left_out=self.left_out + len(self.sample_ids) - len(rows),
        )


@dataclass(frozen=True)
class TimedSetting:
    """What the latency files hold of one setting: n samples, times ``[n, T]`` (total first), counts ``[n, 3]``."""

    sample_ids: tuple[str, ...]
    times_ms: np.ndarray
    tokens: np.ndarray
    stages: tuple[str, ...]
    config: dict[str, Any]
    paths: tuple[Path, ...]


def read_accuracy(exp5_dir: str | Path, dataset_name: str) -> AccuracyColumns:
    """Read all accuracy files of a data set.

    Raises:
        DataError: unusable files, or settings that were scored on different samples.
    """
    rows: dict[str, int] = {}
    labels: list[dict[str, str]] = []
    columns, tokens, settings = [], [], []
    paths: list[Path] = []
    config: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    results, left_out = _with_shared_samples(iter_results(exp5_dir, dataset_name, "accuracy"))
    indexed = True
    for result in results:
        skipped |= result.config.get("skipped", {})
        indexed = indexed and result.indexed
        if not rows:
            rows = {record.sample_id: row for row, record in enumerate(result.records)}
            labels, config = [record.groups for record in result.records], result.config
        order = _order(result, rows, paths, labels, skipped)
        columns.append(np.array([record.score for record in order], dtype=np.float64))
        tokens.append(_token_counts(order))
        settings.append(tuple(result.knobs.items()))
        paths += result.paths
    counted = [count for count in tokens if count is not None]
    kept = [row for name, row in rows.items() if name not in skipped]  # a sample that one setting skipped, all skip
    names = list(rows)
    return AccuracyColumns(
        settings=tuple(settings),
        sample_ids=tuple(names[row] for row in kept),
        scores=np.stack(columns, axis=1)[kept],
        tokens=np.stack(counted, axis=1)[kept] if len(counted) == len(settings) else None,
        groups=_label_columns([labels[row] for row in kept]),
        config=config | ({"skipped": skipped} if skipped else {}),
        paths=tuple(paths),
        indexed=indexed,
        left_out=left_out,
    )


def read_latencies(exp6_dir: str | Path, dataset_name: str) -> dict[Key, TimedSetting]:
    """Read all latency files of a data set, by setting.

    Raises:
        DataError: unusable files.
    """
    return {tuple(r.knobs.items()): _timed(r) for r in iter_results(exp6_dir, dataset_name, "latency")}


def _with_shared_samples(
    results: Iterable[SettingResult[AccuracyRecord]],
) -> tuple[Iterable[SettingResult[AccuracyRecord]], int]:
    """Where samples are numbered, keep those that all results have; return how many were left out as well.

    Tools that number samples often stop at the end of a batch, and choose the batch's size anew for each setting.
    """
    results = iter(results)
    first = next(results)
    if not first.indexed:
        return chain([first], results), 0
    everything = [first, *results]
    found = [{record.sample_id for record in result.records} for result in everything]
    shared = set.intersection(*found)
    if not shared:
        return everything, 0  # the order check says what is wrong
    kept = [replace(r, records=tuple(x for x in r.records if x.sample_id in shared)) for r in everything]
    return kept, len(set.union(*found)) - len(shared)


def _timed(result: SettingResult[LatencyRecord]) -> TimedSetting:
    records = result.records
    stages = tuple(s for s, name in STAGE_FIELDS.items() if all(getattr(r, name) is not None for r in records))
    names = ["T_total_ms", *(STAGE_FIELDS[stage] for stage in stages)]
    return TimedSetting(
        sample_ids=tuple(record.sample_id for record in records),
        times_ms=np.array([[getattr(record, name) for name in names] for record in records], dtype=np.float64),
        tokens=np.array([[getattr(record, name) for name in TOKEN_COUNTS] for record in records], dtype=np.int64),
        stages=stages,
        config=result.config,
        paths=result.paths,
    )


def _order(
    result: SettingResult[AccuracyRecord],
    rows: Mapping[str, int],
    paths: Sequence[Path],
    labels: list[dict[str, str]],
    skipped: Mapping[str, str],
) -> list[AccuracyRecord]:
    """Put the records in the order of the first setting's; both must have the same samples and labels.

    Of samples that a sweep skipped as unusable the other setting may have a record; any stands in for the missing one.
    """
    found = {record.sample_id: record for record in result.records}
    where = ", ".join(map(str, result.paths))
    for what, missing in (("lacks", rows.keys() - found.keys()), ("has beyond", found.keys() - rows.keys())):
        missing = missing - skipped.keys()
        if missing:
            raise DataError(
                f"{where} {what} {len(missing)} samples of {paths[0]}: {first_few(missing)}. "
                "Every setting has to be scored on the same samples; run the accuracy sweep to its end."
            )
    differing = [
        name for name, known in zip(rows, labels, strict=True) if name in found and found[name].groups != known
    ]
    if differing:
        raise DataError(
            f"{where}: field groups differs from {paths[0]} in {len(differing)} samples: {first_few(differing)}"
        )
    return [found.get(name, result.records[0]) for name in rows]


def _token_counts(records: Sequence[AccuracyRecord]) -> np.ndarray | None:
    """Return counts ``[S, 3]``, or None where a record lacks one."""
    counts = [[getattr(record, name) for name in TOKEN_COUNTS] for record in records]
    return None if any(None in row for row in counts) else np.array(counts, dtype=np.int64)


def _label_columns(labels: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Return the labels that every sample has."""
    shared = [name for name in labels[0] if all(name in sample for sample in labels)]
    return {name: tuple(sample[name] for sample in labels) for name in shared}
