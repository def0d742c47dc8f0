"""Brings jobs to replicas: what the scheduler says, done with asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.replicas import Replica
from budgetvlm.serving.serve_options import ServeOptions


class Ticket:
    """A job under way, for the one who waits for it.

    Attributes:
        job: what is asked. left: nobody waits for it any more.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.left = job, False
        self.started_s: float | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.replica: Replica | None = None

    def put(self, event: Event) -> None:
        """Tell the one who waits."""
        self._events.put_nowait(event)

    async def events(self) -> AsyncIterator[Event]:
        """What comes of the job, its end included."""
        while True:
            event = await self._events.get()
            yield event
            if event.is_last:
                return

    async def leave(self) -> None:
        """Nobody waits any more: work on it stops."""
        self.left = True
        if self.replica:
            await self.replica.stop_job(self.job)


class Dispatcher:
    """Holds the replicas and the jobs that wait for one."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._replicas: list[Replica] = []
        self._waiting: list[Ticket] = []
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether a replica could take a job."""
        return any(replica.alive for replica in self._replicas)

    async def start(self) -> None:
        """Start the replicas. Raises ReplicaError."""
        self._replicas = [Replica(self._options) for _ in range(self._options.replicas)]
        await asyncio.gather(*[replica.start() for replica in self._replicas])
        self._tasks = [asyncio.create_task(self._work(replica)) for replica in self._replicas]

    async def close(self) -> None:
        """Stop the replicas."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*[replica.close() for replica in self._replicas if replica.alive])

    def submit(self, job: Job) -> Ticket:
        """Let a job wait for its turn."""
        ticket = Ticket(job)
        self._waiting.append(ticket)
        self._changed.set()
        return ticket

    async def _work(self, replica: Replica) -> None:
        """Give one replica job after job."""
        while True:
            ticket = await self._take()
            ticket.replica, ticket.started_s = replica, time.perf_counter()
            async for event in replica.answer(ticket.job):
                ticket.put(event)
            ticket.replica = None

    async def _take(self) -> Ticket:
        """Wait for the next job."""
        while True:
            self._waiting = [ticket for ticket in self._waiting if not ticket.left]
            if self._waiting:
                first = min(self._waiting, key=lambda ticket: ticket.job.deadline_s)
                self._waiting.remove(first)
                return first
            self._changed.clear()
            await self._changed.wait()
