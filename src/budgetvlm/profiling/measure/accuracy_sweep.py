"""The accuracy sweep (exp5): settings answer samples, in batches, and are scored by the task.

Every setting answers every sample, or, with ``cells``, some of them, drawn so that they take that share of the work
(`budgetvlm.profiling.measure.cell_selection`). A sample that cannot be used is left out by all settings, and named; the
journal and the files remember it.

Settings are taken in stages, tiling by tiling: tiles are encoded once a batch and stage, and shared by all settings
with that `max_crops`. A batch at one setting is one line of the journal, so that nothing finished is lost by a kill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.cell_selection import Work, by_tiling, measured_in_full, plan_cells
from budgetvlm.profiling.measure.out_of_memory import for_each_batch, in_parts
from budgetvlm.profiling.measure.shared_cores import SharedCores
from budgetvlm.profiling.measure.sweep import Sweep, load_image
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import TOKEN_COUNTS, AccuracyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation

TOGETHER = 4  # batches whose images are encoded together where settings answer a part of them, to fill a setting's own
ENCODED_AT_ONCE = 8  # images; what more of them hold between layers no longer fits into a processor's cache

Loaded = tuple[SplitSample, Image.Image]


def profile_accuracy(
    vlm: VLM,
    task: Task,
    settings: Sequence[Setting],
    options: SweepOptions,
    *,
    batch_size: int = 32,
    cells: float = 1.0,
    groups: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Measure the accuracy of settings and write one result file each.

    Args:
        batch_size: samples answered at once; halved, with a message, whenever memory runs out.
        cells: share of the work of answering samples at all settings; test samples are answered at all.
        groups: label, like "document", whose samples are answered at all settings together, where no split is "test"
            and ``cells`` is below 1; None: "image_id".

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} cannot work; it has to be 1 at least")
    more = {} if cells == 1 else {"cells": cells, "groups": groups} if groups else {"cells": cells}
    sweep = Sweep("accuracy", vlm, task, settings, options, say, **more)
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
        asked: setting -> ids of the samples that it is to answer.
        cores: how many threads work, which is nobody's concern but the sweep's, because no time is measured.
    """

    def __init__(self, sweep: Sweep, cells: float, batch_size: int) -> None:
        self.cores, self.groups = SharedCores(sweep.say), sweep.config.get("groups", "image_id")
        self.sweep, self.batch_size, self.together = sweep, batch_size, 1 if cells == 1 else TOGETHER
        self.done = {s: {record.sample_id: record for record in sweep.kept.get(s, ())} for s in sweep.paths}
        names, settings = np.array([place.sample.sample_id for place in sweep.samples]), list(sweep.paths)
        plan = np.ones((len(names), len(settings)), dtype=bool)
        if cells != 1:
            plan = plan_cells(sweep.samples, settings, cells, _work(sweep, settings), self.groups)
        self.asked = {s: set(names[column].tolist()) for s, column in zip(settings, plan.T, strict=True)}

    def measure(self, entries: Sequence[dict[str, Any]]) -> None:
        """Measure what is lacking, and write each setting's file when it is complete."""
        sweep = self.sweep
        for entry in entries:
            for setting in sweep.todo:
                raw = entry["runs"].get(str(setting), ())
                self._learn(setting, [AccuracyRecord.from_dict(one) for one in raw])
        kept = sum(len(self.done[setting]) for setting in sweep.todo)
        total = sum(len(self.asked[s].union(self.done[s]).difference(sweep.skipped)) for s in sweep.todo)
        if entries:
            sweep.say(f"going on with {kept} of {total} answers of an earlier run")
        if self.together > 1:
            self._say_what_is_measured()
        with self.cores, tqdm(total=total, initial=kept, desc="accuracy", unit="answer", mininterval=0.5) as bar:
            size = self.batch_size
            for group in by_tiling(sweep.todo):
                stage = [sweep.todo[place] for place in group]
                places = [place for place in sweep.samples if self._lacking(place, stage)]
                run = partial(self._measure_batch, stage, bar)
                size = for_each_batch(places, size, run, sweep.say, together=self.together)
                for setting in stage:
                    usable = [place.sample.sample_id for place in sweep.usable_samples()]
                    sweep.write(setting, [self.done[setting][name] for name in usable if name in self.done[setting]])

    def _say_what_is_measured(self) -> None:
        whole, settings = int(measured_in_full(self.sweep.samples, self.groups).sum()), len(self.asked)
        planned = sum(map(len, self.asked.values())) - whole * settings
        others = len(self.sweep.samples) - whole
        self.sweep.say(
            f"measuring all {settings} settings of {whole} test samples, because an evaluation needs them, and "
            f"{planned:,} of {others * settings:,} cells (sample, setting) of {others} others"
        )

    def _lacking(self, place: SplitSample, stage: Sequence[Setting]) -> list[Setting]:
        """Return the settings that are yet to answer a sample."""
        name = place.sample.sample_id
        asked = (s for s in stage if name in self.asked[s] and name not in self.done[s])
        return [] if name in self.sweep.skipped else list(asked)

    def _learn(self, setting: Setting, records: Sequence[AccuracyRecord]) -> None:
        self.done[setting].update({record.sample_id: record for record in records})

    def _measure_batch(self, stage: Sequence[Setting], bar: tqdm, places: Sequence[SplitSample], size: int) -> None:
        """Answer what samples lack at settings of one tiling, without samples that cannot be used."""
        loaded: list[Loaded] = []
        for place in places:
            if self._lacking(place, stage):
                try:
                    loaded.append((place, load_image(place)))
                except InputError as error:
                    self.sweep.skip(place, error)
        if loaded:
            self._answer(stage, bar, loaded, size)

    def _answer(self, stage: Sequence[Setting], bar: tqdm, loaded: Sequence[Loaded], size: int) -> None:
        """Answer samples; where the model refuses one, answer them one by one, which tells whom to leave out."""
        try:
            self._answer_batch(stage, bar, loaded, size)
        except InputError as error:
            if len(loaded) == 1:
                self.sweep.skip(loaded[0][0], error)
                return
            for one in loaded:
                self._answer(stage, bar, [one], 1)

    def _answer_batch(self, stage: Sequence[Setting], bar: tqdm, loaded: Sequence[Loaded], size: int) -> None:
        """Answer samples at the settings that want them, ``size`` at once; write the answers into the journal."""
        sweep, shared = self.sweep, dict[str, list[Any]]()
        encode_tiles = getattr(sweep.vlm, "encode_tiles", None)  # not every model can part encoding from answering
        if encode_tiles is not None:
            crops = stage[0].get("max_crops")  # the same at all settings of a stage
            parts = (
                encode_tiles([image for _, image in part], crops)
                for part in in_parts(loaded, min(size, ENCODED_AT_ONCE))
            )
            shared["visual"] = [tokens for part in parts for tokens in part]
        for setting in stage:
            lacking = [row for row, (place, _) in enumerate(loaded) if self._lacking(place, [setting])]
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


def _work(sweep: Sweep, settings: Sequence[Setting]) -> Work:
    """Return what a sample's measurement costs, by the tokens of the first sample that can be used.

    The unit is one token in all blocks; encoding a visual token takes about as much. What other knobs change is left
    out: the draw then does not depend on it, so a share of the cells is that share of their work.
    """
    vlm, total = sweep.vlm, sweep.vlm.num_total_blocks
    for place in sweep.samples:
        with contextlib.suppress(InputError):
            visual, text = vlm.prompt_size(load_image(place), place.sample.question)
            break
    else:
        visual, text = np.ones(len(vlm.knob_space)), 0
    visual = visual[[vlm.knob_space.index(setting) for setting in settings]]
    depth = np.array([float(setting.get("num_active_blocks", total)) / total for setting in settings])
    encoding = visual if hasattr(vlm, "encode_tiles") else np.zeros_like(visual)
    return Work(encoding, depth * (visual + text))


def _record(task: Task, place: SplitSample, answer: Generation) -> AccuracyRecord:
    return AccuracyRecord(
        sample_id=place.sample.sample_id,
        score=float(task.score(answer.text, place.sample)),
        pred=answer.text,
        answers=place.sample.answers,
        groups=place.groups,
        **{field: getattr(answer, field) for field in TOKEN_COUNTS},
    )
