"""Which profiled samples train the controller, which choose the best checkpoint, which are held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from budgetvlm._io import first_few
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.profiling.measure.cell_selection import units_in_full
from budgetvlm.table import LEAST_UNITS, SPLITS, ProfileTable, draw_splits

TASK_SPLIT = "split"  # the label by which a sweep over several splits says where a sample comes from


def assign_splits(table: ProfileTable, train_split: float, test_split: float | None, seed: int) -> ProfileTable:
    """Give the table splits, by its units.

    Splits of the task are kept where the samples come from several: test stays test, and train and validation stay
    as they are if both are there. All else is drawn.

    Args:
        train_split: share of train in train and validation together.
        test_split: share of the units that is held out; 0 for none. None: as `ProfileTable.shares_of_splits` says, and
            half of the validation split where the task has that; where a share of the cells was measured, the units
            that were measured in full.

    Raises:
        ConfigError: a share that cannot work or leaves a side empty, or a test split beside that of the task.
        DataError: a split that is unknown.
    """
    given, units = table.groups.get(TASK_SPLIT, ()), table.units
    if "cells" in table.metadata.get("exp5_config", {}) and "test" not in given:
        return _with_test(table, train_split, test_split, seed)
    if len(set(given)) < 2:
        return table.with_splits(table.shares_of_splits(train_split, test_split), seed)
    unknown = set(given) - set(SPLITS)
    if unknown:
        raise DataError(f"field groups.split has unknown splits {first_few(unknown)}; known are {', '.join(SPLITS)}")
    if test_split and ("test" in given or {"train", "validation"} <= set(given)):
        raise ConfigError(
            f"test_split={test_split} cannot be drawn: the samples come from the task's own splits "
            f"({', '.join(sorted(set(given)))}), which are kept. Leave test_split at 0."
        )
    kept, fractions = {"test"}, table.shares_of_splits(train_split, test_split or 0.0)
    if {"train", "validation"} <= set(given):
        held_out = {unit for unit, side in zip(units, given, strict=True) if side == "validation"}
        if "test" in given or test_split is not None or len(held_out) < LEAST_UNITS:
            return replace(table, split=given)
        kept, fractions = {"train"}, {"validation": 0.5, "test": 0.5}
    rest = [unit for unit, side in zip(units, given, strict=True) if side not in kept]
    drawn = draw_splits(rest, fractions, seed)
    return replace(
        table,
        split=tuple(side if side in kept else drawn[unit] for unit, side in zip(units, given, strict=True)),
    )


def _measured_in_full(table: ProfileTable) -> set[str]:
    """Return the units that a sweep of a share of the cells was to measure in full, and did.

    Where settings are few, others are complete too, by chance.
    """
    label = table.metadata["exp5_config"].get("groups", "image_id")
    measured, names = np.isfinite(table.accuracy), table.groups.get(label, table.sample_ids)
    asked = units_in_full(names, table.groups.get(TASK_SPLIT, ("train",) * len(names)))
    complete = measured[:, measured.any(axis=0)].all(axis=1)
    rows = zip(table.units, names, complete, strict=True)
    return set(table.units) - {unit for unit, name, whole in rows if not whole or name not in asked}


def _with_test(table: ProfileTable, train_split: float, test_split: float | None, seed: int) -> ProfileTable:
    """Make the units that were measured in full the test split, because only these can be evaluated on."""
    whole = _measured_in_full(table)
    if not whole:
        raise ConfigError(
            f"no {table.unit_name} can be held out: a share of the cells was measured (`profile accuracy --cells`), "
            f"and none was measured at every setting. Give the same `profile accuracy` with --groups {table.unit}: it "
            "keeps what there is, and measures some in full."
        )
    if test_split is not None:
        raise ConfigError(
            f"test_split={test_split} cannot be drawn: a share of the cells was measured (`profile accuracy --cells`), "
            "and what was measured in full is the test split. Leave test_split out."
        )
    units = table.units
    given = table.groups.get(TASK_SPLIT, ("train",) * len(units))
    drawn = dict(zip(units, given, strict=True))
    if set(given) != {"train", "validation"}:
        drawn = draw_splits(
            [unit for unit in units if unit not in whole], table.shares_of_splits(train_split, 0.0), seed
        )
    return replace(table, split=tuple("test" if unit in whole else drawn[unit] for unit in units))


def describe_splits(table: ProfileTable) -> dict[str, Any]:
    """Count the samples and units of each split; a unit by its name: "images", "documents"."""
    assert table.split is not None
    counted = {"samples": Counter(table.split)}
    counted[f"{table.unit_name}s"] = Counter(side for side, _ in set(zip(table.split, table.units, strict=True)))
    sides = {what: {name: found[name] for name in SPLITS if found[name]} for what, found in counted.items()}
    return {"by": table.unit_name, **sides}
