"""Joining the accuracy files (exp5) and the latency files (exp6) of one data set into arrays.

Shapes: S samples, M measured settings, T times (the total, then the stages), K settings of the space that the measured
values span (M < K where the sweep left some out; their columns are NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import first_few
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.profiling.prepare.columns import SweepArrays, read_accuracy, read_sweep
from budgetvlm.profiling.prepare.fill import MIN_MEASURED, predict_cells, predict_times
from budgetvlm.profiling.prepare.machine_scales import said_of_machines
from budgetvlm.profiling.prepare.prepare_options import LATENCY_FILLS
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TIMES, TOKEN_COUNTS, TOKEN_KINDS
from budgetvlm.profiling.results.reading import split_names
from budgetvlm.profiling.results.result_files import MACHINES, RESCORED, identity
from budgetvlm.table import ProfileTable

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
    accuracy, timed = read_accuracy(exp5_dir, dataset_name), read_sweep(exp6_dir, dataset_name, "latency")
    _check_settings(accuracy, timed, latency_fill)
    _check_runs(accuracy, timed)
    if accuracy.indexed and accuracy.tokens is None and latency_fill != "none":
        accuracy = _only_timed(accuracy, timed)
    space = _space(exp5_dir, accuracy.settings)
    parted = any("cells" in config for config in (*timed.configs, *accuracy.configs))
    by_cell = latency_fill == "settings" or (latency_fill == "model" and parted)
    accuracy = _with_counts(accuracy, timed)
    times = timed.at(accuracy, [name for name in TIMES if name in timed.values])
    predicted = np.isnan(times[..., 0])
    if by_cell:
        times, errors = _filled_by_cell(space, accuracy, times, timed)
    else:
        times, errors = _filled_by_setting(accuracy, timed, times, latency_fill)
    notes, fill = _describe_fill(accuracy, timed, predicted, errors, by_cell)
    source = tuple(np.where(predicted.any(axis=1), "predicted", "measured").tolist())
    metadata = {
        "dataset_name": dataset_name,
        "measured_settings": len(accuracy.settings),
        "latency_fill": fill,
        "exp5_config": accuracy.config,
        "exp6_config": timed.config,
    } | ({SAMPLE_IDS: BY_INDEX} if accuracy.indexed else {})
    table = _table(space, accuracy, np.round(times, 4), timed)
    return replace(table, groups=accuracy.groups | {LATENCY_SOURCE: source}, metadata=metadata), notes


def _stages(timed: SweepArrays) -> list[str]:
    return [stage for stage, name in STAGE_FIELDS.items() if name in timed.values]


def _table(space: KnobSpace, accuracy: SweepArrays, times: np.ndarray, timed: SweepArrays) -> ProfileTable:
    """Make a table of scores, tokens and times ``[S, M, T]``, without labels."""
    places = [space.index(setting) for setting in accuracy.settings]

    def spread(values: np.ndarray) -> np.ndarray:
        """Return ``[S, M] -> [S, K]``: measured columns at their places, NaN elsewhere."""
        full = np.full((len(values), space.num_settings), np.nan, dtype=np.float32)
        full[:, places] = values
        return full

    tokens = {} if accuracy.tokens is None else dict(zip(TOKEN_KINDS, np.moveaxis(accuracy.tokens, -1, 0), strict=True))
    return ProfileTable.from_arrays(
        space,
        accuracy.sample_ids,
        spread(np.round(accuracy.values["score"], 6)),
        spread(times[..., 0]),
        stages_ms={stage: spread(times[..., 1 + i]) for i, stage in enumerate(_stages(timed))},
        tokens={kind: spread(counts) for kind, counts in tokens.items()},
    )


def _space(exp5_dir: str | Path, settings: Sequence[Setting]) -> KnobSpace:
    """Return the space that the settings span; all of them have to have the same knobs."""
    names = {tuple(setting) for setting in settings}
    if len(names) > 1:
        listed = "; ".join(", ".join(some) for some in sorted(names))
        raise DataError(f"results in {exp5_dir} are of different knobs ({listed}), so of different models; keep one's")
    return KnobSpace({name: sorted({setting[name] for setting in settings}) for name in names.pop()})


def _only_timed(accuracy: SweepArrays, timed: SweepArrays) -> SweepArrays:
    """Keep the samples that every timed setting was timed on: without token counts no latency can be predicted.

    Tools that number samples count tokens in the latency files alone.
    """
    untimed = np.isnan(timed.at(accuracy, ["T_total_ms"])[..., 0])
    everywhere = ~untimed[:, [setting in timed.settings for setting in accuracy.settings]].any(axis=1)
    if not everywhere.any():
        return accuracy  # the check of samples says what is wrong
    return replace(accuracy.only(everywhere), left_out=accuracy.left_out + int((~everywhere).sum()))


def _with_counts(accuracy: SweepArrays, timed: SweepArrays) -> SweepArrays:
    """Add the token counts of cells that were timed but not scored."""
    if accuracy.tokens is None or timed.tokens is None:
        return accuracy
    counted = dict(zip(TOKEN_COUNTS, np.moveaxis(timed.at(accuracy, TOKEN_COUNTS), -1, 0), strict=True))
    known = {name: np.where(np.isnan(accuracy.values[name]), counted[name], accuracy.values[name]) for name in counted}
    return replace(accuracy, values=accuracy.values | known)


def _with_others(accuracy: SweepArrays, names: Sequence[str]) -> SweepArrays:
    """Add those of the named samples that were not scored, without a value, behind the others."""
    known = set(accuracy.sample_ids)
    others = tuple(name for name in names if name not in known)
    values = {
        name: np.pad(scored, ((0, len(others)), (0, 0)), constant_values=np.nan)
        for name, scored in accuracy.values.items()
    }
    labels = (*accuracy.labels, *({} for _ in others))
    return replace(accuracy, sample_ids=(*accuracy.sample_ids, *others), values=values, labels=labels)


def _check_settings(accuracy: SweepArrays, timed: SweepArrays, latency_fill: str) -> None:
    remedy = ", or have them predicted with --latency_fill settings"
    for name, having, lacking, more in (
        ("exp6 (latency)", accuracy, timed, remedy),
        ("exp5 (accuracy)", timed, accuracy, ""),
    ):
        missing = [str(setting) for setting in having.settings if setting not in lacking.settings]
        if missing and not (lacking is timed and latency_fill == "settings"):
            raise DataError(
                f"settings differ between exp5 and exp6: {name} lacks {len(missing)}: "
                + "; ".join(missing[:5])
                + (" ..." if len(missing) > 5 else "")
                + f". Profile both with the same settings, remove the files that have no twin{more}."
            )


def _check_runs(accuracy: SweepArrays, timed: SweepArrays) -> None:
    """Both sweeps have to have run one model, with answers of one length, on samples of the same splits."""
    config, other = accuracy.config, accuracy.paths[0]
    known = _of_answers(config | {"task": config.get(RESCORED, config.get("task"))})
    for where, config in zip(timed.paths, timed.configs, strict=True):
        for name in ("max_new_tokens", "model_fingerprint", "task"):
            ours, theirs = known.get(name), _of_answers(config).get(name)
            if None not in (ours, theirs) and ours != theirs:
                raise DataError(
                    f"{where}: field config.{name} is {theirs}, but {other} has {ours}. Latency and accuracy have "
                    "to be of the same answers of one model; profile again with one value."
                )
        if known.get("split") and set(split_names(config)) - set(split_names(known)):
            raise DataError(
                f"{where}: field config.split is {config['split']!r}, but {other} has {known['split']!r}. "
                "Profile both on the same splits."
            )


def _of_answers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what answers and their times depend on, which the metric that scores them is no part of."""
    found = identity(config)
    return found | {"task": {name: value for name, value in found.get("task", {}).items() if name != "metric"}}


def _filled_by_cell(
    space: KnobSpace, accuracy: SweepArrays, times: np.ndarray, timed: SweepArrays
) -> tuple[np.ndarray, np.ndarray]:
    """Return times ``[S, M, T]`` without gaps, by one model of all settings, and its errors on cells held out.

    Samples that were timed and not scored help to fit the model.
    """
    gaps = np.isnan(times)
    if not gaps.any():
        return times, np.zeros(0)
    if accuracy.tokens is None:
        cells = gaps[..., 0]
        raise DataError(_no_counts(accuracy, f"exp6 timed {int((~cells).sum())} of {cells.size} cells"))
    both = _with_counts(_with_others(accuracy, timed.sample_ids), timed)
    every = timed.at(both, [name for name in TIMES if name in timed.values])
    filled, errors = predict_cells(_table(space, both, every, timed))
    places = [space.index(setting) for setting in accuracy.settings]
    whole = np.stack([filled.latency_ms, *(filled.stages_ms[s] for s in _stages(timed))], axis=-1)[: len(times), places]
    return np.where(gaps, whole, times), errors


def _filled_by_setting(
    accuracy: SweepArrays, timed: SweepArrays, times: np.ndarray, latency_fill: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return times ``[S, M, T]`` without gaps, and the relative errors of the fits.

    Each setting has a fit of its own, to all samples that exp6 has of it.
    """
    wanted, counts, errors = accuracy.tokens, timed.tokens, [np.zeros(0)]
    measured = np.stack([timed.values[name] for name in TIMES if name in timed.values], axis=-1)
    times = times.copy()
    for column, setting in enumerate(accuracy.settings):
        gaps, own = np.isnan(times[:, column, 0]), timed.settings.index(setting)
        known = ~np.isnan(measured[:, own, 0])
        _check_samples(accuracy, timed, own, gaps, latency_fill)
        if gaps.any() and wanted is not None and counts is not None:
            times[gaps, column], own_errors = predict_times(
                counts[known, own], measured[known, own], wanted[gaps, column]
            )
            errors.append(own_errors)
    return times, np.concatenate(errors)


def _check_samples(accuracy: SweepArrays, timed: SweepArrays, column: int, gaps: np.ndarray, latency_fill: str) -> None:
    """Raise unless every sample was timed at a setting of exp6, or the rest (the ``gaps``) can be predicted."""
    where, total, shared = timed.paths[column], len(gaps), int((~gaps).sum())
    known = ~np.isnan(timed.values["T_total_ms"][:, column])
    names = [timed.sample_ids[row] for row in np.flatnonzero(known)]
    if not shared:
        raise DataError(
            f"{where} shares no sample with exp5 ({accuracy.paths[0]}): {first_few(names, 2)} against "
            f"{first_few(accuracy.sample_ids, 2)}. Profile both on the same split with the same seed."
        )
    beyond = set(names) - set(accuracy.sample_ids)
    if latency_fill == "none" and beyond:
        raise DataError(f"{where} has {len(beyond)} samples that exp5 lacks: {first_few(beyond)}. Profile both alike.")
    if not gaps.any():
        return
    lacking = f"{where} lacks {total - shared} of the {total} samples of exp5: " + first_few(
        accuracy.sample_ids[row] for row in np.flatnonzero(gaps)
    )
    if latency_fill == "none":
        raise DataError(f"{lacking}. Time them too, or have them predicted with --latency_fill model.")
    if shared < MIN_MEASURED:
        raise DataError(
            f"{lacking}. To predict them, {MIN_MEASURED} have to be timed; {shared} are. Time more samples."
        )
    if accuracy.tokens is None:
        raise DataError(_no_counts(accuracy, lacking))


def _no_counts(accuracy: SweepArrays, lacking: str) -> str:
    return (
        f"{lacking}. They cannot be predicted, because {accuracy.paths[0]} and its like have no field "
        f"{', '.join(TOKEN_COUNTS)} in every sample. Time all samples."
    )


def _describe_fill(
    accuracy: SweepArrays, timed: SweepArrays, predicted: np.ndarray, errors: np.ndarray, by_cell: bool
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return notes for the user, and the same for the metadata."""
    count, total = int(predicted.any(axis=1).sum()), len(accuracy.sample_ids)
    notes = said_of_machines(timed.config.get(MACHINES, {}))
    fill: dict[str, Any] = {"predicted_samples": count, "predicted_cells": int(predicted.sum())}
    extra = len(set(timed.sample_ids) - set(accuracy.sample_ids))
    if accuracy.skipped:
        names = first_few(accuracy.skipped)
        notes.append(f"{len(accuracy.skipped)} samples that could not be used were left out: {names}")
    if count and by_cell:
        cells, share = predicted.size - int(predicted.sum()), 1 - float(predicted.mean())
        error = {f"held_out_error_p{level}": round(float(np.percentile(errors, level)), 4) for level in (50, 95)}
        fill |= {"fitted_on_cells": cells, "held_out_cells": len(errors), **error}
        notes.append(
            f"latency of {int(predicted.sum()):,} of {predicted.size:,} cells (sample, setting) predicted from {cells} "
            f"measured ({share:.1%}); error on {len(errors)} measured cells held out for the check: median "
            f"{np.median(errors):.1%}, p95 {np.percentile(errors, 95):.1%}"
        )
    elif count:
        measured = int((~np.isnan(timed.values["T_total_ms"])).sum(axis=0).min())
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
