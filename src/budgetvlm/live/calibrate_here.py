"""Fit the guard of a model to the machine that it runs on: the public `budgetvlm.calibrate`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from budgetvlm.decide import wait_for_compiled
from budgetvlm.errors import CheckpointError, ConfigError
from budgetvlm.guard.adaptive import AdaptiveGuard
from budgetvlm.live.calibration import Measured, calibrated, measure, requests_needed
from budgetvlm.live.fresh_samples import fresh_samples, sample_digests
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import SPLITS, Task, load_task

USUAL_REQUESTS = 50


def calibrate(
    model: AdaptiveVLM,
    task: Task | str,
    samples: int | None = None,
    *,
    alpha: float = 0.05,
    split: str = "validation",
    used: Collection[str] = (),
    hurries: bool = True,
    seed: int = 0,
    progress: bool = True,
    concurrency: int = 1,
) -> AdaptiveGuard:
    """Measure requests on this machine and give the model a guard that is fitted to them.

    The controller is not trained again. Keep the guard for later with ``model.save_guard(directory)``.

    Args:
        model: a model with a controller and a guard; its guard is replaced. What its controller was trained or
            evaluated on is left out.
        task: where the requests come from, or its name.
        samples: number of requests; each is answered at every setting. None: `USUAL_REQUESTS`, or as many as there are
            if these are enough for ``alpha``.
        alpha: share of the requests that may be late.
        split: split of the task that the requests come from.
        used: ids (or digests) of samples and images to leave out beside those that the controller knows.
        hurries: whether an answer that would be late may go on with fewer experts and blocks.
        seed: seed that draws the samples and the order of the settings.
        progress: whether to show a progress bar.
        concurrency: requests in flight, where the model is served elsewhere.

    Returns:
        The new guard, which the model uses from now on. It remembers the model and the samples.

    Raises:
        ConfigError: too few requests for this alpha, or the split has too few samples.
        CheckpointError: the model has no guard to start from.
    """
    measured, known = measure_here(
        model, task, samples, alpha=alpha, split=split, used=used, seed=seed, progress=progress, concurrency=concurrency
    )  # fmt: skip
    assert isinstance(model.guard, AdaptiveGuard)
    guard = calibrated(model, model.guard, measured, alpha, hurries=hurries)
    guard.origin = {"model": model.fingerprint, "samples": known}
    model.guard = guard
    return guard


def measure_here(
    model: AdaptiveVLM, task: Task | str, samples: int | None, *, alpha: float, split: str = "validation",
    used: Collection[str] = (), seed: int = 0, **how: Any,
) -> tuple[Measured, list[str]]:  # fmt: skip
    """Measure requests of which nothing is known yet, and return them with the digests of their samples.

    The arguments are those of `calibrate`; ``how``: progress and concurrency. Raises as `calibrate` does.
    """
    needed = require_enough(samples, alpha)
    if not isinstance(model.guard, AdaptiveGuard):
        raise CheckpointError("this model has no guard to start from; train again, `budgetvlm train` writes one")
    wait_for_compiled()  # what is measured is what comes later
    task = load_task(task) if isinstance(task, str) else task
    seen, most = model.controller.trained_on.seen(SPLITS), samples or max(USUAL_REQUESTS, needed)
    fresh = fresh_samples(task, split, most, seed, {*used, *seen}, None if samples else needed)
    known = frozenset().union(*(sample_digests(task.name, sample) for sample in fresh))
    return measure(model, task, fresh, seed, **how), sorted(known)


def require_enough(samples: int | None, alpha: float, flag: str = "--samples") -> int:
    """Return the fewest requests for this alpha. Raises ConfigError where those asked for with ``flag`` are fewer."""
    needed = requests_needed(alpha)
    if samples is not None and samples < needed:
        raise ConfigError(
            f"{flag} {samples} cannot promise a violation rate of {alpha:g}: that takes {needed}. Measure more, or "
            "allow more violations (--alpha)."
        )
    return needed
