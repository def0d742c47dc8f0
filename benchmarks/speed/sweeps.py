"""The sweeps: accuracy beside a plain loop over the settings, latency with a quarter of the cells measured."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.speed.bench_data import Material, made_up
from benchmarks.speed.figures import Figure, percentile, timed_s, times_us
from budgetvlm.errors import DataError
from budgetvlm.guard.latency_model import LatencyModel, Sizes
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.latency_sweep import profile_latency
from budgetvlm.profiling.measure.setting_sampling import draw_cells
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.prepare.columns import read_sweep
from budgetvlm.profiling.prepare.fill import predict_cells
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_KINDS
from budgetvlm.profiling.results.reading import iter_results
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Sample

TIMES_FASTER = 3.0
CELLS = 0.25
FIT_S, SETTINGS_US = 2.0, 50.0
ACCURACY_FULL, ACCURACY_QUICK = (3, 24), (1, 24)  # rounds, samples
LATENCY_FULL, LATENCY_QUICK = (24, 3), (10, 1)  # samples, repeats
MODEL_FULL, MODEL_QUICK = (5, 4000), (2, 1000)  # rounds, samples

Answers = dict[tuple[str, str], str]  # (setting, sample) -> answer


def measure_accuracy(material: Material) -> list[Figure]:
    """The sweep, files and all, and both plain loops on the same samples.

    Raises:
        DataError: the answers differ.
    """
    rounds, count = ACCURACY_QUICK if material.options.quick else ACCURACY_FULL
    samples = material.samples(count)
    found = [_accuracy_round(material, samples) for _ in range(rounds)]
    sweep, batched, single = zip(*found, strict=True)
    return [
        Figure.of(f"the sweep, {len(samples)} samples x all settings", "s", sweep),
        Figure.of("a plain loop over settings and samples", "s", single),
        Figure.of(
            "times faster than the plain loop", "x", [a / b for a, b in zip(single, sweep, strict=True)],
            at_least=TIMES_FASTER,
        ),
        Figure.of(
            "times faster than a plain loop over settings, in batches", "x",
            [a / b for a, b in zip(batched, sweep, strict=True)],
        ),
    ]  # fmt: skip


def _accuracy_round(material: Material, samples: list[Sample]) -> tuple[float, float, float]:
    """Seconds of the sweep, of the loop in batches and of the loop one by one; all answer alike."""
    vlm, task, space = material.vlm, material.task, material.vlm.knob_space
    images, questions = [s.load_image() for s in samples], [s.question for s in samples]
    answers: list[Answers] = [{}, {}, {}]
    most = task.max_new_tokens

    def in_batches() -> None:
        for setting in space.settings:
            found = vlm.generate_batch(images, questions, setting, max_new_tokens=most)
            answers[1].update(((str(setting), s.sample_id), a.text) for s, a in zip(samples, found, strict=True))

    def one_by_one() -> None:
        for setting in space.settings:
            for sample in samples:
                found = vlm.generate(sample.load_image(), sample.question, setting, max_new_tokens=most)
                answers[2][str(setting), sample.sample_id] = found.text

    sweep_s = timed_s(lambda: answers[0].update(_swept(material, len(samples))))
    seconds = sweep_s, timed_s(in_batches), timed_s(one_by_one)
    differing = [cell for cell, text in answers[0].items() if {text} != {a[cell] for a in answers[1:]}]
    if differing:
        raise DataError(f"{len(differing)} of {len(answers[0])} answers of the sweep differ, first at {differing[0]}")
    return seconds


def _swept(material: Material, count: int) -> Answers:
    with _sweep_directory(material, count) as options:
        profile_accuracy(
            material.vlm, material.task, material.vlm.knob_space.settings, options, batch_size=count, say=lambda _: None
        )
        results = tuple(iter_results(options.output_dir, material.task.name, "accuracy"))
    return {(_name(result.knobs), record.sample_id): record.pred for result in results for record in result.records}


def _name(knobs: object) -> str:
    from budgetvlm.knobs import Setting

    return str(Setting(tuple(dict(knobs).items())))  # type: ignore[call-overload]


@contextlib.contextmanager
def _sweep_directory(material: Material, count: int) -> Iterator[SweepOptions]:
    """Options of a sweep over the test split into a directory that goes, without bars."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        yield SweepOptions(("test",), Path(directory), (count,), seed=material.options.seed)


def measure_latency(material: Material) -> list[Figure]:
    """All cells are measured once; from a quarter of them the others are predicted, and compared with the measured."""
    count, repeats = LATENCY_QUICK if material.options.quick else LATENCY_FULL
    (part_s, _), (whole_s, table) = (
        _timed_sweep(material, count, repeats, CELLS),
        _timed_sweep(material, count, repeats),
    )
    errors, told = [], []
    for seed in range(5):
        cells = draw_cells(table.num_samples, table.num_settings, CELLS, seed)
        known = np.where(cells, table.latency_ms, np.nan).astype(np.float32)
        stages = {n: np.where(cells, v, np.nan).astype(np.float32) for n, v in table.stages_ms.items()}
        filled, checked = predict_cells(replace(table, latency_ms=known, stages_ms=stages), seed)
        others = ~cells
        errors.append(100 * float(np.median(np.abs(filled.latency_ms / table.latency_ms - 1)[others])))
        told.append(100 * float(np.median(checked)))
    everything = LatencyModel.fit(table).predict_table(table)
    return [
        Figure.of("cells measured", "%", [100 * float(cells.mean())], at_most=100 * CELLS),
        Figure.of("times quicker than measuring all", "x", [whole_s / part_s]),
        Figure.of("median error on the cells that were not measured", "%", errors),
        Figure.of("median error that the check on held-out cells told", "%", told),
        Figure.of(
            "for comparison: fitted on all cells", "%",
            [100 * float(np.median(np.abs(everything / table.latency_ms - 1)))],
        ),
        *_predictor(material),
    ]  # fmt: skip


def _timed_sweep(material: Material, count: int, repeats: int, cells: float = 1.0) -> tuple[float, ProfileTable]:
    """Seconds of a latency sweep, and what it measured."""
    vlm, task = material.vlm, material.task
    with _sweep_directory(material, count) as options:
        seconds = timed_s(
            lambda: profile_latency(
                vlm, task, vlm.knob_space.settings, options, warmup=1, repeats=repeats, cells=cells, say=lambda _: None
            )
        )
        return seconds, _latency_table(vlm.knob_space, options, task.name)


def _latency_table(space: KnobSpace, options: SweepOptions, dataset: str) -> ProfileTable:
    """Latencies, stages and tokens of a sweep's files; accuracies are left at 0."""
    timed = read_sweep(options.output_dir, dataset, "latency")
    values = {name: np.full((len(timed.sample_ids), len(space)), np.nan) for name in timed.values}
    for name, measured in timed.values.items():
        values[name][:, [space.index(setting) for setting in timed.settings]] = measured
    stages = {stage: values[name] for stage, name in STAGE_FIELDS.items()}
    tokens = {kind: values[f"num_{kind}_tokens"] for kind in TOKEN_KINDS}
    total = values["T_total_ms"]
    return ProfileTable.from_arrays(
        space, timed.sample_ids, np.zeros_like(total), total, stages_ms=stages, tokens=tokens
    )


def _predictor(material: Material) -> list[Figure]:
    """The latency model itself, on a made-up table: fitting it, and the times of 432 settings for one request."""
    rounds, count = MODEL_QUICK if material.options.quick else MODEL_FULL
    table, _ = made_up(count, seed=material.options.seed)
    model = LatencyModel.fit(table)
    fits = [timed_s(lambda: LatencyModel.fit(table)) for _ in range(rounds)]
    large = {"max_crops": range(1, 13), "top_k": range(1, 7), "num_active_blocks": range(3, 9)}
    wide = model.for_space(KnobSpace({name: list(values) for name, values in large.items()}))
    tokens = np.repeat(np.arange(1, 13) * 16.0, 36)[None]
    sizes = Sizes(tokens, np.full_like(tokens, 20.0), np.full_like(tokens, 4.0))
    asked = [lambda: wide.predict(sizes)] * 1000
    return [
        Figure.of(f"latency model fitted on {count:,} x 27 cells", "s", fits, at_most=FIT_S),
        Figure.of(
            "times of 432 settings for one request", "us", [percentile(times_us(asked), 0.5) for _ in range(rounds)],
            at_most=SETTINGS_US,
        ),
    ]  # fmt: skip
