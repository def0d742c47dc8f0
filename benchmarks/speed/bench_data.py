"""What is measured: the user's own data and controller, or made-up ones of the bundled model's size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import ConfigError
from budgetvlm.features import Features
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import Sample, Task, load_task
from budgetvlm.vlm import VLM, load_vlm

WIDTHS = 256, 128  # of the bundled model's image and question features
BLANK = 256, 192  # pixels of an image that tells how wide a model's features are


@dataclass(frozen=True)
class BenchOptions:
    """What to measure on.

    Attributes:
        quick: fewer and shorter runs.
        model_path, dataset_name: the model and the task of the sections that run a model.
        checkpoint: a trained controller; None: an untrained one of the usual size, which is as fast.
        data: ``controller_training_data.json``; None: a made-up table.
        num_threads: of torch; None: its own choice. Decisions always have one.
        seed: of everything random.

    Raises:
        ConfigError: numbers that cannot work.
    """

    quick: bool = False
    model_path: str = "reference"
    dataset_name: str = "signs"
    checkpoint: Path | None = None
    data: Path | None = None
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads={self.num_threads} has to be 1 at least")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} has to be 0 or more")


class Material:
    """Opens what the sections need, once."""

    def __init__(self, options: BenchOptions) -> None:
        self.options = options

    @cached_property
    def vlm(self) -> VLM:
        """The model."""
        return load_vlm(self.options.model_path, num_threads=self.options.num_threads)

    @cached_property
    def task(self) -> Task:
        """Its task."""
        return load_task(self.options.dataset_name)

    def samples(self, count: int) -> list[Sample]:
        """Samples of the task's test split, their images decoded."""
        count = min(count, self.task.num_samples("test"))
        return [_decoded(sample) for sample in self.task.samples("test", count, self.options.seed)]

    @cached_property
    def profile(self) -> tuple[ProfileTable, Features]:
        """Profiles with features: the user's, or made-up ones of the model's knobs."""
        if self.options.data is not None:
            from budgetvlm.profiling.prepare.prepared_data import load_prepared

            prepared = load_prepared(self.options.data)
            return prepared.table, prepared.features
        overview = self.vlm.encode_overview(Image.new("RGB", BLANK))
        widths = len(overview.feature), len(self.vlm.question_feature("what"))
        return made_up(2000, self.vlm.knob_space, self.options.seed, widths)

    @cached_property
    def system(self) -> AdaptiveVLM:
        """Model, controller and guard."""
        if self.options.checkpoint is not None:
            from budgetvlm.controller.checkpoint import load_controller
            from budgetvlm.guard.saved import load_guard

            controller, guard = load_controller(self.options.checkpoint), load_guard(self.options.checkpoint)
            return AdaptiveVLM(self.vlm, controller, guard or self._fresh_guard())
        return AdaptiveVLM(self.vlm, self._untrained(), self._fresh_guard())

    def _fresh_guard(self) -> AdaptiveGuard:
        table, features = self.profile
        return AdaptiveGuard.fit(table, features)

    def _untrained(self) -> GRPOController:
        """One whose decisions differ, as those of a trained one do."""
        torch.manual_seed(self.options.seed)
        controller = fresh_controller(*self.profile, bounded=True)
        for parameter in controller.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return controller


def fresh_controller(table: ProfileTable, features: Features, *, bounded: bool) -> GRPOController:
    """One of the usual size on a profile's features and knobs; without bounds it may choose any setting."""
    latency = np.nanmean(table.latency_ms, axis=0).tolist()
    controller = GRPOController(
        features.image.shape[1],
        features.language.shape[1],
        knob_values=table.knob_space.to_dict(),
        latency_reference_ms=latency[-1],
        latency_ms=latency,
        bounds_ms=latency if bounded else None,
    )
    controller.fit_features(torch.from_numpy(features.image), torch.from_numpy(features.language))
    return controller


def _decoded(sample: Sample) -> Sample:
    image = sample.load_image()
    return replace(sample, load_image=lambda: image)


def made_up(
    count: int, space: KnobSpace | None = None, seed: int = 0, widths: tuple[int, int] = WIDTHS, stages: bool = True
) -> tuple[ProfileTable, Features]:
    """A machine's times of ``count`` samples by stage, with tokens, and features; a tenth is for validation.

    Times are those of a small transformer, give or take 10%; the more expensive a setting, the more often it is right.
    """
    rng = np.random.default_rng(seed)
    space = space or KnobSpace({"max_crops": [1, 4, 12], "top_k": [1, 2, 12], "num_active_blocks": [3, 4, 8]})
    crops, experts, blocks = _columns(space)
    vision = np.tile(16 * np.where(crops > 1, crops + 1, 1), (count, 1)).astype(np.float32)
    language, output = (
        np.repeat(rng.integers(low, high, (count, 1)), len(space), axis=1).astype(np.float32)
        for low, high in ((5, 12), (2, 6))
    )
    times = {
        "preprocess": 0.5 + 0.01 * vision,
        "vision": 1.0 + 0.08 * vision,
        "prefill": 2.0 + blocks * (1.0 + 0.001 * (vision + language) * (4 + experts)),
        "decode": (output - 1) * (0.3 + blocks * (0.8 + 0.05 * experts)),
    }
    total = sum(times.values()) * np.exp(0.1 * rng.standard_normal(vision.shape, dtype=np.float32))
    right = rng.random(vision.shape, dtype=np.float32) < 0.3 + 0.6 * space.complexity
    table = ProfileTable.from_arrays(
        space,
        [str(i) for i in range(count)],
        right,
        total,
        stages_ms=times if stages else None,
        tokens={"vision": vision, "language": language, "output": output} if stages else None,
        split=["train"] * (count - count // 10) + ["validation"] * (count // 10),
    )
    image, words = (rng.standard_normal((count, width), dtype=np.float32) for width in widths)
    return table, Features(table.sample_ids, image, words)


def _columns(space: KnobSpace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of the three usual knobs at each setting, ``[K]`` each; 1 where a model lacks one."""
    known = dict(zip(space.names, space.value_matrix.T, strict=True))
    ones = np.ones(len(space))
    return tuple(known.get(n, ones) for n in ("max_crops", "top_k", "num_active_blocks"))
