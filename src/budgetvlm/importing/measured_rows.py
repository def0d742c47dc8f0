"""Measurements as rows (one of a sample at a setting), and the profile table that they make.

Shapes: n rows, S samples, K settings of the space that the knobs' values span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable, first_few

DUPLICATES = ("error", "mean", "last")
MAX_CELLS = 200_000_000  # of the table; beyond it a column that is no knob was taken for one


@dataclass(frozen=True, eq=False)
class Cells:
    """Rows of measurements.

    Attributes:
        source: where they come from, for messages.
        sample_ids: strings ``[n]``.
        knobs: knob -> float64 ``[n]``.
        score: float64 ``[n]``, 0 to 1, NaN where none.
        latency_ms: float64 ``[n]``, above 0, NaN where none.
        stages_ms, tokens: name -> float64 ``[n]``.
        groups: label -> strings ``[n]``, alike in all rows of a sample.
        by_index: whether a sample's id is its index in the split.
    """

    source: str
    sample_ids: np.ndarray
    knobs: Mapping[str, np.ndarray]
    score: np.ndarray
    latency_ms: np.ndarray
    stages_ms: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    by_index: bool = False

    def __len__(self) -> int:
        return len(self.sample_ids)

    def where(self, row: int) -> str:
        """Name one row in words."""
        setting = ", ".join(f"{name}={values[row]:g}" for name, values in self.knobs.items())
        return f"sample {self.sample_ids[row]} at {setting}"


def to_table(cells: Cells, *, duplicates: str = "error", metadata: Mapping[str, Any]) -> ProfileTable:
    """Make a table of these rows; cells without a row are NaN.

    Args:
        duplicates: several rows of one cell: "error", their "mean", or the "last" one.

    Raises:
        ConfigError: an unknown ``duplicates``.
        DataError: no rows, rows that occur twice, values that cannot be, labels that differ within a sample.
    """
    if duplicates not in DUPLICATES:
        raise ConfigError(f"duplicates={duplicates!r} is unknown; choose from {', '.join(DUPLICATES)}")
    if not len(cells):
        raise DataError(f"{cells.source} holds no measurements")
    _check_values(cells)
    space, columns = _settings(cells)
    names, first, rows = _samples(cells)
    if len(names) * space.num_settings > MAX_CELLS:
        raise DataError(
            f"{len(names)} samples x {space.num_settings} settings are more than {MAX_CELLS} cells. The settings are "
            f"all that the values of {', '.join(space.names)} span: {space}. Is one of these columns no knob?"
        )
    shape = (len(names), space.num_settings)
    place = _filler(cells, rows * space.num_settings + columns, shape, duplicates)
    return ProfileTable.from_arrays(
        space,
        names,
        place(cells.score),
        place(cells.latency_ms),
        stages_ms={stage: place(values) for stage, values in cells.stages_ms.items()},
        tokens={kind: place(values) for kind, values in cells.tokens.items()},
        groups={label: _labels(cells, label, first, rows) for label in cells.groups},
        metadata={"measured_settings": len(np.unique(columns)), **metadata},
    )


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
    """Return the samples that have score and latency at every setting that was measured.

    Raises:
        DataError: there are none.
    """
    both = ~(np.isnan(table.accuracy) | np.isnan(table.latency_ms))
    kept = both[:, both.any(axis=0)].all(axis=1)
    if not kept.any():
        raise DataError(
            "no sample has score and latency at every setting. Give the same samples to every run, or keep the gaps "
            "(--gaps keep)."
        )
    return table.subset(kept)


def with_latencies(table: ProfileTable, given: Cells) -> ProfileTable:
    """Replace the latencies by those of another file, of each sample at each setting or of each setting alone.

    Raises:
        DataError: a setting of the table that the file lacks, other knobs, or latencies that cannot be.
    """
    if set(given.knobs) != set(table.knob_space.names):
        raise DataError(f"{given.source} has knobs {', '.join(given.knobs)}, not {', '.join(table.knob_space.names)}")
    _check_values(given)
    per_setting = not given.sample_ids.any()
    found: dict[tuple[str, int], float] = {}
    for row, (name, ms) in enumerate(zip(given.sample_ids, given.latency_ms, strict=True)):
        setting = {knob: _number(given.knobs[knob][row]) for knob in table.knob_space.names}
        if all(value in table.knob_space.values(knob) for knob, value in setting.items()):
            key = name, table.knob_space.index(setting)
            if found.setdefault(key, ms) != ms:
                raise DataError(f"{given.source}: {given.where(row)} occurs twice with different latencies")
    latency = np.array(table.latency_ms)
    for column in np.flatnonzero(~np.isnan(table.accuracy).all(axis=0)):
        times = [found.get(("" if per_setting else name, int(column)), np.nan) for name in table.sample_ids]
        if np.isnan(times).all():
            raise DataError(f"{given.source} has no latency of {table.knob_space.settings[column]}. Add its rows.")
        latency[:, column] = np.where(np.isnan(times), latency[:, column], times)
    return replace(table, latency_ms=latency)


def _check_values(cells: Cells) -> None:
    checks: list[tuple[str, np.ndarray, Callable[[np.ndarray], np.ndarray], str]] = [
        ("score", cells.score, lambda v: (v < 0) | (v > 1),
         "it has to be 0 to 1. Where scores are in per cent, give --score_scale 100"),
        ("latency_ms", cells.latency_ms, lambda v: v <= 0, "it has to be above 0. Leave it empty where nothing ran"),
        *((f"stage {name}", v, lambda v: v < 0, "it has to be 0 or more") for name, v in cells.stages_ms.items()),
        *((f"tokens {name}", v, lambda v: v < 0, "it has to be 0 or more") for name, v in cells.tokens.items()),
    ]  # fmt: skip
    for name, values, wrong, rule in checks:
        rows = np.flatnonzero(wrong(values) | np.isinf(values))
        if len(rows):
            more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
            raise DataError(f"{cells.source}: {name} of {cells.where(rows[0])} is {values[rows[0]]:g}; {rule}{more}")
    for name, values in cells.knobs.items():
        rows = np.flatnonzero(~((values > 0) & np.isfinite(values)))
        if len(rows):
            raise DataError(
                f"{cells.source}: knob {name} is {values[rows[0]]:g} in row {rows[0] + 1}; knobs are numbers above 0"
            )


def _settings(cells: Cells) -> tuple[KnobSpace, np.ndarray]:
    """Return the space that the values span, and each row's setting, int64 ``[n]``."""
    columns = np.zeros(len(cells), dtype=np.int64)
    knobs = {}
    for name, values in cells.knobs.items():
        distinct, inverse = np.unique(values, return_inverse=True)
        knobs[name] = [_number(value) for value in distinct]
        columns = columns * len(distinct) + inverse
    return KnobSpace(knobs), columns


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _samples(cells: Cells) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return distinct ids in order of appearance ``[S]``, the first row of each ``[S]``, each row's sample ``[n]``."""
    distinct, first, inverse = np.unique(cells.sample_ids.astype(str), return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order].tolist(), first[order], rank[inverse]


def _filler(
    cells: Cells, flat: np.ndarray, shape: tuple[int, int], duplicates: str
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that puts a column of rows ``[n]`` into a matrix ``[S, K]``."""
    _, first, times = np.unique(flat, return_index=True, return_counts=True)
    repeated = first[times > 1]
    if len(repeated) and duplicates == "error":
        raise DataError(
            f"{cells.source}: {len(repeated)} cells occur more than once: {cells.where(repeated[0])} "
            f"({int(times[times > 1][0])} times)"
            + (" and others" if len(repeated) > 1 else "")
            + ". Remove what does not belong there, or give --duplicates mean or --duplicates last."
        )

    def place(values: np.ndarray) -> np.ndarray:
        matrix = np.full(shape[0] * shape[1], np.nan)
        given = ~np.isnan(values)
        where, known = flat[given], values[given]
        if duplicates == "mean":
            total = np.bincount(where, known, minlength=len(matrix))
            count = np.bincount(where, minlength=len(matrix))
            matrix[count > 0] = total[count > 0] / count[count > 0]
        else:
            matrix[where] = known  # of equal places numpy keeps the last
        return matrix.reshape(shape)

    return place


def _labels(cells: Cells, label: str, first: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return one label for each sample ``[S]``."""
    values = cells.groups[label].astype(str)
    kept = values[first]
    differing = np.flatnonzero(values != kept[rows])
    if len(differing):
        names = {str(cells.sample_ids[row]) for row in differing}
        raise DataError(
            f"{cells.source}: label {label} differs between rows of one sample: {first_few(names)}. A label is of "
            "the sample, not of the setting; leave that column out."
        )
    return [str(value) for value in kept]
