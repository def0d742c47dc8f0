"""What one sweep measured, read from its files into arrays. Shapes: S samples, M measured settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import first_few
from budgetvlm.errors import DataError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.prepare.machine_scales import machines_of, on_one_scale
from budgetvlm.profiling.results.measurements import TIMES, TOKEN_COUNTS
from budgetvlm.profiling.results.reading import iter_results
from budgetvlm.profiling.results.result_files import MACHINES, Kind, SettingResult


@dataclass(frozen=True, eq=False)
class SweepArrays:
    """All results of one sweep.

    Attributes:
        settings: those that were measured, in the order of their knobs.
        sample_ids: those that any setting was measured on, in the order of the files.
        values: field of the records -> float64 ``[S, M]``, NaN where not measured; the fields that every record has.
        labels: the labels of each sample, ``[S]``.
        configs: what the files say of each setting, ``[M]``.
        paths: the (first) file of each setting, ``[M]``.
        indexed: whether the samples are numbered by their index in the split.
        skipped: samples that the sweep could not use -> why.
        left_out: number of samples that were left out because not every setting has them.
    """

    settings: tuple[Setting, ...]
    sample_ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    labels: tuple[dict[str, str], ...]
    configs: tuple[dict[str, Any], ...]
    paths: tuple[Path, ...]
    indexed: bool
    skipped: dict[str, str]
    left_out: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """What the files say of the whole sweep; where one that grows was stopped, the share of cells of the others."""
        cells = [own["cells"] for own in self.configs if "cells" in own]
        parted = {"cells": min(cells)} if cells else {}
        return self.configs[0] | parted | ({"skipped": self.skipped} if self.skipped else {})

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The labels that every sample has, ``[S]`` each."""
        shared = [name for name in self.labels[0] if all(name in sample for sample in self.labels)]
        return {name: tuple(sample[name] for sample in self.labels) for name in shared}

    @property
    def tokens(self) -> np.ndarray | None:
        """Token counts ``[S, M, 3]``; None unless every record has all three."""
        known = all(name in self.values for name in TOKEN_COUNTS)
        return np.stack([self.values[name] for name in TOKEN_COUNTS], axis=-1) if known else None

    def only(self, rows: np.ndarray) -> SweepArrays:
        """Return the results of some samples, by number or mask."""
        kept = np.arange(len(self.sample_ids))[rows]
        return replace(
            self,
            sample_ids=tuple(self.sample_ids[row] for row in kept),
            values={name: values[kept] for name, values in self.values.items()},
            labels=tuple(self.labels[row] for row in kept),
        )

    def at(self, other: SweepArrays, names: Sequence[str]) -> np.ndarray:
        """Return these fields for samples and settings of another sweep, ``[S, M, fields]``, NaN where unknown."""
        row_of = {name: row for row, name in enumerate(self.sample_ids)}
        column_of = {setting: column for column, setting in enumerate(self.settings)}
        rows = [row_of.get(name, -1) for name in other.sample_ids]
        columns = [column_of.get(setting, -1) for setting in other.settings]
        values = np.stack([self.values[name] for name in names], axis=-1)
        padded = np.pad(values, ((0, 1), (0, 1), (0, 0)), constant_values=np.nan)  # -1 finds the NaN at the end
        return padded[np.ix_(rows, columns)]


def read_accuracy(exp5_dir: str | Path, dataset_name: str) -> SweepArrays:
    """Read all accuracy files of a data set; the samples are those that every setting was scored on.

    Where a share of the cells was measured, they are all samples, and what was not measured is NaN. A sample that one
    setting skipped as unusable is left out of all. Where samples are numbered, so are those that some setting lacks:
    tools that number samples often stop at the end of a batch, and choose the batch's size anew for each setting.

    Raises:
        DataError: unusable files, or settings that were scored on different samples.
    """
    sweep = read_sweep(exp5_dir, dataset_name, "accuracy")
    sweep = sweep.only(np.array([name not in sweep.skipped for name in sweep.sample_ids]))
    if any("cells" in config for config in sweep.configs):
        return sweep
    lacking = np.isnan(sweep.values["score"])
    shared = ~lacking.any(axis=1)
    if sweep.indexed and shared.any():
        return replace(sweep.only(shared), left_out=int((~shared).sum()))
    if not shared.all():
        column = int(lacking.any(axis=0).argmax())
        missing = np.flatnonzero(lacking[:, column])
        other = int((~lacking[missing[0]]).argmax())
        raise DataError(
            f"{sweep.paths[column]} lacks {len(missing)} samples of {sweep.paths[other]}: "
            f"{first_few(sweep.sample_ids[row] for row in missing)}. "
            "Every setting has to be scored on the same samples; run the accuracy sweep to its end."
        )
    return sweep


def read_sweep(directory: str | Path, dataset_name: str, kind: Kind) -> SweepArrays:
    """Read all files of a sweep; times of several machines are brought onto one scale.

    Raises DataError: unusable files, or labels that differ between settings.
    """
    names = (*(("score",) if kind == "accuracy" else TIMES), *TOKEN_COUNTS)  # the first one is never missing
    rows: dict[str, int] = {}
    labels: dict[str, dict[str, str]] = {}
    columns: list[tuple[list[int], np.ndarray]] = []
    results: list[SettingResult] = []
    machines = machines_of(iter_results(directory, dataset_name, kind)) if kind == "latency" else {}
    for result in iter_results(directory, dataset_name, kind):
        if machines:
            records = tuple(on_one_scale(result.records, machines))
            result = replace(result, records=records, config=result.config | {MACHINES: machines})
        groups = {record.sample_id: getattr(record, "groups", {}) for record in result.records}
        differing = [name for name, own in groups.items() if labels.setdefault(name, own) != own]
        if differing:
            raise DataError(
                f"{result.paths[0]}: field groups differs from {results[0].paths[0]} in {len(differing)} samples: "
                f"{first_few(differing)}"
            )
        fields = [[getattr(record, name) for name in names] for record in result.records]
        columns.append(([rows.setdefault(name, len(rows)) for name in groups], np.array(fields, dtype=np.float64)))
        results.append(replace(result, records=()))  # what is read is dropped, file by file
    cells = np.full((len(rows), len(columns), len(names)), np.nan)
    for column, (places, measured) in enumerate(columns):
        cells[places, column] = measured
    filled = ~np.isnan(cells[..., 0])
    return SweepArrays(
        settings=tuple(Setting(tuple(result.knobs.items())) for result in results),
        sample_ids=tuple(rows),
        values={name: cells[..., i] for i, name in enumerate(names) if not np.isnan(cells[filled, i]).any()},
        labels=tuple(labels.values()),
        configs=tuple(result.config for result in results),
        paths=tuple(result.paths[0] for result in results),
        indexed=all(result.indexed for result in results),
        skipped={name: why for result in results for name, why in result.config.get("skipped", {}).items()},
    )
