"""What the accuracy and the latency sweep share: their options, their samples, what is finished already."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from budgetvlm.errors import ConfigError, DataError, InputError, OutputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.journal import REMEDY, differences
from budgetvlm.profiling.measure.machine import versions
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.result_files import Kind, read_file, result_path
from budgetvlm.table import first_few
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM


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


class Skipped:
    """Samples that cannot be used: skipped, counted and named, or with ``strict`` the end of the sweep.

    Attributes:
        reasons: sample id -> why. All settings leave out the same samples.
    """

    def __init__(self, strict: bool, say: Callable[[str], None]) -> None:
        self.reasons: dict[str, str] = {}
        self._strict, self._say = strict, say

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.reasons

    def add(self, sample_id: str, error: Exception) -> None:
        """Leave a sample out. Raises DataError with ``strict``."""
        if self._strict:
            raise DataError(f"{error}. Mend the sample {sample_id}, or leave out --strict to skip it.") from error
        self.reasons[sample_id] = str(error)
        self._say(f"skipped sample {sample_id}: {error}")

    def remember(self, reasons: Mapping[str, str]) -> None:
        """Take over what an earlier run left out."""
        self.reasons.update(reasons)

    def used(self, samples: Sequence[SplitSample]) -> list[SplitSample]:
        """Return the samples that are left. Raises DataError if none is."""
        left = [place for place in samples if place.sample.sample_id not in self.reasons]
        if not left:
            name = samples[0].sample.sample_id
            raise DataError(f"none of the {len(samples)} samples can be used; the first, {name}: {self.reasons[name]}")
        return left

    def note(self, samples: Sequence[SplitSample]) -> None:
        """Say how many were left out, and which."""
        if self.reasons:
            names = first_few(self.reasons)
            self._say(f"{len(self.reasons)} of {len(samples)} samples cannot be used and were skipped: {names}")

    def for_config(self) -> dict[str, Any]:
        """Return what the result files say of it."""
        return {"skipped": dict(sorted(self.reasons.items()))} if self.reasons else {}


class Sweep:
    """What is measured by one run of a sweep.

    Attributes:
        samples: those of this rank.
        config: the `config` of the result files: all that decides what a result is, without clock times.
        paths: where the result of each setting goes.
        todo: the settings that are not finished.
        skipped: samples that cannot be used, also those that finished results left out.

    Args:
        more: entries of the config that only this kind of sweep has.

    Raises:
        ConfigError, KnobSpaceError: options that cannot work.
        OutputError: results of another sweep are there.
    """

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
        self.config = self._describe(more)
        self.paths = {s: result_path(options.output_dir, task.name, kind, s, options.file_rank) for s in settings}
        self.skipped = Skipped(options.strict, say)
        self.todo = [setting for setting in settings if not self._is_finished(setting)]
        if len(self.todo) < len(self.paths):
            say(f"{len(self.paths) - len(self.todo)} of {len(self.paths)} settings are finished already")

    @property
    def max_new_tokens(self) -> int:
        """The longest answer."""
        return int(self.config["max_new_tokens"])

    def result_arguments(self, setting: Setting) -> dict[str, Any]:
        """Return what the writers of result files want beside the records."""
        active = self.vlm.active_blocks(int(setting.get("num_active_blocks", self.vlm.num_total_blocks)))
        return {
            "num_total_blocks": self.vlm.num_total_blocks,
            "active_block_indices": active,
            "config": self.config | self.skipped.for_config(),
            "rank": self.options.file_rank,
        }

    def _describe(self, more: dict[str, Any]) -> dict[str, Any]:
        options, ids = self.options, "\n".join(one.sample.sample_id for one in self.samples)
        config = {
            "model_path": self.vlm.name,
            "model_fingerprint": options.model_fingerprint,
            "split": "+".join(options.splits),
            "num_samples": list(options.num_samples) if options.num_samples else None,
            "samples_digest": hashlib.sha256(ids.encode()).hexdigest()[:16],
            "max_new_tokens": options.max_new_tokens or self.task.max_new_tokens,
            "seed": options.seed,
            "world_size": options.world_size,
            "versions": versions(),
            **({"task": dict(options.task_options)} if options.task_options else {}),
            **more,
        }
        return dict(json.loads(json.dumps(config)))

    def _is_finished(self, setting: Setting) -> bool:
        path = self.paths[setting]
        done = is_finished(path, self.task, self.kind, self.config, self.options.overwrite)
        if done:
            self.skipped.remember(read_file(path, self.task.name, self.kind).config.get("skipped", {}))
        return done


def load_image(place: SplitSample) -> Image.Image:
    """Load the sample's image.

    Raises:
        InputError: it cannot be loaded; the message names the sample.
    """
    try:
        return place.sample.load_image()
    except OSError as error:
        raise InputError(f"the image of sample {place.sample.sample_id} cannot be read: {error}") from error


def is_finished(path: Path, task: Task, kind: Kind, config: Mapping[str, Any], overwrite: bool) -> bool:
    """Tell whether a result file of this very sweep is there; with ``overwrite`` remove it.

    Raises:
        OutputError: it is of another sweep, or cannot be removed.
    """
    if overwrite:
        remove(path)
    if not path.exists():
        return False
    try:
        found = read_file(path, task.name, kind).config
    except DataError as error:
        raise OutputError(f"{error} {REMEDY}") from None
    differing = differences(found, config)
    if differing:
        raise OutputError(f"{path} exists, but was made with other {', '.join(differing)}. {REMEDY}")
    return True


def remove(path: Path) -> None:
    """Delete a file that may not be there.

    Raises:
        OutputError: it cannot be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror}. Choose a writable --output_dir.") from error


def remove_leftovers(path: Path) -> None:
    """Delete what a kill during the writing of a result file left beside it; call it while holding its journal."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        remove(leftover)
