"""The accuracy sweep (exp5): settings answer samples, in batches, and are scored by the task.

Every setting answers every sample, or, with ``cells``, some of them, drawn so that they take that share of the work
(`budgetvlm.profiling.measure.cell_selection`). A sample that cannot be used is left out by all settings, and named; the
journal and the files remember it.

Settings are taken in stages, tiling by tiling: tiles are encoded once a batch and stage, and shared by all settings
with that `max_crops`. A batch at one setting is one line of the journal, so that nothing finished is lost by a kill.
Batches are the same wherever they are answered (`budgetvlm.profiling.measure.answering`), and so are the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from budgetvlm.cluster.hand_out import Portion
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.answering import Answerer, Answers
from budgetvlm.profiling.measure.cell_selection import Work, by_tiling, measured_in_full, plan_cells
from budgetvlm.profiling.measure.elsewhere import Elsewhere, sweep_through
from budgetvlm.profiling.measure.out_of_memory import in_parts
from budgetvlm.profiling.measure.sweep import Sweep, Unusable, load_image
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import AccuracyRecord
from budgetvlm.tasks import Task
from budgetvlm.vlm import VLM

TOGETHER = 4  # batches whose images are encoded together where settings answer a part of them, to fill a setting's own
ENGINE_BATCHES = 2  # at once: an engine has work while the next batch is read and the slowest of the last is awaited
TODO, KEPT = -1, 0  # where an answer is not in the journal: there is none yet, or an earlier result file holds it


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
    elsewhere: Elsewhere | None = None,
) -> list[Path]:
    """Measure the accuracy of settings and write one result file each.

    Args:
        batch_size: samples answered at once; halved, with a message, whenever memory runs out.
        cells: share of the work of answering samples at all settings; test samples are answered at all.
        groups: label, like "document", whose samples are answered at all settings together, where no split is "test"
            and ``cells`` is below 1; None: "image_id".
        elsewhere: other processes that answer; None: this one does.

    Returns:
        The paths of all files, also of those that were finished before.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there, or nothing can be written.
        DataError: no sample can be used, or with ``options.strict`` one cannot.
        WorkerError: processes elsewhere die again and again, or cannot be had.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} cannot work; it has to be 1 at least")
    more = {} if cells == 1 else {"cells": cells, "groups": groups} if groups else {"cells": cells}
    sweep = Sweep("accuracy", vlm, task, settings, options, say, **more)
    run = _AccuracySweep(sweep, cells, batch_size)
    if sweep.todo:
        with sweep.resume() as entries:
            run.measure(entries, elsewhere)
    sweep.say_what_was_skipped()
    return list(sweep.paths.values())


class _AccuracySweep:
    """One run of a sweep. Shapes: S samples, n settings.

    Attributes:
        asked: whether a setting is to answer a sample, bool ``[S, n]``.
        place: where in the journal its answer is, or `TODO`, or `KEPT`; int64 ``[S, n]``.
        usable: whether a sample can be used, as far as is known, bool ``[S]``.
    """

    def __init__(self, sweep: Sweep, cells: float, batch_size: int) -> None:
        self.groups = sweep.config.get("groups", "image_id")
        self.sweep, self.batch_size, self.together = sweep, batch_size, 1 if cells == 1 else TOGETHER
        self.settings = list(sweep.paths)
        self.columns = {setting: column for column, setting in enumerate(self.settings)}
        self.asked = np.ones((len(sweep.samples), len(self.settings)), dtype=bool)
        if cells != 1:
            self.asked = plan_cells(sweep.samples, self.settings, cells, _work(sweep, self.settings), self.groups)
        self.usable = np.ones(len(self.asked), dtype=bool)
        self.place = np.full(self.asked.shape, TODO, dtype=np.int64)
        for setting, records in sweep.kept.items():
            self.place[[sweep.rows[record.sample_id] for record in records], self.columns[setting]] = KEPT

    def measure(self, entries: Iterator[tuple[int, dict[str, Any]]], elsewhere: Elsewhere | None) -> None:
        """Measure what is lacking, and write each setting's file when it is complete."""
        sweep, named = self.sweep, {str(setting): self.columns[setting] for setting in self.sweep.todo}
        begun = False
        for place, entry in entries:
            begun = True
            for name in entry["runs"]:
                if name in named:
                    self.place[[sweep.rows[sample] for sample in entry["samples"]], named[name]] = place
        self.usable[[sweep.rows[name] for name in sweep.skipped if name in sweep.rows]] = False
        todo = [self.columns[setting] for setting in sweep.todo]
        done = self.place[:, todo] != TODO
        kept, total = int(done.sum()), int(((self.asked[:, todo] | done) & self.usable[:, None]).sum())
        if begun:
            sweep.say(f"going on with {kept} of {total} answers of an earlier run")
        if self.together > 1:
            self._say_what_is_measured()
        build = partial(
            Answerer, max_new_tokens=sweep.max_new_tokens, batch_size=self.batch_size, together=self.together
        )
        with tqdm(total=total, initial=kept, desc="accuracy", unit="answer", mininterval=0.5) as self.bar:
            sweep_through(self._jobs(), build, sweep, elsewhere, 1 if sweep.vlm.can_revise else ENGINE_BATCHES)

    def _jobs(self) -> Iterator[Portion]:
        """Yield batches, tiling by tiling; whoever does the last of a tiling has its files written."""
        for group in by_tiling(self.sweep.todo):
            settings = [self.sweep.todo[place] for place in group]
            rows = np.flatnonzero(self.lacking(settings).any(axis=1))
            parts = list(in_parts(rows.tolist(), self.batch_size * self.together))
            stage = _Stage(settings, len(parts))
            if not parts:
                self.write(stage)
            for part in parts:
                yield _Batch(self, stage, part)

    def write(self, stage: _Stage) -> None:
        """Write the files of a tiling. Raises DataError: no sample can be used."""
        self.sweep.usable_samples()
        for setting in stage.settings:
            self.sweep.write(setting, _Records(self, setting))

    def _say_what_is_measured(self) -> None:
        whole, settings = int(measured_in_full(self.sweep.samples, self.groups).sum()), len(self.settings)
        planned = int(self.asked.sum()) - whole * settings
        others = len(self.sweep.samples) - whole
        self.sweep.say(
            f"measuring all {settings} settings of {whole} test samples, because an evaluation needs them, and "
            f"{planned:,} of {others * settings:,} cells (sample, setting) of {others} others"
        )

    def lacking(self, stage: Sequence[Setting], rows: Any = slice(None)) -> np.ndarray:
        """Tell which of these settings are yet to answer which of these samples, bool ``[len(rows), len(stage)]``."""
        columns = [self.columns[setting] for setting in stage]
        todo = self.asked[rows][:, columns] & (self.place[rows][:, columns] == TODO)
        return np.asarray(todo & self.usable[rows, None])

    def take(self, piece: Answers | Unusable) -> None:
        """Write answers into the journal, or leave a sample out."""
        if isinstance(piece, Unusable):
            self.usable[piece.row] = False
            self.sweep.skip(self.sweep.samples[piece.row], InputError(piece.why))
            return
        raw = [record.to_dict() for record in piece.records]
        place = self.sweep.note([record.sample_id for record in piece.records], {str(piece.setting): raw})
        self.place[piece.rows, self.columns[piece.setting]] = place
        self.bar.update(len(piece.rows))


@dataclass
class _Stage:
    """The settings of a tiling, and how many batches are left of it."""

    settings: Sequence[Setting]
    left: int


class _Batch:
    """Samples that are answered together, at all settings of a tiling."""

    def __init__(self, run: _AccuracySweep, stage: _Stage, rows: Sequence[int]) -> None:
        self.run, self.stage, self.rows = run, stage, np.array(rows)

    def left(self) -> dict[Setting, list[int]] | None:
        settings = self.stage.settings
        lacking = self.run.lacking(settings, self.rows)
        return {s: self.rows[own].tolist() for s, own in zip(settings, lacking.T, strict=True) if own.any()} or None

    def take(self, piece: Answers | Unusable) -> None:
        self.run.take(piece)

    def end(self) -> None:
        self.stage.left -= 1
        if not self.stage.left:
            self.run.write(self.stage)

    def __str__(self) -> str:
        names = [self.run.sweep.samples[row].sample.sample_id for row in self.rows]
        first, *others = self.stage.settings
        return f"samples {names[0]} to {names[-1]}, {first}" + (" and others" if others else "")


class _Records(Collection[AccuracyRecord]):
    """The answers of a setting, read from the journal whenever they are needed, because there may be a million."""

    def __init__(self, run: _AccuracySweep, setting: Setting) -> None:
        self.run, self.setting = run, setting
        self.place = np.where(run.usable, run.place[:, run.columns[setting]], TODO)

    def __len__(self) -> int:
        return int((self.place != TODO).sum())

    def __contains__(self, record: object) -> bool:
        return any(record == own for own in self)

    def __iter__(self) -> Iterator[AccuracyRecord]:
        sweep = self.run.sweep
        kept = {record.sample_id: record for record in sweep.kept.get(self.setting, ())}
        known, of_entry = KEPT, dict[str, Any]()
        for row in np.flatnonzero(self.place != TODO):
            name, place = sweep.samples[row].sample.sample_id, int(self.place[row])
            if place not in (KEPT, known):
                raw = sweep.journal.read(place)["runs"][str(self.setting)]
                known, of_entry = place, {one["sample_id"]: one for one in raw}
            yield kept[name] if place == KEPT else AccuracyRecord.from_dict(of_entry[name])


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
