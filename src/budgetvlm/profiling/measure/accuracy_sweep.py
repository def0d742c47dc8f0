"""The accuracy sweep (exp5): every setting answers every sample, in batches, and is scored by the task.

A sample that cannot be used is left out by all settings, and named; the journal and the files remember it.

Tiles are encoded once a batch and tiling, and shared by all settings with that `max_crops`. A batch at one setting is
one line of the journal, so that a killed sweep is resumed with the same neighbours, and the results are those of an
undisturbed run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.out_of_memory import for_each_batch
from budgetvlm.profiling.measure.sweep import Sweep, load_image
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import TOKEN_COUNTS, AccuracyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation

Loaded = tuple[SplitSample, Image.Image]
Answered = dict[Setting, dict[str, AccuracyRecord]]  # setting -> sample id -> what the model answered


def profile_accuracy(
    vlm: VLM,
    task: Task,
    settings: Sequence[Setting],
    options: SweepOptions,
    *,
    batch_size: int = 32,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Measure the accuracy of settings and write one result file each.

    Args:
        batch_size: samples answered at once; halved, with a message, whenever memory runs out.

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} cannot work; it has to be 1 at least")
    sweep = Sweep("accuracy", vlm, task, settings, options, say)
    if sweep.todo:
        with sweep.resume() as entries:
            _measure(sweep, entries, batch_size)
    sweep.say_what_was_skipped()
    return list(sweep.paths.values())


def _measure(sweep: Sweep, entries: Sequence[dict[str, Any]], batch_size: int) -> None:
    """Measure what the journal's entries lack, and write each setting's file when it is complete."""
    done: Answered = {
        setting: {
            raw["sample_id"]: AccuracyRecord.from_dict(raw)
            for entry in entries
            for raw in entry["runs"].get(str(setting), ())
        }
        for setting in sweep.todo
    }
    kept, total = sum(map(len, done.values())), len(sweep.samples) * len(done)
    if kept:
        sweep.say(f"going on with {kept} of {total} answers of an earlier run")
    with tqdm(total=total, initial=kept, desc="accuracy", unit="answer", mininterval=0.5) as bar:
        # tiling by tiling, because settings that share one share the encoded tiles
        for max_crops in sorted({_crops(setting) for setting in done}):
            group = [setting for setting in done if _crops(setting) == max_crops]
            for_batch = partial(_sweep_batch, sweep, {setting: done[setting] for setting in group}, bar)
            batch_size = for_each_batch(sweep.samples, batch_size, for_batch, sweep.say)
            for setting in group:
                sweep.write(setting, [done[setting][place.sample.sample_id] for place in sweep.usable_samples()])


def _crops(setting: Setting) -> int:
    """Return `max_crops`, 0 where the model has no such knob."""
    return int(setting.get("max_crops", 0))


def _sweep_batch(sweep: Sweep, done: Answered, bar: tqdm, batch: Sequence[SplitSample]) -> None:
    """Answer one batch at all settings of one tiling that lack it, without samples that cannot be used."""
    batch = [place for place in batch if place.sample.sample_id not in sweep.skipped]
    lacking = {s: known for s, known in done.items() if any(place.sample.sample_id not in known for place in batch)}
    if not lacking:
        return
    loaded: list[Loaded] = []
    for place in batch:
        try:
            loaded.append((place, load_image(place)))
        except InputError as error:
            sweep.skip(place, error)
    if loaded:
        _answer(sweep, lacking, bar, loaded)


def _answer(sweep: Sweep, done: Answered, bar: tqdm, loaded: Sequence[Loaded]) -> None:
    """Answer one batch; where the model refuses a sample, answer them one by one, which tells whom to leave out."""
    try:
        _answer_batch(sweep, done, bar, loaded)
    except InputError as error:
        if len(loaded) == 1:
            sweep.skip(loaded[0][0], error)
            return
        for one in loaded:
            _answer(sweep, done, bar, [one])


def _answer_batch(sweep: Sweep, done: Answered, bar: tqdm, loaded: Sequence[Loaded]) -> None:
    """Answer one batch at the settings that lack it; write the answers into the journal."""
    shared: dict[str, Any] = {}
    encode_tiles = getattr(sweep.vlm, "encode_tiles", None)  # not every model can part encoding from answering
    if encode_tiles is not None:
        shared["visual"] = encode_tiles([image for _, image in loaded], _crops(next(iter(done))) or None)
    for setting, known in done.items():
        rows = [row for row, (place, _) in enumerate(loaded) if place.sample.sample_id not in known]
        if not rows:
            continue
        answers = sweep.vlm.generate_batch(
            [loaded[row][1] for row in rows],
            [loaded[row][0].sample.question for row in rows],
            setting,
            max_new_tokens=sweep.max_new_tokens,
            **{name: [values[row] for row in rows] for name, values in shared.items()},
        )
        records = [_record(sweep.task, loaded[row][0], answer) for row, answer in zip(rows, answers, strict=True)]
        sweep.journal.append({"runs": {str(setting): [record.to_dict() for record in records]}})
        known.update((record.sample_id, record) for record in records)
        bar.update(len(records))


def _record(task: Task, place: SplitSample, answer: Generation) -> AccuracyRecord:
    return AccuracyRecord(
        sample_id=place.sample.sample_id,
        score=float(task.score(answer.text, place.sample)),
        pred=answer.text,
        answers=place.sample.answers,
        groups=place.groups,
        **{field: getattr(answer, field) for field in TOKEN_COUNTS},
    )
