"""The accuracy sweep (exp5): settings answer samples, in batches, and are scored by the task.

Every setting answers every sample, or, with ``cells``, a share of them that is chosen as it goes
(`budgetvlm.profiling.measure.cell_selection`). A sample that cannot be used is left out by all settings, and named; the
journal and the files remember it.

Settings are taken in stages, tiling by tiling: tiles are encoded once a batch and stage, and shared by all settings
with that `max_crops`. A batch at one setting is one line of the journal, so that nothing finished is lost by a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.cell_selection import CellSelection, stages_of
from budgetvlm.profiling.measure.out_of_memory import for_each_batch, in_parts
from budgetvlm.profiling.measure.shared_cores import SharedCores
from budgetvlm.profiling.measure.sweep import Sweep, load_image
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import TOKEN_COUNTS, AccuracyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation

CHOSEN_AT_ONCE = 4  # batches that cells are chosen for together, so that a setting has about a batch of them
ENCODED_AT_ONCE = 8  # images; what more of them hold between layers no longer fits into a processor's cache

Loaded = tuple[SplitSample, Image.Image]
Wanted = dict[Setting, set[str]]  # setting -> ids of the samples that it is to answer


def profile_accuracy(
    vlm: VLM,
    task: Task,
    settings: Sequence[Setting],
    options: SweepOptions,
    *,
    batch_size: int = 32,
    cells: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Measure the accuracy of settings and write one result file each.

    Args:
        batch_size: samples answered at once; halved, with a message, whenever memory runs out.
        cells: share of the settings that a sample is answered at; test samples are answered at all.

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} cannot work; it has to be 1 at least")
    sweep = Sweep("accuracy", vlm, task, settings, options, say, **({} if cells == 1 else {"cells": cells}))
    run = _AccuracySweep(sweep, cells, batch_size)
    if sweep.todo:
        with sweep.resume() as entries:
            run.measure(entries)
    sweep.say_what_was_skipped()
    return list(sweep.paths.values())


class _AccuracySweep:
    """One run of a sweep.

    Attributes:
        done: setting -> sample id -> what the model answered.
        stages: the settings that are asked for, in the order in which they are measured.
        selection: which cells are measured.
        cores: how many threads work, which is nobody's concern but the sweep's, because no time is measured.
    """

    def __init__(self, sweep: Sweep, cells: float, batch_size: int) -> None:
        space = sweep.vlm.knob_space
        self.cores = SharedCores(sweep.say)
        self.sweep, self.batch_size, self.together = sweep, batch_size, 1 if cells == 1 else CHOSEN_AT_ONCE
        self.done = {s: {record.sample_id: record for record in sweep.kept.get(s, ())} for s in sweep.paths}
        self.row_of = {place.sample.sample_id: row for row, place in enumerate(sweep.samples)}
        self.column_of = {setting: space.index(setting) for setting in sweep.paths}
        self.stages = stages_of(space, list(sweep.paths), cells)
        columns = [[self.column_of[setting] for setting in stage] for stage in self.stages]
        scores = np.full((len(sweep.samples), len(space)), np.nan)
        self.selection = CellSelection(space, sweep.samples, scores, cells, columns)
        for setting, records in self.done.items():
            self._learn(setting, list(records.values()))

    def measure(self, entries: Sequence[dict[str, Any]]) -> None:
        """Measure what is lacking, and write each setting's file when it is complete."""
        sweep, total = self.sweep, self.selection.total
        for entry in entries:
            for setting in sweep.todo:
                raw = entry["runs"].get(str(setting), ())
                self._learn(setting, [AccuracyRecord.from_dict(one) for one in raw])
        kept = sum(len(self.done[setting]) for setting in sweep.todo)
        finished = sum(len(records) for records in self.done.values()) - kept
        if entries:
            sweep.say(f"going on with {kept} of {total - finished} answers of an earlier run")
        if self.together > 1:
            sweep.say(self.selection.description)
        with (
            self.cores,
            tqdm(total=total - finished, initial=kept, desc="accuracy", unit="answer", mininterval=0.5) as bar,
        ):
            size = self.batch_size
            for number, stage in enumerate(self.stages):
                todo = [setting for setting in stage if setting in sweep.todo]
                run = partial(self._measure_batch, number, todo, bar)
                size = for_each_batch(sweep.samples, size, run, sweep.say, together=self.together) if todo else size
                for setting in todo:
                    usable = [place.sample.sample_id for place in sweep.usable_samples()]
                    sweep.write(setting, [self.done[setting][name] for name in usable if name in self.done[setting]])

    def _learn(self, setting: Setting, records: Sequence[AccuracyRecord]) -> None:
        for record in records:
            self.done[setting][record.sample_id] = record
            self.selection.scores[self.row_of[record.sample_id], self.column_of[setting]] = record.score

    def _measure_batch(
        self, stage: int, todo: Sequence[Setting], bar: tqdm, places: Sequence[SplitSample], size: int
    ) -> None:
        """Choose what samples lack at one stage and answer it, without samples that cannot be used."""
        places = [place for place in places if place.sample.sample_id not in self.sweep.skipped]
        if not places:
            return
        chosen = self.selection.choose([self.row_of[place.sample.sample_id] for place in places], stage)
        wanted: Wanted = {
            s: {place.sample.sample_id for place, row in zip(places, chosen, strict=True) if row[self.column_of[s]]}
            for s in todo
        }
        loaded: list[Loaded] = []
        for place in places:
            if any(place.sample.sample_id in names for names in wanted.values()):
                try:
                    loaded.append((place, load_image(place)))
                except InputError as error:
                    self.sweep.skip(place, error)
        if loaded:
            self._answer(wanted, bar, loaded, size)

    def _answer(self, wanted: Wanted, bar: tqdm, loaded: Sequence[Loaded], size: int) -> None:
        """Answer samples; where the model refuses one, answer them one by one, which tells whom to leave out."""
        try:
            self._answer_batch(wanted, bar, loaded, size)
        except InputError as error:
            if len(loaded) == 1:
                self.sweep.skip(loaded[0][0], error)
                return
            for one in loaded:
                self._answer(wanted, bar, [one], 1)

    def _answer_batch(self, wanted: Wanted, bar: tqdm, loaded: Sequence[Loaded], size: int) -> None:
        """Answer samples at the settings that want them, ``size`` at once; write the answers into the journal."""
        sweep, shared = self.sweep, dict[str, list[Any]]()
        encode_tiles = getattr(sweep.vlm, "encode_tiles", None)  # not every model can part encoding from answering
        if encode_tiles is not None:
            crops = next(iter(wanted)).get("max_crops")  # the same at all settings of a stage
            parts = (
                encode_tiles([image for _, image in part], crops)
                for part in in_parts(loaded, min(size, ENCODED_AT_ONCE))
            )
            shared["visual"] = [tokens for part in parts for tokens in part]
        for setting, names in wanted.items():
            known = self.done[setting]
            ids = [place.sample.sample_id for place, _ in loaded]
            lacking = [row for row, name in enumerate(ids) if name in names and name not in known]
            for rows in in_parts(lacking, size):
                answers = sweep.vlm.generate_batch(
                    [loaded[row][1] for row in rows],
                    [loaded[row][0].sample.question for row in rows],
                    setting,
                    max_new_tokens=sweep.max_new_tokens,
                    **{name: [values[row] for row in rows] for name, values in shared.items()},
                )
                found = [_record(sweep.task, loaded[row][0], answer) for row, answer in zip(rows, answers, strict=True)]
                sweep.note([r.sample_id for r in found], {str(setting): [r.to_dict() for r in found]})
                self._learn(setting, found)
                bar.update(len(found))
                self.cores.check()


def _record(task: Task, place: SplitSample, answer: Generation) -> AccuracyRecord:
    return AccuracyRecord(
        sample_id=place.sample.sample_id,
        score=float(task.score(answer.text, place.sample)),
        pred=answer.text,
        answers=place.sample.answers,
        groups=place.groups,
        **{field: getattr(answer, field) for field in TOKEN_COUNTS},
    )
