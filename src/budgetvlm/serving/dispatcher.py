"""Brings jobs to replicas: what the scheduler says, done with asyncio."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.lifecycle import Keeper
from budgetvlm.serving.replicas import LEFT, Replica, ReplicaError
from budgetvlm.serving.serve_options import ServeOptions

_log = logging.getLogger(__name__)
CLOSE_S = 5.0  # what a replica has to finish, once nobody waits for an answer any more
DOWN = Event("error", {"message": "the model's process is started anew; ask again", "type": "NotReady"})


class Ticket:
    """A job under way, for the one who waits for it.

    Attributes:
        job: what is asked.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
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
        self.job.left = True
        if self.replica:
            await self.replica.stop_job(self.job)
        else:
            self.put(LEFT)


class Dispatcher:
    """Holds the replicas and the jobs that wait for one.

    Args:
        make_replica: makes other replicas, for tests.
    """

    def __init__(self, options: ServeOptions, make_replica: Callable[[ServeOptions], Replica] = Replica) -> None:
        self._options = options
        self._waiting: list[Ticket] = []
        self._changed = asyncio.Event()
        self._reloading = asyncio.Lock()
        keepers = range(options.replicas)
        self._keepers = [Keeper(lambda: make_replica(options), self._work, self._replicas_changed) for _ in keepers]
        self._started = False

    @property
    def ready(self) -> bool:
        """Whether a replica could take a job."""
        return self.replicas > 0

    @property
    def replicas(self) -> int:
        """How many replicas could take a job."""
        return sum(keeper.replica is not None and keeper.replica.alive for keeper in self._keepers)

    @property
    def restarts(self) -> int:
        """How often a replica died and another one was started."""
        return sum(keeper.restarts for keeper in self._keepers)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    async def start(self) -> None:
        """Start the replicas, if they are not yet. Raises ReplicaError."""
        if not self._started:
            self._started = True
            await asyncio.gather(*[keeper.start() for keeper in self._keepers])

    async def reload(self) -> None:
        """Have each replica replaced by one that reads the controller anew. Raises ReplicaError: nothing changed."""
        async with self._reloading:
            try:
                for keeper in self._keepers:
                    await keeper.exchange()
            except ReplicaError as error:
                _log.error("the controller was not read anew, the one before goes on: %s", error)
                raise

    async def close(self) -> None:
        """Stop the replicas."""
        await asyncio.gather(*[keeper.close(CLOSE_S) for keeper in self._keepers])

    def submit(self, job: Job) -> Ticket:
        """Let a job wait for its turn. Raises APIError."""
        if not self.ready:
            raise APIError(503, DOWN.data["message"], code="not_ready", retry_after_s=self._start_s)
        ticket = Ticket(job)
        self._waiting.append(ticket)
        self._changed.set()
        return ticket

    @property
    def _start_s(self) -> float:
        """How long a replica takes to start."""
        return max(keeper.start_s for keeper in self._keepers)

    def _replicas_changed(self) -> None:
        """Wake those who wait for jobs; without a replica, tell the jobs that cannot wait for one."""
        if not self.ready:
            until_s = time.perf_counter() + self._start_s
            for ticket in [ticket for ticket in self._waiting if ticket.job.deadline_s <= until_s]:
                self._waiting.remove(ticket)
                ticket.put(DOWN)
        self._changed.set()

    async def _work(self, replica: Replica) -> None:
        """Give one replica job after job, until it is dead or to go."""
        while ticket := await self._take(replica):
            ticket.replica, ticket.started_s = replica, time.perf_counter()
            async for event in replica.answer(ticket.job):
                ticket.put(event)
            ticket.replica = None

    async def _take(self, replica: Replica) -> Ticket | None:
        """Wait for the next job; None: the replica is dead or to go."""
        while replica.alive and not replica.retired:
            self._waiting = [ticket for ticket in self._waiting if not ticket.job.left]
            if self._waiting:
                first = min(self._waiting, key=lambda ticket: ticket.job.deadline_s)
                self._waiting.remove(first)
                return first
            self._changed.clear()
            await self._changed.wait()
        return None
