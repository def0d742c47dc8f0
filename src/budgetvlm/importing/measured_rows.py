"""Measurements as rows (one of a sample at a setting), and the profile table that they make.

Shapes: n rows, S samples, K settings of the space that the knobs' values span.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from budgetvlm._io import first_few
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

DUPLICATES = ("error", "mean", "last")
SMALLEST_SHARE = 0.01  # of a latency that prefill and decode together can be
SECONDS_SHARE = 0.001  # of a latency in milliseconds that a stage in seconds is at most
MAX_CELLS = 200_000_000  # of the table; beyond it a column that is no knob was taken for one


_TINY, _HUGE = np.finfo(np.float64).tiny, np.finfo(np.float64).max
# what a column may hold: from, to, and the rule in words
RULES = {
    "score": (
        0.0,
        1.0,
        "it has to be 0 to 1. Where the largest score is another, give it: --score_scale 100 for per cent",
    ),
    "latency_ms": (_TINY, _HUGE, "it has to be above 0. Leave it empty where nothing ran"),
    "stage": (0.0, _HUGE, "it has to be 0 or more"),
    "tokens": (0.0, _HUGE, "it has to be 0 or more"),
}
KNOB_RULE = (_TINY, _HUGE, "knobs are numbers above 0")


@dataclass(frozen=True, eq=False)
class Cells:
    """Rows of measurements.

    Attributes:
        source: where they come from, for messages.
        knobs: the names of the knobs.
        sample_ids: strings ``[n]``.
        values: float64 ``[n]`` of each knob and of "score" (0 to 1), "latency_ms" (above 0), "stage.NAME" in ms and
            "tokens.NAME" (0 or more), NaN where none.
        labels: "group.NAME" -> strings ``[n]``, alike in all rows of a sample.
        by_index: whether a sample's id is its index in the split.
    """

    source: str
    knobs: tuple[str, ...]
    sample_ids: np.ndarray
    values: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    by_index: bool = False

    def __len__(self) -> int:
        return len(self.sample_ids)

    def where(self, row: int) -> str:
        """Name one row in words."""
        setting = ", ".join(f"{name}={self.values[name][row]:g}" for name in self.knobs)
        return f"sample {self.sample_ids[row]} at {setting}"


def to_table(cells: Cells, *, duplicates: str = "error", metadata: Mapping[str, Any]) -> ProfileTable:
    """Make a table of these rows; cells without a row are NaN.

    ``duplicates``: several rows of one cell: "error", their "mean", or the "last" one. Raises ConfigError: an unknown
    ``duplicates``; DataError: no rows, rows that occur twice, values that cannot be, labels that differ within a
    sample.
    """
    if duplicates not in DUPLICATES:
        raise ConfigError(f"duplicates={duplicates!r} is unknown; choose from {', '.join(DUPLICATES)}")
    if not len(cells):
        raise DataError(f"{cells.source} holds no measurements")
    _check_values(cells)
    space, columns = _settings(cells)
    coded = pa.array(cells.sample_ids, pa.string()).dictionary_encode()  # in the order of their first rows
    names, rows = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    if len(names) * space.num_settings > MAX_CELLS:
        raise DataError(
            f"{len(names)} samples x {space.num_settings} settings are more than {MAX_CELLS} cells. The settings are "
            f"all that the values of {', '.join(space.names)} span: {space}. Is one of these columns no knob?"
        )
    shape = (len(names), space.num_settings)
    flat = rows.astype(np.int64) * space.num_settings + columns
    if duplicates == "error":
        _require_each_once(cells, flat)
    matrices = {role: _matrix(values, flat, shape, duplicates == "mean") for role, values in cells.values.items()}
    return ProfileTable.from_arrays(
        space,
        names,
        matrices["score"],
        matrices["latency_ms"],
        stages_ms=_named(matrices, "stage."),
        tokens=_named(matrices, "tokens."),
        groups={name: _label(cells, name, labels, rows) for name, labels in _named(cells.labels, "group.").items()},
        metadata={"measured_settings": len(np.unique(columns)), **metadata},
    )


def _named(columns: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Return the columns of one kind ("stage.") by their own names."""
    return {role.removeprefix(kind): values for role, values in columns.items() if role.startswith(kind)}


def counts(table: ProfileTable) -> dict[str, int]:
    """Count samples, settings and cells, and the cells that have a score, a latency, or both."""
    score, latency = ~np.isnan(table.accuracy), ~np.isnan(table.latency_ms)
    measured = (score | latency).any(axis=0)
    return {
        "samples": table.num_samples,
        "settings": int(measured.sum()),
        "settings_of_the_space": table.num_settings,
        "cells": table.num_samples * int(measured.sum()),
        "cells_with_score": int(score.sum()),
        "cells_with_latency": int(latency.sum()),
        "cells_with_both": int((score & latency).sum()),
        "samples_without_gap": int((score & latency)[:, measured].all(axis=1).sum()),
    }


def complete_samples(table: ProfileTable) -> ProfileTable:
    """Return the samples with score and latency at every measured setting. Raises DataError: there are none."""
    both = ~(np.isnan(table.accuracy) | np.isnan(table.latency_ms))
    kept = both[:, both.any(axis=0)].all(axis=1)
    if not kept.any():
        raise DataError(
            "no sample has score and latency at every setting. Give the same samples to every run, or keep the gaps "
            "(--gaps keep)."
        )
    return table.subset(kept)


def with_latencies(table: ProfileTable, given: Cells, *, duplicates: str = "error") -> ProfileTable:
    """Replace the latencies by those of another file, of each sample at each setting or of each setting alone.

    ``given``: rows with the knobs of the table, with or without sample ids. ``duplicates``: as in `to_table`. Raises
    DataError: a setting of the table that the file lacks, or latencies that cannot be.
    """
    theirs = to_table(given, duplicates=duplicates, metadata={})
    row_of = {name: row for row, name in enumerate(theirs.sample_ids)}
    column_of = {setting: column for column, setting in enumerate(theirs.knob_space.settings)}
    rows = [row_of.get(name, -1) if given.sample_ids.any() else 0 for name in table.sample_ids]
    columns = [column_of.get(setting, -1) for setting in table.knob_space.settings]
    padded = np.pad(theirs.latency_ms, (0, 1), constant_values=np.nan)  # -1 finds the NaN at the end
    found, measured = padded[np.ix_(rows, columns)], ~np.isnan(table.accuracy).all(axis=0)
    lacking = np.flatnonzero(measured & np.isnan(found).all(axis=0))
    if len(lacking):
        raise DataError(f"{given.source} has no latency of {table.knob_space.settings[lacking[0]]}. Add its rows.")
    return replace(table, latency_ms=np.where(np.isnan(found) | ~measured, table.latency_ms, found))


def _check_values(cells: Cells) -> None:
    for role, values in cells.values.items():
        is_knob = role in cells.knobs
        low, high, rule = KNOB_RULE if is_knob else RULES[role.partition(".")[0]]
        wrong = np.flatnonzero((values < low) | (values > high) | (np.isnan(values) & is_knob))
        if len(wrong):
            value = f"is {values[wrong[0]]:.15g}"
            what = f"knob {role} {value} in row {wrong[0] + 1}"
            if not is_knob:
                what = f"{role.replace('.', ' ', 1)} of {cells.where(wrong[0])} {value}"
            more = f" ({len(wrong)} such rows)" if len(wrong) > 1 else ""
            raise DataError(f"{cells.source}: {what}; {rule}{more}")

    _check_stages(cells)


def _check_stages(cells: Cells) -> None:
    """Raise DataError where a long stage, or both together, are nearly nothing of the latency: the units differ."""
    long = {role: cells.values[role] for role in ("stage.prefill", "stage.decode") if role in cells.values}
    asked = [(role.replace(".", " "), values, SECONDS_SHARE) for role, values in long.items()]
    if len(long) == 2:
        stages = [values for role, values in cells.values.items() if role.startswith("stage.")]
        asked.append(("sum of the stages", np.sum(stages, axis=0), SMALLEST_SHARE))
    for what, values, least in asked:
        share = (values / cells.values["latency_ms"])[values > 0]
        share = share[~np.isnan(share)]
        if len(share) and np.median(share) <= least:
            raise DataError(
                f"{cells.source}: the {what} is {np.median(share):.2%} of the latency (median). Has it another unit? "
                "Give both in the same."
            )


def _settings(cells: Cells) -> tuple[KnobSpace, np.ndarray]:
    """Return the space that the values span, and each row's setting, int64 ``[n]``."""
    columns = np.zeros(len(cells), dtype=np.int64)
    knobs = {}
    for name in cells.knobs:
        distinct, inverse = np.unique(cells.values[name], return_inverse=True)
        rounded = [float(f"{value:.12g}") for value in distinct]  # 0.1 + 0.2 is 0.3
        distinct, merged = np.unique(rounded, return_inverse=True)
        inverse = merged[inverse]
        knobs[name] = [int(value) if value.is_integer() else value for value in distinct.tolist()]
        columns = columns * len(distinct) + inverse
    return KnobSpace(knobs), columns


def _require_each_once(cells: Cells, flat: np.ndarray) -> None:
    """Raise DataError where two rows are of one cell; ``flat`` are the cells' numbers, ``[n]``."""
    _, first, times = np.unique(flat, return_index=True, return_counts=True)
    repeated = first[times > 1]
    if len(repeated):
        raise DataError(
            f"{cells.source}: {len(repeated)} cells occur more than once: {cells.where(repeated[0])} "
            f"({int(times[times > 1][0])} times)"
            + (" and others" if len(repeated) > 1 else "")
            + ". Remove what does not belong there, or give --duplicates mean or --duplicates last."
        )


def _matrix(values: np.ndarray, flat: np.ndarray, shape: tuple[int, int], mean: bool) -> np.ndarray:
    """Put a column ``[n]`` into the cells ``[S, K]`` of its rows: of several values the mean, or else the last one."""
    matrix = np.full(shape[0] * shape[1], np.nan)
    given = ~np.isnan(values)
    where, known = flat[given], values[given]
    if mean:
        count = np.bincount(where, minlength=len(matrix))
        total = np.bincount(where, known, minlength=len(matrix))
        matrix[count > 0] = total[count > 0] / count[count > 0]
    else:
        matrix[where] = known  # of equal places numpy keeps the last
    return matrix.reshape(shape)


def _label(cells: Cells, name: str, labels: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return one label for each sample ``[S]``, of labels and samples by row, ``[n]`` each."""
    kept = labels[np.unique(rows, return_index=True)[1]]
    differing = np.flatnonzero(labels != kept[rows])
    if len(differing):
        names = {str(cells.sample_ids[row]) for row in differing}
        raise DataError(
            f"{cells.source}: label {name} differs between rows of one sample: {first_few(names)}. A label is of "
            "the sample, not of the setting; leave that column out."
        )
    return [str(label) for label in kept]
