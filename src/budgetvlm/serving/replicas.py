"""A replica as the server sees it: a process of its own, started, watched, and given one job at a time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

from budgetvlm.errors import BudgetVLMError
from budgetvlm.serving import wire
from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.serve_options import ServeOptions

GONE = Event("error", {"message": "the model's process ended while it worked on this request", "type": "ReplicaDied"})
LEFT = Event("error", {"message": "the client left", "type": "ClientLeft"})


class ReplicaError(BudgetVLMError):
    """A replica that cannot open its model."""


class Replica:
    """One process that holds the model.

    Attributes:
        facts: what it last said of itself: "fastest_ms", the least that a small request takes, "worth", of time, and
            "model", what clients may know of it.
        retired: it gets no further job, because a newer one takes its place.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options, self.retired = options, False
        self.facts: dict[str, Any] = {}

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
        options = self._options
        await self._send({
            "model_path": options.model_path, "checkpoint": options.checkpoint and str(options.checkpoint),
            "device": options.device, "num_threads": options.num_threads,
            "allow_other_model": options.allow_other_model, "state_dir": options.state_dir and str(options.state_dir),
            "full_only": options.full_only, "mean_budget_ms": options.mean_budget_ms,
        })  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.returncode is None

    async def answer(self, job: Job) -> AsyncIterator[Event]:
        """Hand a job over and pass on what comes of it; the last event is the answer or an error."""
        pixels = [await asyncio.to_thread(image.tobytes) for image in job.images]
        if job.left:
            yield LEFT
            return
        try:
            await self._send(job.header(), pixels)
            while True:
                event = await self._next()
                if self.facts.keys() <= event.data.keys():
                    self.facts = {name: event.data[name] for name in self.facts}
                yield event
                if event.is_last:
                    return
        except OSError:
            yield GONE

    async def stop_job(self, job: Job) -> None:
        """Tell it that nobody waits for this job any more."""
        with contextlib.suppress(OSError):
            await self._send({"kind": "stop", "id": job.id})

    async def ended(self) -> None:
        """Wait until its process has ended."""
        await self._process.wait()

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
            header, _ = await wire.read(self._reader)
        except (EOFError, OSError):
            await self._process.wait()
            return GONE
        header.pop("id")
        return Event(header.pop("kind"), header)
