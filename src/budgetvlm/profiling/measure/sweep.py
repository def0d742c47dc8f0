"""What the accuracy and the latency sweep share: samples, what is finished already, the journal, the result files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from budgetvlm._io import first_few
from budgetvlm._version import versions
from budgetvlm.errors import ConfigError, DataError, InputError, OutputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.journal import REMEDY, Journal, differences
from budgetvlm.profiling.measure.machine import PACKAGES
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import Measurement
from budgetvlm.profiling.results.reading import read_file, split_names
from budgetvlm.profiling.results.result_files import (
    FORMATS,
    MACHINES,
    Kind,
    SettingResult,
    result_path,
    results_directory,
    write_result,
)
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM

# What may be more than in results that are there: they are kept, and what is new is measured.
GROWING = ("split", "num_samples", "samples_digest", "cells", "groups", "repeats")


@dataclass(frozen=True)
class Unusable:
    """A sample, by its place among all, that cannot be used, and why."""

    row: int
    why: str


def collect(task: Task, options: SweepOptions) -> list[SplitSample]:
    """Collect the samples of this rank, in the task's order, split after split.

    Raises:
        ConfigError: a split or a number of samples that the task does not have, or nothing left for this rank.
        DataError: two samples with one id.
    """
    placed = [
        SplitSample(sample, split)
        for split, count in zip(options.splits, _counts(task, options), strict=True)
        for sample in task.samples(split, count, options.seed)
    ]
    ids = [place.sample.sample_id for place in placed]
    if len(set(ids)) < len(ids):
        twice = first_few({name for name, count in Counter(ids).items() if count > 1}, 2)
        raise DataError(
            f"{task.name}: sample ids occur more than once in {'+'.join(options.splits)} ({twice}), so that results "
            "cannot be told apart. Profile one split at a time, into directories of their own; within one split, name "
            "another column with --columns sample_id=COLUMN."
        )
    own = placed[options.rank :: options.world_size]
    if not own:
        raise ConfigError(
            f"rank {options.rank} of {options.world_size} has none of {len(placed)} samples; use fewer ranks"
        )
    return own


def _counts(task: Task, options: SweepOptions) -> Sequence[int | None]:
    """Return how many samples of each split; None for all of it."""
    if options.num_samples is None:
        return [None] * len(options.splits)
    if len(options.num_samples) == len(options.splits):
        return options.num_samples
    total, sizes = options.num_samples[0], [task.num_samples(split) for split in options.splits]
    if not len(sizes) <= total <= sum(sizes):
        raise ConfigError(
            f"num_samples={total} cannot be shared among {'+'.join(options.splits)} of {task.name}, which have "
            f"{' + '.join(map(str, sizes))}; choose {len(sizes)} to {sum(sizes)}"
        )
    rest = [max(1, total * size // sum(sizes)) for size in sizes[1:]]
    return [total - sum(rest), *rest]


class Sweep:
    """What is measured by one run of a sweep, how far it is, and which samples cannot be used.

    Attributes:
        samples: those of this rank.
        max_new_tokens: largest number of tokens in an answer.
        config: the `config` of the result files: all that decides what a result is, without clock times.
        paths: where the result of each setting goes.
        kept: setting -> what its result file holds already.
        todo: the settings that are not finished.
        machines: name -> hardware of those that were timed, where there are several.
        skipped: sample id -> why it cannot be used, also those that finished results left out. All settings leave out
            the same samples.
        rows: sample id -> its place among the samples.
        journal: what is measured but not yet in a result file, while the sweep runs.

    Args:
        more: entries of the config that only this kind of sweep has.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there.
    """

    journal: Journal

    def __init__(
        self,
        kind: Kind,
        vlm: VLM,
        task: Task,
        settings: Sequence[Setting],
        options: SweepOptions,
        say: Callable[[str], None],
        **more: Any,
    ) -> None:
        self.kind, self.vlm, self.task, self.options, self.say = kind, vlm, task, options, say
        self.samples = collect(task, options)
        self.rows = {place.sample.sample_id: row for row, place in enumerate(self.samples)}
        self.max_new_tokens = options.max_new_tokens or task.max_new_tokens
        self.config = self._describe(more)
        self.paths = {s: result_path(options.output_dir, task.name, kind, s, options.file_rank) for s in settings}
        self.skipped: dict[str, str] = {}
        self.machines: dict[str, Any] = {}
        self.kept: dict[Setting, Sequence[Any]] = {}
        self._earlier: dict[str, str | None] = {}
        self._measured: set[str] = set()  # settings that an earlier run has in the journal
        self._refuse_another_models_results()
        self.todo = [setting for setting in settings if not self._is_finished(setting)]
        if len(self.todo) < len(self.paths):
            say(f"{len(self.paths) - len(self.todo)} of {len(self.paths)} settings are finished already")
        growing = [len(self.kept[setting]) for setting in self.todo if setting in self.kept]
        if growing:
            say(f"keeping {sum(growing)} results of {len(growing)} settings and measuring what is new")
        if options.overwrite or not self.todo:
            _remove(self._journal_path)  # a kill may have spared it

    @contextlib.contextmanager
    def resume(self) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
        """Open the journal and yield what an earlier run wrote into it; delete it when everything is finished.

        It has to be looked at before anything is measured. An entry comes with its place in the journal, and its
        ``runs`` hold what was measured, by setting.

        Raises:
            OutputError, DataError: it is of another sweep, in use, or damaged.
        """
        layout = {"entries": 3}  # of the journal's lines; a journal with other lines cannot be resumed
        fixed = {name: value for name, value in self.config.items() if name not in GROWING}
        with Journal(self._journal_path, fixed | layout) as self.journal:
            for path in self.paths.values():  # what a kill during the writing of a result file left beside it
                for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                    _remove(leftover)
            yield self._earlier_entries()
            if self._measured <= set(map(str, self.paths)):  # else the rest is of settings that nobody asked for now
                self.journal.remove()

    def _earlier_entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, entry in self.journal.placed():
            self.skipped.update(entry.get("skipped", {}))
            self.machines.update(entry.get(MACHINES, {}))
            if entry.get("digest", "") != (self._digest(entry["samples"]) if "samples" in entry else ""):
                raise OutputError(
                    f"an unfinished sweep lies in {self.journal.path.parent}, made with other samples. {REMEDY}"
                )
            self._measured.update(entry.get("runs", ()))
            if "runs" in entry:
                yield place, entry

    def note(self, samples: Sequence[str], runs: Mapping[str, Any], **more: Any) -> int:
        """Write into the journal what was measured of these samples, by setting; return its place there."""
        return self.journal.append({"samples": list(samples), "digest": self._digest(samples), "runs": runs, **more})

    def note_machine(self, name: str, hardware: Mapping[str, Any]) -> None:
        """Write into the journal what a machine is, once."""
        if name not in self.machines:
            self.machines[name] = dict(hardware)
            self.journal.append({MACHINES: {name: self.machines[name]}})

    def skip(self, place: SplitSample, error: Exception) -> None:
        """Leave out a sample that cannot be used. Raises DataError with ``strict``."""
        name = place.sample.sample_id
        if self.options.strict:
            raise DataError(f"{error}. Mend the sample {name}, or leave out --strict to skip it.") from error
        self.skipped[name] = str(error)
        self.say(f"skipped sample {name}: {error}")
        self.journal.append({"skipped": {name: str(error)}})

    def usable_samples(self) -> list[SplitSample]:
        """Return the samples that are left. Raises DataError if none is."""
        left = [place for place in self.samples if place.sample.sample_id not in self.skipped]
        if not left:
            name = self.samples[0].sample.sample_id
            raise DataError(
                f"none of the {len(self.samples)} samples can be used; the first, {name}: {self.skipped[name]}"
            )
        return left

    def say_what_was_skipped(self) -> None:
        """Say how many samples were left out, and which."""
        if self.skipped:
            names = first_few(self.skipped)
            self.say(f"{len(self.skipped)} of {len(self.samples)} samples cannot be used and were skipped: {names}")

    def write(self, setting: Setting, records: Collection[Measurement]) -> None:
        """Write the result of one setting."""
        more = {"skipped": self.skipped, MACHINES: self.machines}
        active = self.vlm.active_blocks(int(setting.get("num_active_blocks", self.vlm.num_total_blocks)))
        write_result(
            self.kind,
            self.options.output_dir,
            self.task.name,
            setting,
            records,
            blocks={"num_total_blocks": self.vlm.num_total_blocks, "active_block_indices": list(active)},
            config=self.config | {name: dict(sorted(own.items())) for name, own in more.items() if own},
            rank=self.options.file_rank,
        )

    @property
    def _journal_path(self) -> Path:
        rank = "" if self.options.file_rank is None else f"_rank{self.options.file_rank}"
        directory = results_directory(self.options.output_dir, self.task.name, self.kind)
        return directory / f".{FORMATS[self.kind].experiment}{rank}.jsonl"

    def _describe(self, more: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        config = {
            "model_path": self.vlm.name,
            "model_fingerprint": options.model_fingerprint,
            "split": "+".join(options.splits),
            "num_samples": list(options.num_samples) if options.num_samples else None,
            "samples_digest": digest_of(self.samples),
            "max_new_tokens": self.max_new_tokens,
            "seed": options.seed,
            "world_size": options.world_size,
            "versions": versions(*PACKAGES),
            **({"task": dict(options.task_options)} if options.task_options else {}),
            **more,
        }
        return dict(json.loads(json.dumps(config)))

    def _refuse_another_models_results(self) -> None:
        """Raise OutputError where settings of another model lie beside these: nobody could tell them apart later."""
        own, fingerprint = set(self.paths.values()), self.options.model_fingerprint
        place = next(iter(own)).parent
        beside = sorted(set(place.glob(f"{FORMATS[self.kind].stem}_*.json")) - own)
        if not beside or fingerprint is None:
            return
        config = read_file(beside[0], self.task.name, self.kind).config
        if config.get("model_fingerprint") not in (None, fingerprint):
            raise OutputError(
                f"{place} holds results of another model ({config.get('model_path')}, fingerprint "
                f"{config['model_fingerprint']}), for example {beside[0].name}; this one is {self.vlm.name} "
                f"({fingerprint}). Give another --output_dir, or move those results away."
            )

    def _is_finished(self, setting: Setting) -> bool:
        """Tell whether the result of a setting is there already, and take what it holds; with ``overwrite`` remove it.

        What was measured of fewer samples, settings, cells or repeats is not finished, but kept.

        Raises:
            OutputError: it is of another sweep or of a larger one, or cannot be removed.
        """
        path = self.paths[setting]
        if self.options.overwrite:
            _remove(path)
        if not path.exists():
            return False
        try:
            result = read_file(path, self.task.name, self.kind)
        except DataError as error:
            raise OutputError(f"{error} {REMEDY}") from None
        found, defaults = result.config, {"cells": 1.0}
        differing = differences(defaults | found, defaults | self.config)
        wrong = [name for name in differing if name not in GROWING] or (differing and self._shrunk(result))
        if wrong:
            raise OutputError(f"{path} exists, but was made with other {', '.join(wrong)}. {REMEDY}")
        self.skipped.update(found.get("skipped", {}))
        self.machines.update(found.get(MACHINES, {}))
        self.kept[setting] = result.records
        return not differing

    def _shrunk(self, result: SettingResult) -> list[str]:
        """Return names of what a result has more of than this sweep asks for, or otherwise."""
        found, wanted = result.config, self.config
        measured = {record.sample_id for record in result.records} | set(found.get("skipped", {}))
        less = ["cells"] if found.get("cells", 1.0) > wanted.get("cells", 1.0) else []
        repeats, before = wanted.get("repeats", 0), found.get("repeats", 0)
        # results from before all runs were kept hold only the median
        if before > repeats or (before < repeats and any(record.runs is None for record in result.records)):
            less.append("repeats")
        if not measured <= {place.sample.sample_id for place in self.samples}:
            asked = [name for name in ("split", "num_samples") if found.get(name) != wanted[name]]
            return [*less, *(asked or ["samples_digest"])]
        same = found.get("samples_digest") in (self._digest(measured), self._digest_of_earlier(found))
        return less if same else [*less, "samples_digest"]

    def _digest(self, names: Collection[str]) -> str:
        """Return a digest of what these samples are, in the order of all."""
        return digest_of([self.samples[row] for row in sorted(self.rows[name] for name in names if name in self.rows)])

    def _digest_of_earlier(self, config: Mapping[str, Any]) -> str | None:
        """Return the digest of the samples that an earlier sweep asked for, as they are now; None: there are none."""
        counts, splits = config.get("num_samples"), split_names(config)
        asked = json.dumps([counts, splits])
        if asked not in self._earlier:
            self._earlier[asked] = None
            with contextlib.suppress(ConfigError, DataError, TypeError):
                options = replace(self.options, splits=splits, num_samples=tuple(counts) if counts else None)
                self._earlier[asked] = digest_of(collect(self.task, options))
        return self._earlier[asked]


def digest_of(places: Sequence[SplitSample]) -> str:
    """Return a short digest of questions, answers and images."""
    samples = [place.sample for place in places]
    contents = [[s.sample_id, s.question, s.answers, s.content or s.image_id] for s in samples]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def load_image(place: SplitSample) -> Image.Image:
    """Load the sample's image. Raises InputError: it cannot be loaded; the message names the sample."""
    try:
        return place.sample.load_image()
    except OSError as error:
        raise InputError(f"the image of sample {place.sample.sample_id} cannot be read: {error}") from error


def _remove(path: Path) -> None:
    """Delete a file that may not be there. Raises OutputError where it cannot be deleted."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror}. Choose a writable --output_dir.") from error
