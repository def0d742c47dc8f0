"""A replica as the server sees it: it is started, watched and given jobs. The usual one is a process with a model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from budgetvlm.errors import BudgetVLMError
from budgetvlm.serving import wire
from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.serve_options import ServeOptions

GONE = Event("error", {"message": "the model's process ended while it worked on this request", "type": "ReplicaDied"})
LEFT = Event("error", {"message": "the client left", "type": "ClientLeft"})


class ReplicaError(BudgetVLMError):
    """A replica that cannot open its model."""


class Health(NamedTuple):
    """How one copy of the model is: its name, whether it answers, its jobs under way and how often it failed."""

    name: str
    up: bool
    in_flight: int
    failures: int


class Replica(ABC):
    """What works on jobs.

    Attributes:
        facts: what it last said of itself: "fastest_ms", the least that a small request takes, "worth", of time,
            "model", what clients may know of it, and "versions" of the controller.
        retired: it gets no further job, because a newer one takes its place.
        slots: jobs that it can work on at once when all is well.
    """

    slots = 1

    def __init__(self, options: ServeOptions) -> None:
        self._options, self.retired = options, False
        self.facts: dict[str, Any] = {}
        self._jobs = 0

    @abstractmethod
    async def start(self) -> None:
        """Open the model and wait until it is there. Raises ReplicaError."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can ever take a job again."""

    @property
    def capacity(self) -> int:
        """Jobs that it can work on at once now."""
        return self.slots if self.alive else 0

    def health(self) -> list[Health]:
        """How each copy of the model is that it has; one without a name has its place's."""
        return [Health("", self.alive, self._jobs, 0)]

    async def answer(self, job: Job) -> AsyncIterator[Event]:
        """Work on a job and pass on what comes of it; the last event is the answer or an error."""
        self._jobs += 1
        try:
            async for event in self._events(job):
                if self.facts.keys() <= event.data.keys():
                    self.facts = {name: event.data[name] for name in self.facts}
                yield event
        finally:
            self._jobs -= 1

    @abstractmethod
    def _events(self, job: Job) -> AsyncIterator[Event]:
        """What comes of a job, up to its last event."""

    @abstractmethod
    async def stop_job(self, job: Job) -> None:
        """Tell it that nobody waits for this job any more."""

    @abstractmethod
    async def changed(self) -> bool:
        """Wait until it can do more or less than before; False: it has ended."""

    @abstractmethod
    async def close(self, grace_s: float | None = None) -> None:
        """End it once its jobs are done, or after a while."""


class ProcessReplica(Replica):
    """One process that holds the model, and answers one job at a time."""

    async def start(self) -> None:
        """Start the process and wait until its model is there. Raises ReplicaError."""
        try:
            await self._spawn()
        except OSError as error:  # such as too many open files, or no memory
            raise ReplicaError(f"a process for the model cannot be started: {error}") from None
        event = await self._next()
        if event.kind != "ready":
            said = "the model's process ended while it opened the model" if event is GONE else event.data["message"]
            raise ReplicaError(said)
        self.facts = event.data

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = sys.executable, "-m", "budgetvlm.serving.replica_process", str(theirs.fileno())
            self._process = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        await self._send(self._options.for_replicas())

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.returncode is None

    async def _events(self, job: Job) -> AsyncIterator[Event]:
        pixels = [await asyncio.to_thread(image.tobytes) for image in job.images]
        if job.left:
            yield LEFT
            return
        try:
            await self._send(job.header(), pixels)
            event = await self._next()
            while not event.is_last:
                yield event
                event = await self._next()
        except OSError:
            event = GONE
        yield event

    async def stop_job(self, job: Job) -> None:
        """Tell it that nobody waits for this job any more."""
        with contextlib.suppress(OSError):
            await self._send({"kind": "stop", "id": job.id})

    async def changed(self) -> bool:
        """Wait until its process has ended."""
        await self._process.wait()
        return False

    async def close(self, grace_s: float | None = None) -> None:
        """End the process once its job is done, or kill it after a while."""
        with contextlib.suppress(OSError):
            await self._send({"kind": "close", "id": None})
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _send(self, header: dict[str, Any], blocks: list[bytes] | None = None) -> None:
        self._writer.writelines(wire.packed(header, blocks or []))
        await self._writer.drain()

    async def _next(self) -> Event:
        try:
            header, blocks = await wire.read(self._reader)
        except (EOFError, OSError):
            await self._process.wait()
            return GONE
        header.pop("id")
        return Event(header.pop("kind"), {**header, "features": blocks} if blocks else header)
