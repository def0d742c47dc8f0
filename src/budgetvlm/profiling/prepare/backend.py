"""Where tasks and models come from when training data is prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from budgetvlm.profiling.measure.machine import model_fingerprint
from budgetvlm.tasks import Task, TaskOptions, load_task
from budgetvlm.vlm import VLM, load_vlm


def _fingerprint(model_path: str) -> str:
    from budgetvlm.vlm.loading import model_directory

    return model_fingerprint(model_directory(model_path))


@dataclass(frozen=True)
class Backend:
    """Where tasks and models come from; a parameter, so that other models and tests can bring their own.

    Attributes:
        open_task: data set's name, or its options -> task.
        open_vlm: (model path, device) -> model.
        fingerprint: model path -> digest of model and processor, without opening the model.
    """

    open_task: Callable[[TaskOptions], Task] = load_task
    open_vlm: Callable[[str, str], VLM] = field(default=lambda path, device: load_vlm(path, device=device))
    fingerprint: Callable[[str], str] = _fingerprint
