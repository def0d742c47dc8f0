"""Joining the accuracy files (exp5) and the latency files (exp6) of one data set into arrays.

Shapes: S samples, M measured settings, K settings of the space that the measured values span (M < K where the sweep
left some out; their columns are NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.knobs import KnobSpace, Setting, Value
from budgetvlm.profiling.prepare.columns import AccuracyColumns, Key, TimedSetting, read_accuracy, read_latencies
from budgetvlm.profiling.prepare.fill import MIN_MEASURED, predict_cells, predict_times
from budgetvlm.profiling.prepare.prepare_options import LATENCY_FILLS
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_COUNTS, TOKEN_KINDS
from budgetvlm.table import ProfileTable, first_few

SAMPLE_IDS = "sample_ids"  # in the metadata of a table whose samples are numbers: their index in the split
BY_INDEX = "index in the split"
LATENCY_SOURCE = "latency_source"  # a label of each sample: "measured", or "predicted" at one setting at least


def join(
    exp5_dir: str | Path, exp6_dir: str | Path, dataset_name: str, *, latency_fill: str = "model"
) -> tuple[ProfileTable, tuple[str, ...]]:
    """Join both sweeps into one table.

    Args:
        latency_fill: "model" predicts the latency of samples that exp6 did not time from their token counts, and
            says so in the notes, the labels and the metadata; where exp6 timed a share of the cells, one model of all
            settings predicts the others. "settings" does so as well for settings that exp6 did not time at all. "none"
            makes all of these an error.

    Returns:
        The table, without splits, and notes for the user.

    Raises:
        ConfigError: an unknown ``latency_fill``.
        DataError: files that are missing or unusable, settings or samples of one side that the other lacks.
    """
    if latency_fill not in LATENCY_FILLS:
        raise ConfigError(f"latency_fill={latency_fill!r} is unknown; choose from {', '.join(LATENCY_FILLS)}")
    accuracy = read_accuracy(exp5_dir, dataset_name)
    timed = read_latencies(exp6_dir, dataset_name)
    _check_settings(accuracy, timed, latency_fill)
    _check_runs(accuracy, timed)
    accuracy = _only_timed(accuracy, timed, latency_fill)
    stages = _common_stages(timed)
    space = KnobSpace(_values(exp5_dir, accuracy.settings))
    by_cell = latency_fill == "settings" or (latency_fill == "model" and any(map(_in_part, timed.values())))
    times = _measured_times(accuracy, timed, stages)
    if by_cell:
        times, predicted, errors = _filled_by_cell(space, accuracy, times, stages)
    else:
        times, predicted, errors = _filled_by_setting(accuracy, timed, times, stages, latency_fill)
    notes, fill = _describe_fill(accuracy, timed, predicted, errors, by_cell)
    source = tuple(np.where(predicted.any(axis=1), "predicted", "measured").tolist())
    table = _table(space, accuracy, times, stages)
    metadata = _metadata(dataset_name, accuracy, timed, fill)
    return replace(table, groups=accuracy.groups | {LATENCY_SOURCE: source}, metadata=metadata), notes


def _in_part(setting: TimedSetting) -> bool:
    """Return whether a setting was timed on its share of the samples."""
    return "cells" in setting.config


def _table(space: KnobSpace, accuracy: AccuracyColumns, times: np.ndarray, stages: Sequence[str]) -> ProfileTable:
    """Make a table of scores, tokens and times ``[S, M, 1 + stages]``, without labels."""
    return ProfileTable.from_arrays(
        space,
        accuracy.sample_ids,
        _columns(space, accuracy.settings, np.round(accuracy.scores, 6)),
        _columns(space, accuracy.settings, times[..., 0]),
        stages_ms={s: _columns(space, accuracy.settings, times[..., 1 + i]) for i, s in enumerate(stages)},
        tokens=_token_columns(space, accuracy),
    )


def _values(exp5_dir: str | Path, settings: Sequence[tuple[tuple[str, Value], ...]]) -> dict[str, list[Value]]:
    """Return the values of each knob; all settings have to have the same knobs."""
    names = {tuple(name for name, _ in key) for key in settings}
    if len(names) > 1:
        listed = "; ".join(", ".join(some) for some in sorted(names))
        raise DataError(f"results in {exp5_dir} are of different knobs ({listed}), so of different models; keep one's")
    return {name: sorted({dict(key)[name] for key in settings}) for name in names.pop()}


def _only_timed(accuracy: AccuracyColumns, timed: Mapping[Key, TimedSetting], latency_fill: str) -> AccuracyColumns:
    """Numbered samples without token counts are kept only where every setting was timed: no latency can be predicted.

    Tools that number samples count tokens in the latency files alone.
    """
    if not accuracy.indexed or accuracy.tokens is not None or latency_fill == "none":
        return accuracy
    everywhere = set.intersection(*(set(timed[key].sample_ids) for key in accuracy.settings if key in timed))
    rows = np.array([row for row, name in enumerate(accuracy.sample_ids) if name in everywhere], dtype=np.int64)
    return accuracy.only(rows) if len(rows) else accuracy  # none: the check of samples says what is wrong


def _token_columns(space: KnobSpace, accuracy: AccuracyColumns) -> dict[str, np.ndarray]:
    """Return counts ``[S, K]`` by kind, where exp5 has them."""
    if accuracy.tokens is None:
        return {}
    counts = np.moveaxis(accuracy.tokens, -1, 0)
    return {kind: _columns(space, accuracy.settings, c) for kind, c in zip(TOKEN_KINDS, counts, strict=True)}


def _check_settings(accuracy: AccuracyColumns, timed: Mapping[Key, TimedSetting], latency_fill: str) -> None:
    for name, missing, remedy in (
        (
            "exp6 (latency)",
            set() if latency_fill == "settings" else set(accuracy.settings) - timed.keys(),
            ", or have them predicted with --latency_fill settings",
        ),
        ("exp5 (accuracy)", timed.keys() - set(accuracy.settings), ""),
    ):
        if missing:
            raise DataError(
                f"settings differ between exp5 and exp6: {name} lacks {len(missing)}: "
                + "; ".join(str(Setting(key)) for key in sorted(missing)[:5])
                + (" ..." if len(missing) > 5 else "")
                + f". Profile both with the same settings, remove the files that have no twin{remedy}."
            )


def _check_runs(accuracy: AccuracyColumns, timed: Mapping[Key, TimedSetting]) -> None:
    """Both sweeps have to have run one model, with answers of one length, on samples of the same splits."""
    for setting in timed.values():
        where, other = setting.paths[0], accuracy.paths[0]
        for name in ("max_new_tokens", "model_fingerprint", "task"):
            ours, theirs = accuracy.config.get(name), setting.config.get(name)
            if None not in (ours, theirs) and ours != theirs:
                raise DataError(
                    f"{where}: field config.{name} is {theirs}, but {other} has {ours}. Latency and accuracy have "
                    "to be of the same answers of one model; profile again with one value."
                )
        beyond = set(split_names(setting.config)) - set(split_names(accuracy.config))
        if beyond and accuracy.config.get("split"):
            raise DataError(
                f"{where}: field config.split is {setting.config['split']!r}, but {other} has "
                f"{accuracy.config['split']!r}. Profile both on the same splits."
            )


def split_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the splits that a sweep ran on: "train+test" or "train,test" are two."""
    text = str(config.get("split") or "")
    return tuple(name.strip() for name in text.replace(",", "+").split("+") if name.strip())


def _common_stages(timed: Mapping[Key, TimedSetting]) -> tuple[str, ...]:
    return tuple(stage for stage in STAGE_FIELDS if all(stage in setting.stages for setting in timed.values()))


def _measured_times(accuracy: AccuracyColumns, timed: Mapping[Key, TimedSetting], stages: Sequence[str]) -> np.ndarray:
    """Return times ``[S, M, 1 + stages]``, NaN where not timed."""
    rows = {name: row for row, name in enumerate(accuracy.sample_ids)}
    times = np.full((*accuracy.scores.shape, 1 + len(stages)), np.nan)
    for column, key in enumerate(accuracy.settings):
        if key not in timed:
            continue
        places = [place for place, name in enumerate(timed[key].sample_ids) if name in rows]
        at = [rows[timed[key].sample_ids[place]] for place in places]
        times[at, column] = timed[key].times_ms[np.ix_(places, _wanted(timed[key], stages))]
    return times


def _wanted(setting: TimedSetting, stages: Sequence[str]) -> list[int]:
    """Return columns of its times: the total, then these stages."""
    return [0, *(1 + setting.stages.index(stage) for stage in stages)]


def _filled_by_cell(
    space: KnobSpace, accuracy: AccuracyColumns, times: np.ndarray, stages: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Do as `_filled_by_setting` with one model of all settings; errors are of cells that it was not fitted on."""
    predicted = np.isnan(times[..., 0])
    if not predicted.any():
        return np.round(times, 4), predicted, np.zeros(0)
    if accuracy.tokens is None:
        raise DataError(_no_counts(accuracy, f"exp6 timed {int((~predicted).sum())} of {predicted.size} cells"))
    filled = predict_cells(_table(space, accuracy, times, stages))
    columns = [space.index(dict(key)) for key in accuracy.settings]
    whole = np.stack([filled.latency_ms, *(filled.stages_ms[stage] for stage in stages)], axis=-1)[:, columns]
    return np.round(np.where(np.isnan(times), whole, times), 4), predicted, filled.relative_errors


def _filled_by_setting(
    accuracy: AccuracyColumns,
    timed: Mapping[Key, TimedSetting],
    times: np.ndarray,
    stages: Sequence[str],
    latency_fill: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return times ``[S, M, 1 + stages]``, which of them are predicted ``[S, M]``, and relative errors of the fits."""
    times, predicted = times.copy(), np.zeros(accuracy.scores.shape, dtype=bool)
    errors = []
    for column, key in enumerate(accuracy.settings):
        setting, wanted = timed[key], _wanted(timed[key], stages)
        gaps = np.flatnonzero(np.isnan(times[:, column, 0]))
        _check_samples(accuracy, setting, gaps, len(times) - len(gaps), latency_fill)
        if len(gaps) and accuracy.tokens is not None:
            filled = predict_times(setting.tokens, setting.times_ms[:, wanted], accuracy.tokens[gaps, column])
            times[gaps, column], predicted[gaps, column] = filled.times_ms, True
            errors.append(filled.relative_errors)
    return np.round(times, 4), predicted, np.concatenate(errors) if errors else np.zeros(0)


def _check_samples(
    accuracy: AccuracyColumns, setting: TimedSetting, gaps: np.ndarray, shared: int, latency_fill: str
) -> None:
    """Raise unless every sample was timed, or the rest can be predicted."""
    where, total = setting.paths[0], len(accuracy.sample_ids)
    if not shared:
        raise DataError(
            f"{where} shares no sample with exp5 ({accuracy.paths[0]}): {first_few(setting.sample_ids, 2)} against "
            f"{first_few(accuracy.sample_ids, 2)}. Profile both on the same split with the same seed."
        )
    beyond = set(setting.sample_ids) - set(accuracy.sample_ids)
    lacking = f"{where} lacks {len(gaps)} of the {total} samples of exp5: " + first_few(
        accuracy.sample_ids[row] for row in gaps
    )
    if latency_fill == "none" and beyond:
        raise DataError(f"{where} has {len(beyond)} samples that exp5 lacks: {first_few(beyond)}. Profile both alike.")
    if not len(gaps):
        return
    if latency_fill == "none":
        raise DataError(f"{lacking}. Time them too, or have them predicted with --latency_fill model.")
    if shared < MIN_MEASURED:
        raise DataError(
            f"{lacking}. To predict them, {MIN_MEASURED} have to be timed; {shared} are. Time more samples."
        )
    if accuracy.tokens is None:
        raise DataError(_no_counts(accuracy, lacking))


def _no_counts(accuracy: AccuracyColumns, lacking: str) -> str:
    return (
        f"{lacking}. They cannot be predicted, because {accuracy.paths[0]} and its like have no field "
        f"{', '.join(TOKEN_COUNTS)} in every sample. Time all samples."
    )


def _columns(space: KnobSpace, settings: Sequence[Key], values: np.ndarray) -> np.ndarray:
    """Return ``[S, M] -> [S, K]``: measured columns at their places, NaN elsewhere."""
    full = np.full((len(values), space.num_settings), np.nan, dtype=np.float32)
    full[:, [space.index(dict(key)) for key in settings]] = values
    return full


def _describe_fill(
    accuracy: AccuracyColumns,
    timed: Mapping[Key, TimedSetting],
    predicted: np.ndarray,
    errors: np.ndarray,
    by_cell: bool,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return notes for the user, and the same for the metadata."""
    count, total = int(predicted.any(axis=1).sum()), len(accuracy.sample_ids)
    notes = []
    fill: dict[str, Any] = {"predicted_samples": count, "predicted_cells": int(predicted.sum())}
    extra = len({name for s in timed.values() for name in s.sample_ids} - set(accuracy.sample_ids))
    if "skipped" in accuracy.config:
        names = first_few(accuracy.config["skipped"])
        notes.append(f"{len(accuracy.config['skipped'])} samples that could not be used were left out: {names}")
    if count and by_cell:
        cells, share = predicted.size - int(predicted.sum()), 1 - float(predicted.mean())
        error = {f"held_out_error_p{level}": round(float(np.percentile(errors, level)), 4) for level in (50, 95)}
        fill |= {"fitted_on_cells": cells, "held_out_cells": len(errors), **error}
        notes.append(
            f"latency of {int(predicted.sum())} of {predicted.size} cells (sample, setting) predicted from {cells} "
            f"measured ({share:.1%}); error on {len(errors)} measured cells held out for the check: median "
            f"{np.median(errors):.1%}, p95 {np.percentile(errors, 95):.1%}"
        )
    elif count:
        measured = min(len(setting.sample_ids) for setting in timed.values())
        fill |= {"fitted_on": measured, "median_relative_error": round(float(np.median(errors)), 4)}
        notes.append(
            f"latency of {count} of {total} samples predicted from {measured} measured at each setting "
            f"(time = a + b x tokens), median error {np.median(errors):.1%} on those measured"
        )
    if accuracy.left_out:
        fill["samples_left_out"] = accuracy.left_out
        notes.append(f"{accuracy.left_out} samples left out: not every setting has both their score and their latency")
    if extra:
        fill["samples_only_in_exp6"] = extra
        notes.append(f"{extra} samples of exp6 are not in exp5: they help to fit the latency, but are in no split")
    return tuple(notes), fill


def _metadata(
    dataset_name: str, accuracy: AccuracyColumns, timed: Mapping[Key, TimedSetting], fill: Mapping[str, Any]
) -> dict[str, Any]:
    first = next(timed[key] for key in accuracy.settings if key in timed)
    return {
        "dataset_name": dataset_name,
        "measured_settings": len(accuracy.settings),
        "latency_fill": dict(fill),
        "exp5_config": accuracy.config,
        "exp6_config": first.config,
    } | ({SAMPLE_IDS: BY_INDEX} if accuracy.indexed else {})
