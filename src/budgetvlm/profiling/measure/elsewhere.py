"""Where a sweep's jobs are done: in this process, or in others that open model and data set themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from budgetvlm.cluster.hand_out import Crew, Job, Worker, do_here, hand_out
from budgetvlm.errors import DataError
from budgetvlm.profiling.measure.sweep import Sweep, collect, digest_of
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.tasks import Task
from budgetvlm.vlm import VLM

Say = Callable[[str], None]
Build = Callable[..., Worker]
"""From model, task, samples and `Say` to a worker."""


@dataclass(frozen=True)
class Elsewhere:
    """Other processes.

    Attributes:
        crew: starts workers, each built by the function it is given, and ends them; it says what happens.
        opening: opens model and task; it has to travel to other processes, and is called in each of them.
    """

    crew: Callable[[Callable[[Say], Worker], Say], AbstractContextManager[Crew]]
    opening: Callable[[], tuple[VLM, Task]]


def do_jobs(jobs: Iterator[Job | None], build: Build, sweep: Sweep, elsewhere: Elsewhere | None) -> None:
    """Do a sweep's jobs here, or have them done elsewhere."""
    if elsewhere is None:
        do_here(jobs, build(sweep.vlm, sweep.task, sweep.samples, sweep.say))
        return
    digest = sweep.config["samples_digest"]
    with elsewhere.crew(partial(_build, elsewhere.opening, sweep.options, digest, build), sweep.say) as crew:
        hand_out(jobs, crew, sweep.say)


def _build(
    opening: Callable[[], tuple[VLM, Task]], options: SweepOptions, digest: str, build: Build, say: Any
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
