"""The latency sweep (exp6): batch 1, every stage timed, the repeats in passes over all samples.

A pass takes all samples in random order, and each of them at all settings in random order, so that what drifts (clock
rate, neighbours, heat) hits all settings and all splits alike. Each repeat is a pass of its own: a slow spell of the
machine lasts for seconds or minutes, and so hits one of a sample's runs and not all of them; the run with the median
total counts. A request goes the way it goes behind a controller: the overview is encoded first and reused. Loading or
drawing the image is not timed.

Not all cells have to be measured: with ``cells`` each sample is timed at a random share of the settings, and
`budgetvlm.profiling.prepare.join` has the others predicted.

One journal holds what is measured, a line for each sample in each pass; the result files, one a setting, are written
at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.elsewhere import Elsewhere, sweep_through
from budgetvlm.profiling.measure.machine import hardware, median_run, this_machine
from budgetvlm.profiling.measure.setting_sampling import draw_cells
from budgetvlm.profiling.measure.sweep import Sweep, Unusable
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.measure.timed_requests import Timed, Timekeeper
from budgetvlm.profiling.results.measurements import LatencyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM
from budgetvlm.vlm.protocol import fresh_images, require_side_by_side

Plan = dict[str, set[Setting]]  # sample id -> the settings to time it at
Runs = dict[str, dict[str, Any]]  # what one pass has measured: sample id -> str(setting) -> record, as a dictionary


def profile_latency(
    vlm: VLM,
    task: Task,
    settings: Sequence[Setting],
    options: SweepOptions,
    *,
    warmup: int = 2,
    repeats: int = 3,
    cells: float = 1.0,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    elsewhere: Elsewhere | None = None,
) -> list[Path]:
    """Measure the latency of settings and write one result file each.

    Args:
        warmup: untimed requests at each setting before the first sample.
        repeats: requests of each sample at each setting, each in a pass over all samples.
        cells: share of the settings that each sample is timed at, see `draw_cells`.
        elsewhere: other processes, each alone on its machine; every run says which machine it was.

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
        WorkerError: processes elsewhere die again and again, or cannot be had.
    """
    problems = [f"warmup={warmup} has to be 0 or more"] if warmup < 0 else []
    problems += [f"repeats={repeats} has to be 1 at least"] if repeats < 1 else []
    if problems:
        raise ConfigError("cannot measure latency: " + "; ".join(problems))
    require_side_by_side(vlm, options.concurrency)
    more = {"cells": cells} if cells < 1 else {}
    more |= {"concurrency": options.concurrency} if options.concurrency > 1 else {}
    sweep = Sweep(
        "latency", vlm, task, settings, options, say,
        batch_size=1, warmup=warmup, repeats=repeats,
        statistic="run with the median total of the repeats, each in a pass over all samples",
        path="overview encoded first and reused",
        hardware={"device": device} if elsewhere else hardware(device), **more,
    )  # fmt: skip
    draw_cells(len(sweep.samples), len(vlm.knob_space), cells, options.seed)  # before hours of measuring
    if sweep.todo:
        with sweep.resume() as entries:
            passes = _known(sweep, entries)
            plan = _plan(vlm, sweep.samples, cells, options.seed, passes)
            with fresh_images(vlm):
                _measure(sweep, plan, passes, warmup, elsewhere)
            _write(sweep, plan, passes)
        sweep.say_what_was_skipped()
    return list(sweep.paths.values())


def _known(sweep: Sweep, entries: Iterator[tuple[int, dict[str, Any]]]) -> list[Runs]:
    """Return what each pass has measured: earlier runs from the files, and what the journal's entries add."""
    passes: list[Runs] = [
        {place.sample.sample_id: {} for place in sweep.samples} for _ in range(int(sweep.config["repeats"]))
    ]
    for setting, records in sweep.kept.items():
        for record in records:
            for done, run in zip(passes, record.runs or (), strict=False):
                done[record.sample_id][str(setting)] = run
    for _, entry in entries:
        passes[entry["pass"]][entry["samples"][0]].update(entry["runs"])
    return passes


def _plan(vlm: VLM, samples: Sequence[SplitSample], cells: float, seed: int, passes: Sequence[Runs]) -> Plan:
    """Return what is to be measured: what a sweep draws, or where a smaller one measured others, those and more."""
    settings = vlm.knob_space.settings
    names = [place.sample.sample_id for place in samples]
    known = np.array([[any(str(setting) in done[name] for done in passes) for setting in settings] for name in names])
    drawn = draw_cells(len(names), len(settings), cells, seed)
    if (known & ~drawn).any():
        drawn = draw_cells(len(names), len(settings), cells, seed, known)
    return {name: {settings[k] for k in np.flatnonzero(row)} for name, row in zip(names, drawn, strict=True)}


def _measure(sweep: Sweep, plan: Plan, passes: list[Runs], warmup: int, elsewhere: Elsewhere | None) -> None:
    """Measure what the passes lack, as many samples side by side."""
    left = list(_left(sweep, plan, passes))
    total = len(plan) * len(passes)
    if len(left) < total:
        sweep.say(f"going on with {total - len(left)} of {total} rounds (samples x repeats) of an earlier run")
    build = partial(
        Timekeeper, max_new_tokens=sweep.max_new_tokens, warmup=warmup, settings=sweep.todo,
        machine=partial(this_machine, sweep.config["hardware"]["device"]) if elsewhere else None,
    )  # fmt: skip
    with tqdm(total=total, initial=total - len(left), desc="latency", unit="round") as bar:
        if left:
            jobs = (_Round(sweep, passes, bar, number, row, settings) for number, row, settings in left)
            sweep_through(jobs, build, sweep, elsewhere, sweep.options.concurrency)


class _Round:
    """A sample, timed once at the settings that one pass lacks."""

    def __init__(
        self, sweep: Sweep, passes: list[Runs], bar: tqdm, number: int, row: int, settings: Sequence[Setting]
    ) -> None:
        self.sweep, self.done, self.bar, self.number = sweep, passes[number], bar, number
        self.row, self.settings, self.name = row, settings, sweep.samples[row].sample.sample_id

    def left(self) -> tuple[int, list[Setting]] | None:
        lacking = [setting for setting in self.settings if str(setting) not in self.done[self.name]]
        return (self.row, lacking) if lacking and self.name not in self.sweep.skipped else None

    def take(self, piece: Timed | Unusable) -> None:
        sweep = self.sweep
        if isinstance(piece, Unusable):
            sweep.skip(sweep.samples[self.row], InputError(piece.why))
            return
        if piece.hardware is not None:
            sweep.note_machine(next(iter(piece.runs.values()))["machine"], piece.hardware)
        sweep.note([self.name], piece.runs, **{"pass": self.number})
        self.done[self.name].update(piece.runs)

    def end(self) -> None:
        self.bar.update()

    def __str__(self) -> str:
        return f"sample {self.name}"


def _write(sweep: Sweep, plan: Plan, passes: Sequence[Runs]) -> None:
    """Write one file for each setting, with the median run of each sample."""
    names = [place.sample.sample_id for place in sweep.usable_samples()]
    for setting in sweep.todo:
        runs = [[done[name][str(setting)] for done in passes] for name in names if setting in plan[name]]
        sweep.write(setting, [_median(one) for one in runs])


def _median(runs: list[dict[str, Any]]) -> LatencyRecord:
    """Return the median run, with all of them beside it where there are several."""
    return replace(median_run([LatencyRecord.from_dict(raw) for raw in runs]), runs=runs)


def _left(sweep: Sweep, plan: Plan, passes: Sequence[Runs]) -> Iterator[tuple[int, int, list[Setting]]]:
    """Yield what is yet to be measured, in order: number of the pass, place of the sample, its settings."""
    for number, done in enumerate(passes):
        rng = np.random.default_rng([sweep.options.seed, number])
        for row in rng.permutation(len(sweep.samples)).tolist():
            name = sweep.samples[row].sample.sample_id
            order = [sweep.todo[k] for k in rng.permutation(len(sweep.todo))]
            lacking = [s for s in order if s in plan[name] and str(s) not in done[name]]
            if lacking:
                yield number, row, lacking
