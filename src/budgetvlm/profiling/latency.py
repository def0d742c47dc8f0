"""The latency sweep (exp6): batch 1, every stage timed, all settings of a sample measured in one go.

Samples are measured in random order. For each of them, in each of the repeats, the settings take turns in a new random
order, so that what drifts (clock rate, neighbours, heat) hits all settings and all splits alike; of the repeats the run
with the median total counts. A request goes the way it goes behind a controller: the overview is encoded first and
reused. Loading or drawing the image is not timed.

Not all cells have to be measured: with ``cells`` each sample is timed at a random share of the settings, and
`budgetvlm.profiling.join` has the others predicted.

One journal holds the finished samples, one a line; the result files, one a setting, are written at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.cells import draw_cells
from budgetvlm.profiling.files import LatencyRecord, write_latency_result
from budgetvlm.profiling.journal import Journal
from budgetvlm.profiling.sweep import (
    Placed,
    Skipped,
    SweepOptions,
    blocks_of,
    collect,
    describe,
    is_finished,
    load_image,
    remove,
    remove_leftovers,
    result_paths,
    skipped_before,
)
from budgetvlm.profiling.timing import hardware, median_run
from budgetvlm.tasks import Task
from budgetvlm.vlm import VLM, Generation


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
) -> list[Path]:
    """Measure the latency of settings and write one result file each.

    Args:
        warmup: untimed requests at each setting before the first sample.
        repeats: requests of each sample at each setting.
        cells: share of the settings that each sample is timed at, see `draw_cells`.

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
    """
    _check(warmup, repeats)
    samples = collect(task, options)
    config = describe(
        vlm, task, options, samples,
        batch_size=1, warmup=warmup, repeats=repeats, statistic="run with the median total of the repeats",
        path="overview encoded first and reused", hardware=hardware(device), **({"cells": cells} if cells < 1 else {}),
    )  # fmt: skip
    plan = _plan(vlm, samples, cells, options.seed)
    paths = result_paths(settings, task, "latency", options)
    journal_path = _journal_path(paths, options)
    if options.overwrite:
        remove(journal_path)
    todo = [s for s, path in paths.items() if not is_finished(path, task, "latency", config, options.overwrite)]
    if len(todo) < len(paths):
        say(f"{len(paths) - len(todo)} of {len(paths)} settings are finished already")
    skipped = Skipped(options.strict, say)
    for setting in paths.keys() - set(todo):
        skipped.remember(skipped_before(paths[setting], task, "latency"))
    if todo:
        _sweep(vlm, task, todo, samples, plan, config, options, paths, skipped, say)
        skipped.note(samples)
    else:
        remove(journal_path)
    return list(paths.values())


def _check(warmup: int, repeats: int) -> None:
    problems = [f"warmup={warmup} has to be 0 or more"] if warmup < 0 else []
    problems += [f"repeats={repeats} has to be 1 at least"] if repeats < 1 else []
    if problems:
        raise ConfigError("cannot measure latency: " + "; ".join(problems))


def _plan(vlm: VLM, samples: Sequence[Placed], cells: float, seed: int) -> dict[str, set[Setting]]:
    """The settings to time each sample at."""
    space = vlm.knob_space
    drawn = draw_cells(len(samples), len(space), cells, seed)
    return {
        place.sample.sample_id: {space.settings[k] for k in np.flatnonzero(row)}
        for place, row in zip(samples, drawn, strict=True)
    }


def _journal_path(paths: Mapping[Setting, Path], options: SweepOptions) -> Path:
    rank = "" if options.file_rank is None else f"_rank{options.file_rank}"
    return next(iter(paths.values())).with_name(f".exp6_latency{rank}.jsonl")


def _sweep(
    vlm: VLM,
    task: Task,
    settings: Sequence[Setting],
    samples: Sequence[Placed],
    plan: Mapping[str, set[Setting]],
    config: Mapping[str, Any],
    options: SweepOptions,
    paths: Mapping[Setting, Path],
    skipped: Skipped,
    say: Callable[[str], None],
) -> None:
    """Measure what the journal lacks, then write the files."""
    with Journal(_journal_path(paths, options), config) as journal:
        runs: dict[str, dict[str, Any]] = {place.sample.sample_id: {} for place in samples}
        for entry in journal.entries:
            if "skipped" in entry:
                skipped.remember({entry["sample_id"]: entry["skipped"]})
            else:
                runs[entry["sample_id"]].update(entry["runs"])
        lacking = {name: [s for s in settings if s in plan[name] and str(s) not in done] for name, done in runs.items()}
        lacking = {name: left for name, left in lacking.items() if left and name not in skipped}
        left = [(number, place) for number, place in enumerate(samples) if place.sample.sample_id in lacking]
        if journal.entries:
            say(f"going on with {len(samples) - len(left)} of {len(samples)} samples of an earlier run")
        if left:
            _warm_up(vlm, [place for _, place in left], settings, config)
        with tqdm(total=len(samples), initial=len(samples) - len(left), desc="latency", unit="sample") as bar:
            for i in np.random.default_rng(options.seed).permutation(len(left)):
                number, place = left[i]
                name = place.sample.sample_id
                order = np.random.default_rng([options.seed, number])
                try:
                    measured = _measure_sample(vlm, task, place, lacking[name], config, order)
                except InputError as error:
                    skipped.add(name, error)
                    journal.append({"sample_id": name, "skipped": str(error)})
                else:
                    journal.append({"sample_id": name, "runs": measured})
                    runs[name].update(measured)
                bar.update()
        used = [place.sample.sample_id for place in skipped.used(samples)]
        for setting in settings:
            remove_leftovers(paths[setting])
            told = dict(config) | skipped.for_config()
            records = [runs[name][str(setting)] for name in used if setting in plan[name]]
            _write(vlm, task, setting, records, told, options)
        journal.remove()


def _warm_up(vlm: VLM, places: Sequence[Placed], settings: Sequence[Setting], config: Mapping[str, Any]) -> None:
    """The first requests are slower: memory is taken, kernels are chosen. The first sample that can be used serves."""
    for place in places:
        with contextlib.suppress(InputError):
            image = load_image(place)
            for _ in range(int(config["warmup"])):
                for setting in settings:
                    request(vlm, image, place.sample.question, setting, int(config["max_new_tokens"]))
            return


def _measure_sample(
    vlm: VLM,
    task: Task,
    place: Placed,
    settings: Sequence[Setting],
    config: Mapping[str, Any],
    order: np.random.Generator,
) -> dict[str, dict[str, Any]]:
    """One sample at all settings: str(setting) -> record."""
    image = load_image(place)
    runs: dict[Setting, list[Generation]] = {setting: [] for setting in settings}
    for _ in range(int(config["repeats"])):
        for i in order.permutation(len(settings)):
            setting = settings[i]
            run = request(vlm, image, place.sample.question, setting, int(config["max_new_tokens"]))
            runs[setting].append(run)
    return {str(setting): asdict(_record(task, place, median_run(timed))) for setting, timed in runs.items()}


def request(vlm: VLM, image: Any, question: str, setting: Setting, max_new_tokens: int) -> Generation:
    """One request as a user's: overview first, then the answer."""
    overview = vlm.encode_overview(image)
    return vlm.generate(image, question, setting, max_new_tokens=max_new_tokens, overview=overview)


def _record(task: Task, place: Placed, run: Generation) -> LatencyRecord:
    return LatencyRecord(
        sample_id=place.sample.sample_id,
        T_total_ms=run.total_ms,
        T_prefill_ms=run.stages_ms["prefill"],
        T_decode_ms=run.stages_ms["decode"],
        T_preprocess_ms=run.stages_ms["preprocess"],
        T_vision_ms=run.stages_ms["vision"],
        num_vision_tokens=run.num_vision_tokens,
        num_language_tokens=run.num_language_tokens,
        num_output_tokens=run.num_output_tokens,
        accuracy=float(task.score(run.text, place.sample)),
    )


def _write(
    vlm: VLM,
    task: Task,
    setting: Setting,
    runs: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    options: SweepOptions,
) -> None:
    write_latency_result(
        options.output_dir,
        task.name,
        setting,
        [LatencyRecord(**run) for run in runs],
        config=config,
        rank=options.file_rank,
        **blocks_of(vlm, setting),
    )
