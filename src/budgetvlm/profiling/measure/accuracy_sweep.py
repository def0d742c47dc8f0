"""The accuracy sweep (exp5): every setting answers every sample, in batches, and is scored by the task.

A sample that cannot be used is left out by all settings, and named; the journals and the files remember it.

Tiles are encoded once a batch and tiling, and shared by all settings with that `max_crops`. Of each setting that is
not finished there is a journal beside its result; a killed sweep goes on behind the last batch in it. A batch is one
line of the journal, so it is resumed with the same neighbours, and the results are those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
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
from budgetvlm.profiling.measure.sweep import Sweep, load_image, remove, remove_leftovers
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
    sweep = Sweep("accuracy", vlm, task, settings, options, say)
    for setting, path in sweep.paths.items():
        if options.overwrite or setting not in sweep.todo:
            remove(_journal_path(path))  # a kill may have spared it
    with contextlib.ExitStack() as stack:
        # go on where the journals end
        open_ones = [_begin(stack, setting, sweep) for setting in sweep.todo]
        for one in open_ones:
            sweep.skipped.remember(one.skipped)
        kept = sum(len(one.done) for one in open_ones)
        total = len(sweep.samples) * len(open_ones)
        if kept:
            say(f"going on with {kept} of {total} answers of an earlier run")
        # tiling by tiling, because settings that share one share the encoded tiles
        bar = tqdm(total=total, initial=kept, desc="accuracy", unit="answer", mininterval=0.5, disable=not open_ones)
        with bar:
            for max_crops in sorted({_crops(one.setting) for one in open_ones}):
                group = [one for one in open_ones if _crops(one.setting) == max_crops]
                tiling = _Tiling(sweep, group, bar)
                batch_size = for_each_batch(sweep.samples, batch_size, partial(_sweep_batch, tiling), say)
                for one in group:
                    _finish(sweep, one)
    sweep.skipped.note(sweep.samples)
    return list(sweep.paths.values())


def _crops(setting: Setting) -> int:
    """Return `max_crops`, 0 where the model has no such knob."""
    return int(setting.get("max_crops", 0))


def _journal_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.jsonl")


def _begin(stack: contextlib.ExitStack, setting: Setting, sweep: Sweep) -> _Setting:
    path = sweep.paths[setting]
    journal = stack.enter_context(Journal(_journal_path(path), sweep.config))
    remove_leftovers(path)
    batches = [entry for entry in journal.entries if not isinstance(entry, dict)]  # an object names what was skipped
    records = [AccuracyRecord.from_dict(raw) for batch in batches for raw in batch]
    return _Setting(setting, journal, {record.sample_id: record for record in records})


@dataclass
class _Tiling:
    """All settings under way that share a tiling, of a sweep."""

    sweep: Sweep
    group: Sequence[_Setting]
    bar: Any

    def skip(self, place: SplitSample, error: InputError) -> None:
        """Leave a sample out, and have all journals say so."""
        name = place.sample.sample_id
        self.sweep.skipped.add(name, error)
        for one in self.group:
            one.journal.append({name: str(error)})
            self.bar.update(name not in one.done)


def _sweep_batch(tiling: _Tiling, batch: Sequence[SplitSample]) -> None:
    """Answer one batch at all settings of one tiling that lack it, without samples that cannot be used."""
    batch = [place for place in batch if place.sample.sample_id not in tiling.sweep.skipped]
    lacking = [one for one in tiling.group if any(place.sample.sample_id not in one.done for place in batch)]
    if not lacking:
        return
    pairs = []
    for place in batch:
        try:
            pairs.append((place, load_image(place)))
        except InputError as error:
            tiling.skip(place, error)
    try:
        _answer_batch(tiling, lacking, pairs)
    except InputError:  # the model refuses one of them; alone it tells which
        for place, image in pairs:
            try:
                _answer_batch(tiling, lacking, [(place, image)])
            except InputError as error:
                tiling.skip(place, error)


def _answer_batch(
    tiling: _Tiling, lacking: Sequence[_Setting], pairs: Sequence[tuple[SplitSample, Image.Image]]
) -> None:
    """Write the answers to one batch into the journals of the settings that lack it."""
    if not pairs:
        return
    shared: dict[str, Any] = {}
    if isinstance(tiling.sweep.vlm, SharesTiles):
        crops = _crops(lacking[0].setting) or None
        shared["visual"] = tiling.sweep.vlm.encode_tiles([image for _, image in pairs], crops)
    for one in lacking:
        rows = [i for i, (place, _) in enumerate(pairs) if place.sample.sample_id not in one.done]
        if not rows:
            continue
        answers = tiling.sweep.vlm.generate_batch(
            [pairs[i][1] for i in rows],
            [pairs[i][0].sample.question for i in rows],
            one.setting,
            max_new_tokens=tiling.sweep.max_new_tokens,
            **{name: [values[i] for i in rows] for name, values in shared.items()},
        )
        one.add([_record(tiling.sweep.task, pairs[i][0], answer) for i, answer in zip(rows, answers, strict=True)])
        tiling.bar.update(len(rows))


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


def _finish(sweep: Sweep, one: _Setting) -> None:
    """Write the result; only then is the journal no longer needed."""
    records = [one.done[place.sample.sample_id] for place in sweep.skipped.used(sweep.samples)]
    arguments = sweep.result_arguments(one.setting)
    write_accuracy_result(sweep.options.output_dir, sweep.task.name, one.setting, records, **arguments)
    one.journal.remove()
