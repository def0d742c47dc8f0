"""A model that sleeps instead of computing, and a data set of any size, to measure what happens around a model."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KnobSpace
from budgetvlm.tasks import Sample
from budgetvlm.vlm import Generation

SPACE = KnobSpace({"max_crops": [1, 4], "top_k": [2, 4]})


def blank() -> Image.Image:
    return Image.new("RGB", (8, 8))


@dataclass
class NumberedTask:
    """Samples that ask for their number."""

    size: int
    name: str = "numbered"
    max_new_tokens: int = 3

    def num_samples(self, split: str) -> int:
        if split != "test":
            raise ConfigError(f"no split {split}; there is test")
        return self.size

    def samples(self, split: str, num_samples: int | None = None, seed: int = 0) -> Iterator[Sample]:
        for number in range(self.num_samples(split)):
            yield Sample(f"test-{number}", f"test-{number}", str(number), (str(number),), blank)

    def score(self, prediction: str, sample: Sample) -> float:
        return float(prediction in sample.answers)


@dataclass
class SleepingVLM:
    """Sleeps ``pause_s`` a batch, and answers every second question rightly; ``log`` gets a line for each batch."""

    pause_s: float
    log: Path | None = None
    name: str = "sleeping"
    knob_space: KnobSpace = SPACE
    num_total_blocks: int = 4

    def active_blocks(self, num_active_blocks: int) -> tuple[int, ...]:
        return tuple(range(num_active_blocks))

    def prompt_size(self, image: object, question: str) -> tuple[np.ndarray, int]:
        return np.array([4.0 * setting["max_crops"] for setting in SPACE.settings]), 5

    def generate_batch(self, images: list, questions: list, setting: object, *, max_new_tokens: int = 16) -> list:
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as file:
                file.write(f"{os.getpid()}|{setting}|{','.join(questions)}\n".encode())
        time.sleep(self.pause_s)
        return [Generation(q if int(q) % 2 else "?", (7,), "stop", 4, 5, 1) for q in questions]


def opened(pause_s: float, log: Path | None, size: int) -> tuple[SleepingVLM, NumberedTask]:
    return SleepingVLM(pause_s, log), NumberedTask(size)


def opening(pause_s: float, log: Path | None, size: int) -> partial:
    """What workers open model and data set with."""
    return partial(opened, pause_s, log, size)
