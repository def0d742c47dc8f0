"""The accuracy sweep (exp5): every setting answers every sample, in batches, and is scored by the task.

Tiles are encoded once a batch and tiling, and shared by all settings with that `max_crops`. Of each setting that is
not finished there is a journal beside its result; a killed sweep goes on behind the last batch in it. A batch is one
line of the journal, so it is resumed with the same neighbours, and the results are those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from tqdm import tqdm

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.files import AccuracyRecord, write_accuracy_result
from budgetvlm.profiling.journal import Journal
from budgetvlm.profiling.memory import halved
from budgetvlm.profiling.sweep import (
    Placed,
    SweepOptions,
    blocks_of,
    collect,
    describe,
    is_finished,
    remove,
    remove_leftovers,
    result_paths,
)
from budgetvlm.tasks import Task
from budgetvlm.vlm import VLM, Generation


@runtime_checkable
class SharesTiles(Protocol):
    """A `VLM` that can encode tiles once and answer with them at many settings."""

    def encode_tiles(self, images: Sequence[Image.Image], max_crops: int | None) -> list[torch.Tensor]:
        """Visual tokens of each image."""
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
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} cannot work; it has to be 1 at least")
    samples = collect(task, options)
    config = describe(vlm, task, options, samples)
    paths = result_paths(settings, task, "accuracy", options)
    todo = [s for s, path in paths.items() if not _is_done(path, task, config, options.overwrite)]
    if len(todo) < len(paths):
        say(f"{len(paths) - len(todo)} of {len(paths)} settings are finished already")
    with contextlib.ExitStack() as stack:
        open_ones = [_begin(stack, setting, paths[setting], config) for setting in todo]
        kept = sum(len(one.done) for one in open_ones)
        total = len(samples) * len(open_ones)
        if kept:
            say(f"going on with {kept} of {total} answers of an earlier run")
        with tqdm(total=total, initial=kept, desc="accuracy", unit="answer", mininterval=0.5) as bar:
            for max_crops in sorted({_crops(one.setting) for one in open_ones}):
                group = [one for one in open_ones if _crops(one.setting) == max_crops]
                batch_size = _sweep_tiling(vlm, task, group, samples, config, batch_size, bar, say)
                for one in group:
                    _finish(vlm, task, one, samples, config, options)
    return list(paths.values())


def _crops(setting: Setting) -> int:
    """0 where the model has no such knob."""
    return int(setting.get("max_crops", 0))


def _is_done(path: Path, task: Task, config: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a setting is finished; its journal is then of no more use (a kill may have spared it)."""
    done = is_finished(path, task, "accuracy", config, overwrite)
    if done or overwrite:
        remove(_journal_path(path))
    return done


def _journal_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.jsonl")


def _begin(stack: contextlib.ExitStack, setting: Setting, path: Path, config: Mapping[str, Any]) -> _Setting:
    journal = stack.enter_context(Journal(_journal_path(path), config))
    remove_leftovers(path)
    records = [AccuracyRecord.from_dict(raw) for batch in journal.entries for raw in batch]
    return _Setting(setting, path, journal, {record.sample_id: record for record in records})


def _sweep_tiling(
    vlm: VLM,
    task: Task,
    group: Sequence[_Setting],
    samples: Sequence[Placed],
    config: Mapping[str, Any],
    batch_size: int,
    bar: Any,
    say: Callable[[str], None],
) -> int:
    """All samples at all settings of one tiling. Returns the batch size that fitted."""
    start = 0
    while start < len(samples):
        batch = samples[start : start + batch_size]
        try:
            _sweep_batch(vlm, task, group, batch, int(config["max_new_tokens"]), bar)
        except (MemoryError, RuntimeError) as error:
            batch_size = halved(batch_size, error, say)
            continue
        start += len(batch)
    return batch_size


def _sweep_batch(
    vlm: VLM, task: Task, group: Sequence[_Setting], batch: Sequence[Placed], max_new_tokens: int, bar: Any
) -> None:
    """One batch at all settings of one tiling that lack it."""
    lacking = [one for one in group if any(place.sample.sample_id not in one.done for place in batch)]
    if not lacking:
        return
    images = [place.sample.load_image() for place in batch]
    shared: dict[str, Any] = {}
    if isinstance(vlm, SharesTiles):
        shared["visual"] = vlm.encode_tiles(images, _crops(lacking[0].setting) or None)
    for one in lacking:
        rows = [i for i, place in enumerate(batch) if place.sample.sample_id not in one.done]
        answers = vlm.generate_batch(
            [images[i] for i in rows],
            [batch[i].sample.question for i in rows],
            one.setting,
            max_new_tokens=max_new_tokens,
            **{name: [values[i] for i in rows] for name, values in shared.items()},
        )
        one.add([_record(task, batch[i], answer) for i, answer in zip(rows, answers, strict=True)])
        bar.update(len(rows))


def _record(task: Task, place: Placed, answer: Generation) -> AccuracyRecord:
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
    vlm: VLM, task: Task, one: _Setting, samples: Sequence[Placed], config: Mapping[str, Any], options: SweepOptions
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
