"""The bundled task "signs" behind the `Task` protocol: splits and samples of the scenes that `signs` draws."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from budgetvlm.errors import ConfigError
from budgetvlm.tasks import signs
from budgetvlm.tasks.task import Sample

SPLIT_SIZES = {"train": 8000, "validation": 2000, "test": 4000}
QUESTIONS_PER_IMAGE = 2


class SignsTask:
    """The bundled task behind the `Task` protocol. Sample ids are ``<split>-<image>-<question>``."""

    name = "signs"
    max_new_tokens = 4

    def num_samples(self, split: str) -> int:
        if split not in SPLIT_SIZES:
            raise ConfigError(f"the task signs has no split {split!r}; it has {', '.join(SPLIT_SIZES)}")
        return SPLIT_SIZES[split]

    def samples(self, split: str, num_samples: int | None = None, seed: int = 0) -> Iterator[Sample]:
        """Stream a split, or a part of it: whole images drawn with ``seed``, in the split's order."""
        total = self.num_samples(split)
        count = total if num_samples is None else num_samples
        if not 1 <= count <= total:
            raise ConfigError(f"{count} samples asked of signs/{split}, which has {total}; choose 1 to {total}")
        images = list(range(total // QUESTIONS_PER_IMAGE))
        if count < total:
            needed = -(-count // QUESTIONS_PER_IMAGE)
            rng = np.random.default_rng([seed, *split.encode()])
            images = sorted(rng.permutation(len(images))[:needed].tolist())
        yield from islice((sample for image in images for sample in _image_samples(split, image)), count)

    def score(self, prediction: str, sample: Sample) -> float:
        """Compare after trimming and lower-casing: 1 for an exact match, else 0."""
        return float(prediction.strip().lower() in {answer.strip().lower() for answer in sample.answers})


def _image_samples(split: str, image: int) -> list[Sample]:
    scene = signs.make_scene(signs.scene_seed(split, image))
    rng = np.random.default_rng([scene.seed, 2])
    samples: list[Sample] = []
    while len(samples) < QUESTIONS_PER_IMAGE:
        question = signs.ask(scene, rng)
        if any(question.text == sample.question for sample in samples):
            continue
        samples.append(
            Sample(
                sample_id=f"{split}-{image:05d}-{len(samples)}",
                image_id=f"{split}-{image:05d}",
                question=question.text,
                answers=(question.answer,),
                load_image=lambda: signs.draw(scene),
                groups={"kind": question.kind, "difficulty": scene.difficulty},
            )
        )
    return samples
