"""Keeps replicas running: another one is started where one died, and a newer one takes the place of an old one."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from budgetvlm.serving.replicas import Replica, ReplicaError

LONGEST_PAUSE_S = 30.0
TELLING_S = 1.0  # that telling who waits takes at most, when all is closed
_log = logging.getLogger(__name__)


class Keeper:
    """One place that is to hold a working replica.

    Attributes:
        replica: the one that is there. restarts: how often one died.
        start_s: how long the last one took to start; infinite where it did not.

    Args:
        make: makes a replica that is not started yet.
        work: gives one jobs, one after another, until it is dead or retired.
        changed: called when a replica died, is to go, is there, or can do more or less than before.
    """

    def __init__(
        self, make: Callable[[], Replica], work: Callable[[Replica], Awaitable[None]], changed: Callable[[], None]
    ) -> None:
        self._make, self._work, self._changed = make, work, changed
        self.replica: Replica | None = None
        self._newer: Replica | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self.restarts, self.start_s, self._closed = 0, 0.0, False

    async def start(self) -> None:
        """Start the first one. Raises ReplicaError."""
        self.replica = await self._started()
        self._task = asyncio.create_task(self._keep())

    async def exchange(self) -> None:
        """Start a newer one; the old one finishes its job and ends. Raises ReplicaError: the old one stays."""
        newer = await self._started()
        unused, self._newer = self._newer, newer
        if self.replica:
            self.replica.retired = True
        self._changed()
        if unused:  # the old one still works on its job
            await unused.close()

    async def close(self, grace_s: float) -> None:
        """End it once its jobs are done, or after a while; who waits for them is told."""
        self._closed = True
        replicas = [replica for replica in (self.replica, self._newer) if replica]
        for replica in replicas:
            replica.retired = True
        if not replicas and self._task:  # it waits for another one, which nobody needs now
            self._task.cancel()
        self._changed()
        await asyncio.gather(*[replica.close(grace_s) for replica in replicas], *self._leaving)
        self._changed()
        if self._task:
            await asyncio.wait([self._task], timeout=TELLING_S)
            self._task.cancel()

    async def _keep(self) -> None:
        while True:
            if self.replica:
                self.replica.retired |= self._newer is not None
                watching = asyncio.create_task(self._watch(self.replica))
                try:
                    await asyncio.gather(*[self._work(self.replica) for _ in range(self.replica.slots)])
                except Exception:  # ours; without a replica that is known to work, nobody would be answered any more
                    _log.exception("a replica is replaced after a mistake of the server")
                    await self.replica.close(0)
                watching.cancel()
            if self._closed:
                return
            await self._replace()
            self._changed()

    async def _watch(self, replica: Replica) -> None:
        """Say when it can do more or less, or dies, also while it has nothing to do."""
        while await replica.changed():
            self._changed()
        self._changed()

    async def _replace(self) -> None:
        """Put the newer one into the place, or start one anew; that is tried again until it works."""
        old, self.replica, pause_s = self.replica, None, 1.0
        if old and old.retired and old.alive:
            closing = asyncio.create_task(old.close())
            self._leaving.add(closing)
            closing.add_done_callback(self._leaving.discard)
        elif old:
            self.restarts += 1
            self._changed()
            _log.error("a replica ended unexpectedly; another one is started")
        while not self.replica:
            if self._newer:
                self.replica, self._newer = self._newer, None
                return
            try:
                self.replica = await self._started()
            except ReplicaError as error:
                _log.error("a replica cannot be started, tried again in %g s: %s", pause_s, error)
                self.start_s = math.inf
                self._changed()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _started(self) -> Replica:
        replica, begin = self._make(), time.perf_counter()
        await replica.start()
        self.start_s = time.perf_counter() - begin
        return replica
