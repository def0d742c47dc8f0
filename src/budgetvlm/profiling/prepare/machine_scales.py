"""Latencies that several machines measured, on the scale of one of them.

Machines differ in speed, and a table of them all would say that some samples are slow because a slow machine had them.
So each machine gets one number, by which its times are divided. It is found with the times' model of each setting, a
sum of a fixed part and a part for each token: the median of what a machine took beyond that, in logarithms, and the
model fitted anew to the times on one scale, until nothing moves. The scale is that of the machine with the most runs.
Shapes: R runs of all settings, C kinds of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from budgetvlm.profiling.measure.machine import median_run
from budgetvlm.profiling.prepare.fill import MIN_MEASURED, predict_times
from budgetvlm.profiling.results.measurements import TIMES, TOKEN_COUNTS, LatencyRecord
from budgetvlm.profiling.results.result_files import MACHINES, SettingResult

ROUNDS, CLOSE = 50, 1e-5


def machines_of(results: Iterable[SettingResult]) -> dict[str, dict[str, Any]]:
    """Return the machines of a sweep: name -> hardware, number of ``runs`` and ``scale``; none where it had only one.

    ``scale``: how long a machine takes for what takes 1 on the one with the most runs.
    """
    hardware, counts = dict[str, Any](), Counter[str]()
    names: list[str] = []
    parts: list[np.ndarray] = []  # a setting's tokens and total, [runs, C + 1]
    for result in results:
        hardware |= result.config.get(MACHINES, {})
        runs = [run for record in result.records for run in _runs(record)]
        names += [run.machine or "" for run in runs]
        parts.append(np.array([[*(getattr(run, name) for name in TOKEN_COUNTS), run.T_total_ms] for run in runs]))
    if not hardware:
        return {}
    counts.update(names)
    known = [name for name, _ in counts.most_common()]
    scales = _scales(parts, np.array([known.index(name) for name in names]), len(known))
    return {
        name: {**hardware.get(name, {}), "runs": counts[name], "scale": round(float(scale), 4)}
        for name, scale in zip(known, scales, strict=True)
    }


def on_one_scale(records: Sequence[LatencyRecord], machines: Mapping[str, Mapping[str, Any]]) -> list[LatencyRecord]:
    """Return records with the median of their runs, once all runs are on one scale."""
    return [median_run([_divided(run, machines[run.machine or ""]["scale"]) for run in _runs(r)]) for r in records]


def said_of_machines(machines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a note for the user where there are several."""
    if len(machines) < 2:
        return []
    first = next(iter(machines))
    each = ", ".join(f"{name} {own['scale']:.3f} ({own['runs']} runs)" for name, own in machines.items())
    return [
        f"latencies of {len(machines)} machines, divided by one scale for each, so that all are as on {first}: {each}"
    ]


def _runs(record: LatencyRecord) -> list[LatencyRecord]:
    return [LatencyRecord.from_dict(raw) for raw in record.runs] if record.runs else [record]


def _divided(run: LatencyRecord, scale: float) -> LatencyRecord:
    times = {name: getattr(run, name) for name in TIMES}
    return replace(run, **{name: time / scale for name, time in times.items() if time is not None})


def _scales(parts: Sequence[np.ndarray], machine: np.ndarray, count: int) -> np.ndarray:
    """Return the scales of the machines, the first one's 1. ``machine``: of each run of the settings in turn, ``[R]``.

    A machine that shares no setting with the others cannot be compared and keeps the scale 1.
    """
    logs = np.zeros(count)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    for _ in range(ROUNDS):
        expected = [
            _expected(part, np.exp(logs[own])) for part, own in zip(parts, np.split(machine, ends), strict=True)
        ]
        beyond = np.log(np.concatenate([part[:, -1] for part in parts])) - np.log(np.concatenate(expected))
        before, logs = logs, np.array([np.median(beyond[machine == number]) for number in range(count)])
        logs -= logs[0]
        if np.abs(logs - before).max() < CLOSE:
            break
    return np.asarray(np.exp(logs))


def _expected(part: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return what a setting's runs should take on one scale, by their tokens, ``[runs]``."""
    tokens, times = part[:, :-1], part[:, -1] / scale
    if len(times) < MIN_MEASURED:
        return np.full(len(times), np.median(times))
    return predict_times(tokens, times[:, None], tokens)[0][:, 0]
