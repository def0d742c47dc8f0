"""Fit the guard of a model to the machine that it runs on: the public `budgetvlm.calibrate`."""

from __future__ import annotations

from collections.abc import Collection

from budgetvlm.decide import wait_for_compiled
from budgetvlm.errors import CheckpointError, ConfigError
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.live.calibration import calibrated, measure, requests_needed
from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import Task, load_task


def calibrate(
    model: AdaptiveVLM,
    task: Task | str,
    samples: int = 50,
    *,
    alpha: float = 0.05,
    split: str = "validation",
    used: Collection[str] = (),
    hurries: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> AdaptiveGuard:
    """Measure requests on this machine and give the model a guard that is fitted to them.

    The controller is not trained again. Keep the guard for later with ``model.save_guard(directory)``.

    Args:
        model: a model with a controller and a guard; its guard is replaced.
        task: where the requests come from, or its name.
        samples: number of requests; each is answered at every setting.
        alpha: share of the requests that may be late.
        split: split of the task that the requests come from.
        used: ids of samples and images to leave out, because the controller was trained on them.
        hurries: whether an answer that would be late may go on with fewer experts and blocks.
        seed: seed that draws the samples and the order of the settings.
        progress: whether to show a progress bar.

    Returns:
        The new guard, which the model uses from now on.

    Raises:
        ConfigError: too few requests for this alpha, or the split has too few samples.
        CheckpointError: the model has no guard to start from.
    """
    require_enough(samples, alpha)
    if not isinstance(model.guard, AdaptiveGuard):
        raise CheckpointError("this model has no guard to start from; train again, `budgetvlm train` writes one")
    wait_for_compiled()  # what is measured is what comes later
    task = load_task(task) if isinstance(task, str) else task
    measured = measure(model, task, fresh_samples(task, split, samples, seed, used), seed, progress)
    guard = model.guard = calibrated(model, model.guard, measured, alpha, hurries=hurries)
    return guard


def require_enough(samples: int, alpha: float) -> None:
    """Raise ConfigError where the number of requests cannot support this alpha."""
    needed = requests_needed(alpha)
    if samples < needed:
        raise ConfigError(
            f"--samples {samples} cannot promise a violation rate of {alpha:g}: that takes {needed}. Measure more, or "
            "allow more violations."
        )
