"""Where a sweep's jobs are done: in this process, or in others that open model and data set themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from budgetvlm.cluster.hand_out import Portion, Say, StartCrew, Worker, do_jobs
from budgetvlm.errors import DataError
from budgetvlm.profiling.measure.sweep import Sweep, collect, digest_of
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.tasks import Task
from budgetvlm.vlm import VLM


@dataclass(frozen=True)
class Elsewhere:
    """Other processes.

    Attributes:
        crew: starts and ends them.
        opening: opens model and task; it has to travel to other processes, and is called in each of them.
    """

    crew: StartCrew
    opening: Callable[[], tuple[VLM, Task]]


def sweep_through(
    jobs: Iterator[Portion],
    build: Callable[..., Worker],
    sweep: Sweep,
    elsewhere: Elsewhere | None,
    at_once: int = 1,
) -> None:
    """Do a sweep's jobs here, ``at_once`` in threads, or have them done elsewhere.

    ``build``: from model, task, samples and what takes lines for the user to a worker.
    """
    if elsewhere is None:
        do_jobs(jobs, partial(build, sweep.vlm, sweep.task, sweep.samples), None, sweep.say, at_once)
    else:
        digest = sweep.config["samples_digest"]
        do_jobs(jobs, partial(_build, elsewhere.opening, sweep.options, digest, build), elsewhere.crew, sweep.say)


def _build(
    opening: Callable[[], tuple[VLM, Task]], options: SweepOptions, digest: str, build: Callable[..., Worker], say: Say
) -> Worker:
    """Build a worker in its own process. Raises DataError: it finds other samples there."""
    vlm, task = opening()
    samples = collect(task, options)
    if digest_of(samples) != digest:
        raise DataError(
            f"{task.name} has other samples on a worker's machine than here. Give all machines the same files and the "
            "same version of the data set."
        )
    return build(vlm, task, samples, say)
