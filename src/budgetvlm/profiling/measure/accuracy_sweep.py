"""The accuracy sweep (exp5): every setting answers every sample, in batches, and is scored by the task.

A sample that cannot be used is left out by all settings, and named; the journals and the files remember it.

Tiles are encoded once a batch and tiling, and shared by all settings with that `max_crops`. Of each setting that is
not finished there is a journal beside its result; a killed sweep goes on behind the last batch in it. A batch is one
line of the journal, so it is resumed with the same neighbours, and the results are those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from tqdm import tqdm

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.journal import Journal
from budgetvlm.profiling.measure.out_of_memory import for_each_batch
from budgetvlm.profiling.measure.sweep import (
    Skipped,
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
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.result_files import AccuracyRecord, write_accuracy_result
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation


@runtime_checkable
class SharesTiles(Protocol):
    """A `VLM` that can encode tiles once and answer with them at many settings."""

    def encode_tiles(self, images: Sequence[Image.Image], max_crops: int | None) -> list[torch.Tensor]:
        """Return visual tokens of each image."""
        ...


@dataclass
class _Setting:
    """One setting under way: its journal and what the journal holds."""

    setting: Setting
    path: Path
    journal: Journal
    done: dict[str, AccuracyRecord]

    def add(self, records: Sequence[AccuracyRecord]) -> None:
        self.journal.append([record.to_dict() for record in records])
        self.done.update((record.sample_id, record) for record in records)

    @property
    def skipped(self) -> dict[str, str]:
        """What the journal says was left out."""
        return {name: why for entry in self.journal.entries if isinstance(entry, dict) for name, why in entry.items()}


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
    samples = collect(task, options)
    config = describe(vlm, task, options, samples)
    paths = result_paths(settings, task, "accuracy", options)
    todo = [s for s, path in paths.items() if not _is_done(path, task, config, options.overwrite)]
    skipped = Skipped(options.strict, say)
    for setting in paths.keys() - set(todo):
        skipped.remember(skipped_before(paths[setting], task, "accuracy"))
    if len(todo) < len(paths):
        say(f"{len(paths) - len(todo)} of {len(paths)} settings are finished already")
    with contextlib.ExitStack() as stack:
        open_ones = [_begin(stack, setting, paths[setting], config) for setting in todo]
        for one in open_ones:
            skipped.remember(one.skipped)
        kept = sum(len(one.done) for one in open_ones)
        total = len(samples) * len(open_ones)
        if kept:
            say(f"going on with {kept} of {total} answers of an earlier run")
        bar = tqdm(total=total, initial=kept, desc="accuracy", unit="answer", mininterval=0.5, disable=not open_ones)
        with bar:
            for max_crops in sorted({_crops(one.setting) for one in open_ones}):
                group = [one for one in open_ones if _crops(one.setting) == max_crops]
                sweep = _Tiling(vlm, task, group, int(config["max_new_tokens"]), skipped, bar)
                batch_size = for_each_batch(samples, batch_size, partial(_sweep_batch, sweep), say)
                for one in group:
                    _finish(vlm, task, one, skipped.used(samples), config | skipped.for_config(), options)
    skipped.note(samples)
    return list(paths.values())


def _crops(setting: Setting) -> int:
    """Return `max_crops`, 0 where the model has no such knob."""
    return int(setting.get("max_crops", 0))


def _is_done(path: Path, task: Task, config: Mapping[str, Any], overwrite: bool) -> bool:
    """Tell whether a setting is finished, and then remove its journal, which a kill may have spared."""
    done = is_finished(path, task, "accuracy", config, overwrite)
    if done or overwrite:
        remove(_journal_path(path))
    return done


def _journal_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.jsonl")


def _begin(stack: contextlib.ExitStack, setting: Setting, path: Path, config: Mapping[str, Any]) -> _Setting:
    journal = stack.enter_context(Journal(_journal_path(path), config))
    remove_leftovers(path)
    batches = [entry for entry in journal.entries if not isinstance(entry, dict)]  # an object names what was skipped
    records = [AccuracyRecord.from_dict(raw) for batch in batches for raw in batch]
    return _Setting(setting, path, journal, {record.sample_id: record for record in records})


@dataclass
class _Tiling:
    """All settings under way that share a tiling, and what answers them."""

    vlm: VLM
    task: Task
    group: Sequence[_Setting]
    max_new_tokens: int
    skipped: Skipped
    bar: Any

    def skip(self, place: SplitSample, error: InputError) -> None:
        """Leave a sample out, and have all journals say so."""
        name = place.sample.sample_id
        self.skipped.add(name, error)
        for one in self.group:
            one.journal.append({name: str(error)})
            self.bar.update(name not in one.done)


def _sweep_batch(sweep: _Tiling, batch: Sequence[SplitSample]) -> None:
    """Answer one batch at all settings of one tiling that lack it, without samples that cannot be used."""
    batch = [place for place in batch if place.sample.sample_id not in sweep.skipped]
    lacking = [one for one in sweep.group if any(place.sample.sample_id not in one.done for place in batch)]
    if not lacking:
        return
    pairs = []
    for place in batch:
        try:
            pairs.append((place, load_image(place)))
        except InputError as error:
            sweep.skip(place, error)
    try:
        _answer_batch(sweep, lacking, pairs)
    except InputError:  # the model refuses one of them; alone it tells which
        for place, image in pairs:
            try:
                _answer_batch(sweep, lacking, [(place, image)])
            except InputError as error:
                sweep.skip(place, error)


def _answer_batch(
    sweep: _Tiling, lacking: Sequence[_Setting], pairs: Sequence[tuple[SplitSample, Image.Image]]
) -> None:
    """Write the answers to one batch into the journals of the settings that lack it."""
    if not pairs:
        return
    shared: dict[str, Any] = {}
    if isinstance(sweep.vlm, SharesTiles):
        crops = _crops(lacking[0].setting) or None
        shared["visual"] = sweep.vlm.encode_tiles([image for _, image in pairs], crops)
    for one in lacking:
        rows = [i for i, (place, _) in enumerate(pairs) if place.sample.sample_id not in one.done]
        if not rows:
            continue
        answers = sweep.vlm.generate_batch(
            [pairs[i][1] for i in rows],
            [pairs[i][0].sample.question for i in rows],
            one.setting,
            max_new_tokens=sweep.max_new_tokens,
            **{name: [values[i] for i in rows] for name, values in shared.items()},
        )
        one.add([_record(sweep.task, pairs[i][0], answer) for i, answer in zip(rows, answers, strict=True)])
        sweep.bar.update(len(rows))


def _record(task: Task, place: SplitSample, answer: Generation) -> AccuracyRecord:
    return AccuracyRecord(
        sample_id=place.sample.sample_id,
        score=float(task.score(answer.text, place.sample)),
        pred=answer.text,
        answers=place.sample.answers,
        num_vision_tokens=answer.num_vision_tokens,
        num_language_tokens=answer.num_language_tokens,
        num_output_tokens=answer.num_output_tokens,
        groups=place.groups,
    )


def _finish(
    vlm: VLM,
    task: Task,
    one: _Setting,
    samples: Sequence[SplitSample],
    config: Mapping[str, Any],
    options: SweepOptions,
) -> None:
    """Write the result; only then is the journal no longer needed."""
    write_accuracy_result(
        options.output_dir,
        task.name,
        one.setting,
        [one.done[place.sample.sample_id] for place in samples],
        config=config,
        rank=options.file_rank,
        **blocks_of(vlm, one.setting),
    )
    one.journal.remove()
