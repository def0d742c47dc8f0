"""Several data sets as one task: sample ids begin with the data set's name, the label "dataset" tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.tasks.task import Sample, Task


class CombinedTask:
    """All samples of some tasks, one task after the other. A task without a split adds nothing to that split.

    Image ids stay as they are: two data sets that name an image alike share it.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.name = "+".join(self.tasks)
        self.max_new_tokens = max(task.max_new_tokens for task in tasks)

    def num_samples(self, split: str) -> int:
        return sum(self._sizes(split).values())

    def samples(self, split: str, num_samples: int | None = None, seed: int = 0) -> Iterator[Sample]:
        """Stream a split, or a part of it: each task gives its share of the number."""
        sizes = self._sizes(split)
        total = sum(sizes.values())
        if num_samples is not None and not 1 <= num_samples <= total:
            raise ConfigError(f"{num_samples} samples asked of {self.name}/{split}, which has {total}")
        for name, count in _shares(sizes, total if num_samples is None else num_samples).items():
            for sample in self.tasks[name].samples(split, count, seed) if count else ():
                yield replace(sample, sample_id=f"{name}/{sample.sample_id}", groups={"dataset": name, **sample.groups})

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the metric of the sample's own task."""
        name, _, sample_id = sample.sample_id.partition("/")
        return self.tasks[name].score(prediction, replace(sample, sample_id=sample_id))

    def _sizes(self, split: str) -> dict[str, int]:
        sizes, problems = {}, []
        for name, task in self.tasks.items():
            try:
                sizes[name] = task.num_samples(split)
            except ConfigError as error:
                problems.append(str(error))
        if not sizes:
            raise ConfigError("; ".join(problems))
        return sizes


def _shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Share ``count`` in proportion to the sizes, largest remainders first."""
    exact = np.array(list(sizes.values())) * count / sum(sizes.values())
    shares = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - shares), kind="stable")[: count - int(shares.sum())]:
        shares[i] += 1
    return dict(zip(sizes, shares.tolist(), strict=True))
