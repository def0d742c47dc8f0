"""Which worker gets which job, and what happens when one dies: plain Python, whatever the workers run on.

A job is what may be lost at once. A worker's death costs the job that it was at, and of that only what had not come
back: the job is given to another worker, which is sent what is left of it. A job that several workers died at is given
up, and so is a crew whose workers die again and again before they have begun.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from budgetvlm._threads import side_by_side
from budgetvlm.errors import WorkerError

TRIES = 3  # workers that may die at one job, or in a row before they are ready


class Portion(Protocol):
    """A job: something to do, of which the driver knows how much is left."""

    def left(self) -> Any | None:
        """Return what a worker has to be told; None: nothing is left."""
        ...

    def take(self, item: Any) -> None:
        """Keep a piece of what was asked for."""
        ...

    def end(self) -> None:
        """Hear that nothing is left."""
        ...


class Worker(Protocol):
    """What is built in a worker's process, once."""

    def work(self, message: Any) -> Iterator[Any]:
        """Yield the pieces of what a job's message asks for, each as soon as it is there."""
        ...

    def close(self) -> None:
        """End the work."""
        ...


@dataclass(frozen=True)
class News:
    """What was heard of a worker.

    Attributes:
        worker: its number.
        what: "ready" for a first job; a "piece" of its job; "done" with its job; "dead".
        value: the piece, or why it is dead.
    """

    worker: int
    what: Literal["ready", "piece", "done", "dead"]
    value: Any = None


class Crew(Protocol):
    """Workers somewhere."""

    def give(self, worker: int, message: Any) -> None:
        """Send a message to a worker that has nothing to do."""
        ...

    def hear(self) -> News:
        """Wait for the next event. What a worker's own code raised is raised here."""
        ...

    def replace(self, worker: int) -> None:
        """Start another worker in place of a dead one; it has the same number."""
        ...


Say = Callable[[str], None]
Build = Callable[[Say], Worker]
StartCrew = Callable[[Build, Say], AbstractContextManager[Crew]]
"""Starts workers, each built by the function that is given, and ends them; it says what happens."""


def do_jobs(jobs: Iterator[Portion], build: Build, crew: StartCrew | None, say: Say, at_once: int = 1) -> None:
    """Do all jobs in this process, or have workers do them that are built in others. Raises as `hand_out` does."""
    if crew is None:
        do_here(jobs, build(say), at_once)
        return
    with crew(build, say) as workers:
        hand_out(jobs, workers, say)


def do_here(jobs: Iterator[Portion], worker: Worker, at_once: int = 1) -> None:
    """Do all jobs in this process, one after the other, or several in threads where a job's pieces may come at once."""
    given = ((job, job.left()) for job in jobs)

    def pieces(one: tuple[Portion, Any]) -> Iterable[Any]:
        work = iter(()) if one[1] is None else worker.work(one[1])
        return work if at_once == 1 else list(work)

    try:
        for (job, _), found in side_by_side(pieces, given, at_once):
            for piece in found:
                job.take(piece)
            job.end()
    finally:
        worker.close()


def hand_out(jobs: Iterator[Portion], crew: Crew, say: Say) -> None:
    """Give jobs to whoever has nothing to do until all are done.

    Args:
        jobs: asked for one at a time, so that there may be any number of them.

    Raises:
        WorkerError: workers died too often.
    """
    idle, under_way, again = deque[int](), dict[int, Portion](), deque[Portion]()
    deaths = Counter[Portion | None]()  # None: before there was a job
    job: Portion | None = None
    while True:
        job = job or (again.popleft() if again else next(jobs, None))
        if job is None and not under_way:
            return
        if job is not None and idle:
            if (message := job.left()) is None:
                job.end()
            else:
                under_way[idle[0]] = job
                crew.give(idle.popleft(), message)
            job = None
        else:
            event = crew.hear()
            if event.what == "piece":
                under_way[event.worker].take(event.value)
            elif event.what == "dead":
                lost = under_way.pop(event.worker, None)
                deaths[lost] += 1
                if deaths[lost] == TRIES:
                    raise _given_up(lost, event.value)
                say(f"worker {event.worker + 1} died ({event.value}); another one takes its place")
                again.extend([lost] if lost else [])
                crew.replace(event.worker)
            else:
                if event.what == "done":
                    under_way[event.worker].end()
                for known in (under_way.pop(event.worker, None), None):
                    deaths.pop(known, None)
                idle.append(event.worker)


def _given_up(lost: Portion | None, why: str) -> WorkerError:
    what = "before they had anything to do" if lost is None else f"at one and the same work ({lost})"
    return WorkerError(
        f"{TRIES} workers died {what}; the last: {why}. What is finished is kept. If memory runs out, give them more "
        "(--cpus_per_worker) or smaller batches (--batch_size), then run again."
    )
