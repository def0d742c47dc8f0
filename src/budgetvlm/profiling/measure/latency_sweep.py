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

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from budgetvlm._threads import side_by_side
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.machine import hardware, median_run
from budgetvlm.profiling.measure.setting_sampling import draw_cells
from budgetvlm.profiling.measure.shared_cores import Interruptions
from budgetvlm.profiling.measure.sweep import Sweep, load_image
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_COUNTS, LatencyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation
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
    concurrency: int = 1,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Measure the latency of settings and write one result file each.

    Args:
        warmup: untimed requests at each setting before the first sample.
        repeats: requests of each sample at each setting, each in a pass over all samples.
        cells: share of the settings that each sample is timed at, see `draw_cells`.
        concurrency: requests in flight, each timed by this side's clock, where the model is served elsewhere.

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
    """
    problems = [f"warmup={warmup} has to be 0 or more"] if warmup < 0 else []
    problems += [f"repeats={repeats} has to be 1 at least"] if repeats < 1 else []
    if problems:
        raise ConfigError("cannot measure latency: " + "; ".join(problems))
    require_side_by_side(vlm, concurrency)
    more = {"cells": cells} if cells < 1 else {}
    more |= {"concurrency": concurrency} if concurrency > 1 else {}
    sweep = Sweep(
        "latency", vlm, task, settings, options, say,
        batch_size=1, warmup=warmup, repeats=repeats,
        statistic="run with the median total of the repeats, each in a pass over all samples",
        path="overview encoded first and reused", hardware=hardware(device), **more,
    )  # fmt: skip
    draw_cells(len(sweep.samples), len(vlm.knob_space), cells, options.seed)  # before hours of measuring
    if sweep.todo:
        with sweep.resume() as entries:
            passes = _known(sweep, entries)
            plan = _plan(vlm, sweep.samples, cells, options.seed, passes)
            with fresh_images(vlm):
                _measure(sweep, plan, passes, concurrency)
            _write(sweep, plan, passes)
        sweep.say_what_was_skipped()
    return list(sweep.paths.values())


def _known(sweep: Sweep, entries: Sequence[dict[str, Any]]) -> list[Runs]:
    """Return what each pass has measured: earlier runs from the files, and what the journal's entries add."""
    passes: list[Runs] = [
        {place.sample.sample_id: {} for place in sweep.samples} for _ in range(int(sweep.config["repeats"]))
    ]
    for setting, records in sweep.kept.items():
        for record in records:
            for done, run in zip(passes, record.runs or (), strict=False):
                done[record.sample_id][str(setting)] = run
    for entry in entries:
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


def _measure(sweep: Sweep, plan: Plan, passes: list[Runs], concurrency: int) -> None:
    """Measure what the passes lack, as many samples side by side."""
    left = list(_left(sweep, plan, passes))
    total = len(plan) * len(passes)
    if len(left) < total:
        sweep.say(f"going on with {total - len(left)} of {total} rounds (samples x repeats) of an earlier run")
    if left:
        _warm_up(sweep)
    watch = Interruptions()
    with tqdm(total=total, initial=total - len(left), desc="latency", unit="round") as bar:
        for (number, place, _), measured in side_by_side(partial(_measure_sample, sweep), left, concurrency):
            name = place.sample.sample_id
            if isinstance(measured, InputError):
                sweep.skip(place, measured)
            elif name not in sweep.skipped:
                sweep.note([name], measured, **{"pass": number})
                passes[number][name].update(measured)
            bar.update()
    if warning := watch.warning():
        sweep.say(warning)


def _write(sweep: Sweep, plan: Plan, passes: Sequence[Runs]) -> None:
    """Write one file for each setting, with the median run of each sample."""
    names = [place.sample.sample_id for place in sweep.usable_samples()]
    for setting in sweep.todo:
        runs = [[done[name][str(setting)] for done in passes] for name in names if setting in plan[name]]
        sweep.write(setting, [_median(one) for one in runs])


def _median(runs: list[dict[str, Any]]) -> LatencyRecord:
    """Return the median run, with all of them beside it where there are several."""
    return replace(median_run([LatencyRecord.from_dict(raw) for raw in runs]), runs=runs)


def _left(sweep: Sweep, plan: Plan, passes: Sequence[Runs]) -> Iterator[tuple[int, SplitSample, list[Setting]]]:
    """Yield what is yet to be measured, in order: number of the pass, sample, its settings."""
    for number, done in enumerate(passes):
        rng = np.random.default_rng([sweep.options.seed, number])
        for i in rng.permutation(len(sweep.samples)):
            place = sweep.samples[i]
            name = place.sample.sample_id
            order = [sweep.todo[k] for k in rng.permutation(len(sweep.todo))]
            lacking = [s for s in order if s in plan[name] and str(s) not in done[name]]
            if lacking:
                yield number, place, lacking


def _warm_up(sweep: Sweep) -> None:
    """Run untimed requests on the first sample that can be used: the first are slower, as memory is taken."""
    for place in sweep.samples:
        with contextlib.suppress(InputError):
            image = load_image(place)
            for _ in range(int(sweep.config["warmup"])):
                for setting in sweep.todo:
                    request(sweep.vlm, image, place.sample.question, setting, sweep.max_new_tokens)
            return


def _measure_sample(
    sweep: Sweep, lacking: tuple[int, SplitSample, list[Setting]]
) -> dict[str, dict[str, Any]] | InputError:
    """Measure one sample once at the settings that it lacks; return str(setting) -> record, or why it cannot be."""
    _, place, settings = lacking
    if place.sample.sample_id in sweep.skipped:
        return {}
    try:
        image, most = load_image(place), sweep.max_new_tokens
        runs = {str(setting): request(sweep.vlm, image, place.sample.question, setting, most) for setting in settings}
    except InputError as error:
        return error
    return {name: _record(sweep.task, place, run).to_dict() for name, run in runs.items()}


def request(vlm: VLM, image: Any, question: str, setting: Setting, max_new_tokens: int) -> Generation:
    """Run one request as a user's: the overview first, then the answer."""
    overview = vlm.encode_overview(image)
    return vlm.generate(image, question, setting, max_new_tokens=max_new_tokens, overview=overview)


def _record(task: Task, place: SplitSample, run: Generation) -> LatencyRecord:
    stages: dict[str, Any] = {field: run.stages_ms[stage] for stage, field in STAGE_FIELDS.items()}
    counts = {field: getattr(run, field) for field in TOKEN_COUNTS}
    accuracy = float(task.score(run.text, place.sample))
    return LatencyRecord(place.sample.sample_id, T_total_ms=run.total_ms, accuracy=accuracy, **stages, **counts)
