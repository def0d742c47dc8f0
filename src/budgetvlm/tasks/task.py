"""What the rest of the project needs of a task: samples in fixed splits and a score between 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sample:
    """One image, one question, its reference answers.

    Attributes:
        sample_id: unique within the task and split, stable from run to run.
        image_id: samples that share an image share this; splits never do.
        load_image: draws or opens the image when it is needed; InputError if the sample cannot be used.
        groups: visible labels of the sample, for example {"kind": "read", "difficulty": "small"}.
        options: of a multiple-choice question; answers are then letters.
        content: alike for equal images alone, where ``image_id`` is only what the data set says; else empty.
    """

    sample_id: str
    image_id: str
    question: str
    answers: tuple[str, ...]
    load_image: Callable[[], Image.Image]
    groups: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    content: str = ""


@dataclass(frozen=True)
class SplitSample:
    """A sample and the split of the task that it comes from."""

    sample: Sample
    split: str

    @property
    def groups(self) -> dict[str, str]:
        """Labels for result files; the split is one, so that later steps can keep the task's splits."""
        return {**self.sample.groups, "image_id": self.sample.image_id, "split": self.split}


class Task(Protocol):
    """A data set with its metric."""

    name: str
    max_new_tokens: int

    def num_samples(self, split: str) -> int:
        """Return how many samples the split holds. Raises ConfigError for an unknown split."""
        ...

    def samples(self, split: str, num_samples: int | None = None, seed: int = 0) -> Iterator[Sample]:
        """Stream a split in its fixed order, or ``num_samples`` of it drawn with ``seed`` (still in order)."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the task's metric for one answer, 0 to 1."""
        ...
