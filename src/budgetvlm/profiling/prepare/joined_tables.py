"""Several data sets as one table: each sample's id begins with its data set's name, and the label "dataset" tells it.

Shapes: S samples, K settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from budgetvlm._io import first_few
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.profiling.results.reading import split_names
from budgetvlm.table import DATASET, SPLITS, UNIT, ProfileTable
from budgetvlm.tasks.options import TaskOptions

OWN_UNIT = "unit_id"  # the label of units where the data sets' own have different names


def join_tables(tables: Mapping[str, ProfileTable], say: Callable[[str], None] = print) -> ProfileTable:
    """Join tables of one model, each of a data set that it is named after; one table stays as it is.

    Labels that some data set lacks are left out. Where several data sets share a unit, such as an image, all its
    samples go to one split: to test if any is there, or else to validation.

    Args:
        tables: with splits, or all without.
        say: takes a line for the user.

    Raises:
        DataError: other knob spaces, or other weights.
    """
    names, parts = list(tables), list(tables.values())
    if len(parts) == 1:
        return parts[0]
    _require_one_model(tables)
    shared = [label for label in parts[0].groups if all(label in part.groups for part in parts)]
    groups: dict[str, Sequence[str]] = {DATASET: [name for name, part in tables.items() for _ in range(len(part))]}
    groups |= {label: [value for part in parts for value in part.groups[label]] for label in shared}
    unit = parts[0].unit
    if len({part.unit for part in parts}) > 1:
        unit, groups[OWN_UNIT] = OWN_UNIT, [f"{name}/{one}" for name in names for one in tables[name].units]
    joined = ProfileTable.from_arrays(
        parts[0].knob_space,
        [own_id(name, sample_id) for name, part in tables.items() for sample_id in part.sample_ids],
        np.concatenate([part.accuracy for part in parts]),
        np.concatenate([part.latency_ms for part in parts]),
        stages_ms=_stacked([part.stages_ms for part in parts]),
        tokens=_stacked([part.tokens for part in parts]),
        groups=groups,
        metadata=_metadata(tables) | {UNIT: unit},
    )
    sides = [part.split for part in parts]
    return joined if None in sides else _with_sides(joined, [one for side in sides for one in side or ()], say)


def join_features(features: Mapping[str, Features]) -> Features:
    """Join the features of data sets, whose ids then are as in `join_tables`; those of one stay as they are.

    Raises DataError: they were made in different ways, so that equal numbers mean different things.
    """
    names, parts = list(features), list(features.values())
    if len(parts) == 1:
        return parts[0]
    for name, part in features.items():
        widths = [one.image.shape[1] for one in (parts[0], part)], [one.language.shape[1] for one in (parts[0], part)]
        if any(first != own for first, own in widths):
            raise DataError(
                f"the features of {name} have {widths[0][1]} image and {widths[1][1]} language dimensions, those of "
                f"{names[0]} {widths[0][0]} and {widths[1][0]}. Extract both from one model."
            )
        if part.metadata.get("extractor") != parts[0].metadata.get("extractor"):
            raise DataError(
                f"the features of {name} were fitted to other samples than those of {names[0]}, so equal numbers mean "
                "different things. Make them together: budgetvlm import table --input a.csv,b.csv --features auto."
            )
    return Features(
        tuple(own_id(name, sample_id) for name, part in features.items() for sample_id in part.sample_ids),
        np.concatenate([part.image for part in parts]),
        np.concatenate([part.language for part in parts]),
        _alike([part.metadata for part in parts]),
    )


def own_id(name: str, sample_id: str) -> str:
    """Return a sample's id among those of several data sets."""
    return sample_id if sample_id.startswith(f"{name}/") else f"{name}/{sample_id}"


def _require_one_model(tables: Mapping[str, ProfileTable]) -> None:
    first, *others = tables
    for name in others:
        tables[first].knob_space.require_equal(tables[name].knob_space, f"the table of {name} (beside {first})")
        known = [tables[one].metadata.get("model_fingerprint") for one in (first, name)]
        if None not in known and known[0] != known[1]:
            raise DataError(
                f"{first} and {name} were measured with other weights ({known[0]} and {known[1]}), and one controller "
                "is for one model. Profile both with the same."
            )


def _stacked(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the matrices ``[S, K]`` that all parts have, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if all(name in p for p in parts)}


def _metadata(tables: Mapping[str, ProfileTable]) -> dict[str, Any]:
    """Return what is alike, with what later steps have to know of all data sets; all of it by data set beside that."""
    given = {name: table.metadata for name, table in tables.items()}
    found = _alike(list(given.values())) | {"data_sets": given}
    if all("dataset_name" in one for one in given.values()):
        found["dataset_name"] = TaskOptions(",".join(given)).name
    for sweep in ("exp5_config", "exp6_config"):
        configs = {name: one[sweep] for name, one in given.items() if sweep in one}
        if len(configs) == len(given):
            found[sweep] = _config(configs)
    splits = [one["calibration_split"] for one in given.values() if "calibration_split" in one]
    if splits:
        found["calibration_split"] = max(dict.fromkeys(splits), key=splits.count)
    return found


def _config(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return one config for the sweeps of several data sets: what a sweep of all of them would have said."""
    found, values = _alike(list(configs.values())), list(configs.values())
    splits = {split for config in values for split in split_names(config)}
    found["split"] = "+".join(sorted(splits, key=SPLITS.index if splits <= set(SPLITS) else None))
    longest = [config["max_new_tokens"] for config in values if "max_new_tokens" in config]
    found |= {"max_new_tokens": max(longest)} if longest else {}
    found.pop("dataset_name", None)
    task = TaskOptions.joined([TaskOptions(name, **config.get("task", {})) for name, config in configs.items()])
    return found | ({"task": task.to_dict()} if task.to_dict() else {})


def _alike(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = documents
    return {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}


def _with_sides(table: ProfileTable, sides: Sequence[str], say: Callable[[str], None]) -> ProfileTable:
    """Return the table with these splits, but units that stand on several sides moved to one."""
    side_of: dict[str, str] = {}
    for unit, side in zip(table.units, sides, strict=True):
        side_of[unit] = max(side_of.get(unit, side), side, key=SPLITS.index)
    moved = {unit for unit, side in zip(table.units, sides, strict=True) if side_of[unit] != side}
    if moved:
        say(
            f"{len(moved)} {table.unit_name}s are in several data sets, on different sides of their splits, and were "
            f"moved to one: {first_few(moved)}"
        )
    return replace(table, split=tuple(side_of[unit] for unit in table.units))
