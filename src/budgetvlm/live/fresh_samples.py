"""Samples that nothing was fitted on, for requests on the real clock."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from budgetvlm.controller.provenance import digests_of
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.table import first_few
from budgetvlm.tasks import Sample, Task


def fresh_samples(
    task: Task, split: str, count: int, seed: int, used: Collection[str] = (), enough: int | None = None
) -> list[Sample]:
    """Samples of a split whose image can be opened and which, like their images, were not used before.

    ``used``: ids or digests of samples and of images that are left out, for example those that were profiled.
    ``enough``: smaller number of samples that will do; None: ``count`` are needed. Raises ConfigError: the split has
    too few of them.
    """
    total = task.num_samples(split)
    wanted = min(total, count + len(used))
    left_out: dict[str, None] = {}

    def usable(samples: Iterable[Sample]) -> list[Sample]:
        return list(islice(_usable(samples, task.name, used, left_out), count))

    fresh = usable(task.samples(split, wanted, seed + 1))
    if len(fresh) < count and wanted < total:
        fresh = usable(task.samples(split))
    if len(fresh) < (count if enough is None else enough):
        seen = f" ({len(left_out)} were used before: {first_few(left_out)})" if left_out else ""
        raise ConfigError(
            f"{count} samples were asked of {task.name}/{split}, and {len(fresh)} of its {total} can be used and are "
            f"not profiled{seen}. Ask for fewer with --samples or --num_requests, give another --split, or prepare the "
            "data again with --calibration_samples and --test_split, which hold some back."
        )
    return fresh


def sample_digests(task_name: str, sample: Sample) -> frozenset[str]:
    """Return the digests by which a controller knows a sample and its image."""
    return digests_of(task_name, sample.sample_id, sample.image_id, sample.groups.get("dataset"))


def _usable(
    samples: Iterable[Sample], task_name: str, used: Collection[str], left_out: dict[str, None]
) -> Iterator[Sample]:
    """Yield the samples that are not used and whose image can be opened; note the used, say which cannot be opened."""
    for sample in samples:
        names = {sample.sample_id, sample.image_id, *sample_digests(task_name, sample)}
        if not names.isdisjoint(used):
            left_out[sample.sample_id] = None
            continue
        try:
            sample.load_image()
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
        else:
            yield sample
