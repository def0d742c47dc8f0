"""Samples that nothing was fitted on, for requests on the real clock."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.tasks import Sample, Task


def fresh_samples(
    task: Task, split: str, count: int, seed: int, used: Collection[str] = (), enough: int | None = None
) -> list[Sample]:
    """Samples of a split whose image can be opened and which, like their images, were not used before.

    Args:
        used: ids of samples and of images that are left out, for example those that were profiled.
        enough: smaller number of samples that will do; None: ``count`` are needed.

    Raises:
        ConfigError: the split has too few of them.
    """
    total = task.num_samples(split)
    wanted = min(total, count + len(used))
    fresh = list(islice(_usable(task.samples(split, wanted, seed + 1), used), count))
    if len(fresh) < count and wanted < total:
        fresh = list(islice(_usable(task.samples(split), used), count))
    if len(fresh) < (count if enough is None else enough):
        raise ConfigError(
            f"{count} samples were asked of {task.name}/{split}, and {len(fresh)} of its {total} can be used and are "
            "not profiled. Ask for fewer, or give another --split."
        )
    return fresh


def _usable(samples: Iterable[Sample], used: Collection[str]) -> Iterator[Sample]:
    """Yield the samples that are not used and whose image can be opened; say which ones cannot."""
    for sample in samples:
        if sample.sample_id in used or sample.image_id in used:
            continue
        try:
            sample.load_image()
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
        else:
            yield sample
