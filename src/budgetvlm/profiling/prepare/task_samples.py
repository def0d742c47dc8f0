"""The samples of a data set that results speak of: by id, or by the number that tools give them.

Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from budgetvlm._io import first_few
from budgetvlm.errors import DataError
from budgetvlm.profiling.prepare.splits import TASK_SPLIT
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import SplitSample, Task


def find_samples(task: Task, sample_ids: Sequence[str], splits: Iterable[str]) -> list[SplitSample]:
    """Find samples by id, in that order. Raises DataError: an id is in none of the splits, or in two; ConfigError."""
    wanted, found = set(sample_ids), dict[str, SplitSample]()
    splits = list(splits)
    for split in splits:
        for sample in task.samples(split):
            if sample.sample_id not in wanted:
                continue
            if sample.sample_id in found:
                other = found[sample.sample_id].split
                raise DataError(
                    f"sample {sample.sample_id} of {task.name} is in split {other} and in {split}, so that its "
                    "results cannot be told apart. Profile one split at a time."
                )
            found[sample.sample_id] = SplitSample(sample, split)
    missing = wanted - found.keys()
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} profiled samples are not in {task.name} ({', '.join(splits)}): "
            f"{first_few(missing)}. The results are of another data set or version; profile this one."
        )
    return [found[name] for name in sample_ids]


def find_samples_by_index(
    task: Task, numbers: Sequence[int], split: str, world_size: int = 1
) -> dict[int, SplitSample]:
    """Find the samples with these numbers, a number being the place in the split, from 0 on.

    ``world_size``: ranks that shared the samples; to be of equal length they may have repeated the first samples, whose
    numbers, from the split's size on, are then left out of the result. Raises DataError: a number beyond the split;
    ConfigError: there is no such split.
    """
    wanted, size = set(numbers), task.num_samples(split)
    first = islice(task.samples(split), max(wanted) + 1)
    found = {number: SplitSample(sample, split) for number, sample in enumerate(first) if number in wanted}
    rounded_up = -(-size // world_size) * world_size
    beyond = sorted(n for n in wanted - found.keys() if not size <= n < rounded_up)
    if beyond:
        raise DataError(
            f"sample_id {beyond[0]} is a number and so an index in the split, but {split} of {task.name} has {size} "
            f"samples, 0 to {size - 1} ({len(beyond)} such ids). The results are of another data set, version or split."
        )
    return found


def with_task_ids(
    task: Task, table: ProfileTable, split: str, world_size: Any, say: Callable[[str], None]
) -> tuple[ProfileTable, list[SplitSample]]:
    """Replace indices in a split by the task's own ids; return the samples too. Raises as `find_samples_by_index`."""
    numbers = [int(name) for name in table.sample_ids]
    found = find_samples_by_index(task, numbers, split, world_size if isinstance(world_size, int) else 1)
    rows = [row for row, number in enumerate(numbers) if number in found]
    say(f"the numbers of the samples are taken as their index in {split} of {task.name}")
    if len(rows) < len(numbers):
        say(f"{len(numbers) - len(rows)} samples were repeated to give each rank equally many; left out")
    located = [found[numbers[row]] for row in rows]
    return replace(table.subset(rows), sample_ids=tuple(found.sample.sample_id for found in located)), located


def sample_labels(samples: Sequence[SplitSample]) -> dict[str, tuple[str, ...]]:
    """Return the labels that every data set has: image id and split, ``[S]`` each."""
    return {
        "image_id": tuple(one.sample.image_id for one in samples),
        TASK_SPLIT: tuple(one.split for one in samples),
    }
