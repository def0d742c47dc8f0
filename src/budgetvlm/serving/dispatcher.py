"""Brings jobs to replicas: what the scheduler says, done with asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from budgetvlm._io import time_text, time_text_up
from budgetvlm.feedback.request_store import RequestStore
from budgetvlm.guard.spending import Spending
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.background_update import Updates
from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.kept_requests import kept
from budgetvlm.serving.lifecycle import Keeper
from budgetvlm.serving.replicas import LEFT, Health, ProcessReplica, Replica, ReplicaError
from budgetvlm.serving.scheduler import Refusal, Scheduler
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.shadows import IDLE_S, Shadows
from budgetvlm.serving.toll import Worth
from budgetvlm.serving.way_back import WayBack

_log = logging.getLogger(__name__)
EXPIRY_S = 0.001  # after its moment, a job's time is surely over
REHEARSAL_PAUSE_S = 1.0  # between two of them
CLOSE_S = 5.0  # what a replica has to finish, once nobody waits for an answer any more
REFUSED = {
    "queue_full": (429, "too many requests wait; ask again later"),
    "too_late": (503, "the budget cannot be kept with those who wait; ask again later, or give more time"),
    "expired": (503, "the budget was over before its turn; ask again later, or give more time"),
    "too_small": (
        400,
        "no setting is sure to keep {budget}, the fastest may take {least}; give more time, or let the answer be late "
        "with when_infeasible",
    ),
}  # status and message
DOWN = Event("error", {"message": "the model is not there now; ask again", "type": "NotReady"})
DEAD = Health("", up=False, in_flight=0, failures=0)


class Ticket:
    """A job under way, for the one who waits for it.

    Attributes:
        job: what is asked.

    Args:
        forget: called when it leaves the queue by itself.
    """

    def __init__(self, job: Job, forget: Callable[[Job], None] = lambda job: None) -> None:
        self.job, self._forget = job, forget
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
            self._forget(self.job)
            self.put(LEFT)


class Dispatcher:
    """Holds the replicas and the jobs that wait for one.

    Attributes:
        scheduler: says who is next, and at which price.
        spending: holds the mean budget, where there is one.
        store: keeps what was served; None: nothing is kept.
        reloads: how often the controller was read anew.
        updates: of the controller in the background; None: there are none.

    Args:
        make_replica: makes other replicas, for tests.

    Raises:
        ConfigError: the store cannot be opened.
    """

    def __init__(self, options: ServeOptions, make_replica: Callable[[ServeOptions], Replica] | None = None) -> None:
        self._options, make = options, make_replica or _kind_of(options)
        self.store = RequestStore(options.log_requests, options.store_mb) if options.log_requests else None
        self._shadows = Shadows(options.shadow, self.store) if self.store and options.shadow else None
        self._shadowing: dict[str, tuple[Replica, Job]] = {}
        self._waiting: dict[str, Ticket] = {}
        self._changed = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self.spending: Spending | None = None
        self.scheduler = Scheduler(Worth(1.0), replicas=0, max_waiting=options.max_queue, order=options.order)
        self._rehearse_s, self._way_back = 0.0, WayBack()
        self._reloading, self.reloads = asyncio.Lock(), 0
        self.updates: Updates | None = None
        keepers = range(options.replicas)
        self._keepers = [Keeper(lambda: make(options), self._work, self._replicas_changed) for _ in keepers]
        self._started, self._stopping = False, set[asyncio.Future[None]]()

    @property
    def ready(self) -> bool:
        """Whether a replica could take a job."""
        return self.capacity > 0

    @property
    def capacity(self) -> int:
        """How many jobs could be worked on at once."""
        return sum(keeper.replica.capacity for keeper in self._keepers if keeper.replica)

    @property
    def replicas(self) -> list[Health]:
        """How each copy of the model is."""
        return [
            one._replace(name=one.name or str(place), failures=one.failures + keeper.restarts)
            for place, keeper in enumerate(self._keepers)
            for one in (keeper.replica.health() if keeper.replica else [DEAD])
        ]

    @property
    def restarts(self) -> int:
        """How often a replica died and another one was started."""
        return sum(keeper.restarts for keeper in self._keepers)

    @property
    def model(self) -> dict[str, Any]:
        """What clients may know of the model: its knob space and its fingerprint; nothing without a replica."""
        return next((facts["model"] for facts in self._facts), {})

    @property
    def versions(self) -> dict[str, Any]:
        """Which version of the controller the replicas serve, and which one is on trial."""
        return next((facts["versions"] for facts in self._facts if "versions" in facts), {})

    @property
    def price(self) -> float:
        """What a latency of the full setting has to buy now, in accuracy."""
        return self.scheduler.price(time.perf_counter())

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return self.scheduler.num_waiting

    async def start(self) -> None:
        """Start the replicas, if they are not yet. Raises ReplicaError."""
        if not self._started:
            self._started = True
            await asyncio.gather(*[keeper.start() for keeper in self._keepers])
            self._replicas_changed()
            if self._options.update_every:
                self.updates = Updates(self._options, lambda: self.versions, self.reload)

    async def reload(self) -> None:
        """Have each replica replaced by one that reads the controller anew. Raises ReplicaError: nothing changed."""
        async with self._reloading:
            try:
                for keeper in self._keepers:
                    await keeper.exchange()
                self.reloads += 1
                _log.warning("the controller was read anew")
            except ReplicaError as error:
                _log.error("the controller was not read anew, the one before goes on: %s", error)
                raise

    async def close(self) -> None:
        """Stop the replicas; who still waits for one is told."""
        if self.updates:
            await self.updates.close()
        await asyncio.gather(*[keeper.close(CLOSE_S) for keeper in self._keepers])
        for ticket in list(self._waiting.values()):
            self._forget(ticket.job)
            ticket.put(DOWN)
        if self.store:
            self.store.close()

    def submit(self, job: Job) -> Ticket:
        """Let a job wait for its turn. Raises APIError."""
        if not self.ready:
            raise APIError(503, DOWN.data["message"], code="not_ready", retry_after_s=self._start_s)
        refusal = self.scheduler.offer(job, self._least_ms, time.perf_counter())
        if refusal:
            self._rehearse()
            status, message = REFUSED[refusal.reason]
            message = message.format(budget=time_text(job.budget_ms), least=time_text_up(self._least_ms))
            raise APIError(status, message, code=refusal.reason, retry_after_s=refusal.retry_after_s)
        ticket = self._waiting[job.id] = Ticket(job, self._forget)
        self._told_expired()
        self._changed.set()
        for replica, shadow in self._shadowing.values():
            shadow.left = True
            self._stopping.add(task := asyncio.ensure_future(replica.stop_job(shadow)))
            task.add_done_callback(self._stopping.discard)
        return ticket

    @property
    def _start_s(self) -> float:
        """How long a replica takes to start."""
        return max(keeper.start_s for keeper in self._keepers)

    def _replicas_changed(self) -> None:
        """Wake those who wait for jobs; without a replica, tell the jobs that cannot wait for one."""
        self.scheduler.replicas = self.capacity
        self._learn_worth()
        if not self.ready:
            until_s = time.perf_counter() + self._start_s
            for ticket in [ticket for ticket in self._waiting.values() if ticket.job.deadline_s <= until_s]:
                self._forget(ticket.job)
                ticket.put(DOWN)
        self._told_expired()
        self._changed.set()

    async def _work(self, replica: Replica) -> None:
        """Give one slot of a replica job after job, until it is dead or to go."""
        while ticket := await self._take(replica):
            ticket.replica, ticket.started_s = replica, time.perf_counter()
            answered = False
            async for event in replica.answer(ticket.job):
                if answered := event.kind == "answer":
                    self._arrived(ticket.job, event.data)
                ticket.put(event)
            ticket.replica = None
            self.scheduler.finished(ticket.job.id, time.perf_counter(), answered=answered)
            self._learn_worth()

    def _arrived(self, job: Job, data: dict[str, Any]) -> None:
        """Count what an answer took until now, and keep what was seen."""
        answer = data["answer"]
        self._way_back.arrived(job, answer)
        if self.store and "seen" in data and not job.left:
            self.store.add(partial(kept, job, answer, data["seen"], data["features"], self._options.store_questions))
            if self._shadows:
                self._shadows.offer(job, data)
        if self.spending:
            self.spending.add(answer["latency_ms"])

    async def _take(self, replica: Replica) -> Ticket | None:
        """Wait for the next job; None: the replica is dead or to go."""
        while replica.alive and not replica.retired:
            self._told_expired()
            if start := self.scheduler.next(time.perf_counter()):
                ticket = self._waiting.pop(start.job.id)
                ticket.job.price, ticket.job.reserved_ms = start.price, self._way_back.reserve_ms
                return ticket
            self._changed.clear()
            await self._idled(replica)
        return None

    async def _idled(self, replica: Replica) -> None:
        """Wait until something changes; a shadow answer is made once there was nothing to do for a while."""
        try:
            async with asyncio.timeout(IDLE_S if self._shadows and self._shadows.any_waits else None):
                await self._changed.wait()
        except TimeoutError:
            if self._shadows and self._shadows.any_waits and self._idle():
                await self._shadows.answer_one(lambda job: self._shadowed(replica, job), self._idle)

    async def _shadowed(self, replica: Replica, job: Job) -> AsyncIterator[Event]:
        """Have a replica answer a job that is stopped as soon as somebody comes."""
        self._shadowing[job.id] = replica, job
        try:
            async for event in replica.answer(job):
                yield event
        finally:
            del self._shadowing[job.id]

    def _idle(self) -> bool:
        return not self.waiting + self.scheduler.num_running

    def _rehearse(self) -> None:
        """Have a replica that has nothing to do answer something small: refusals do not show that it is quick again."""
        now_s, idle = time.perf_counter(), not self.scheduler.num_running + self.waiting
        if idle and now_s >= self._rehearse_s:
            self._rehearse_s = now_s + REHEARSAL_PAUSE_S
            self.submit(Job(f"rehearsal-{now_s}", [], [], now_s, kind="rehearsal"))

    @property
    def _facts(self) -> list[dict[str, Any]]:
        """What the replicas say of themselves."""
        return [keeper.replica.facts for keeper in self._keepers if keeper.replica]

    @property
    def _least_ms(self) -> float:
        """What a job takes at least, by what the replicas say."""
        return max(facts["fastest_ms"] for facts in self._facts) + self._way_back.reserve_ms

    def _learn_worth(self) -> None:
        """Take over what time is worth, which changes with the machine's speed and with the controller."""
        if self._facts:
            worth = Worth(**self._facts[0]["worth"])
            worth = worth if self._options.price is None else worth.fixed(self._options.price)
            if mean_ms := self._options.mean_budget_ms:  # it begins at the price that the replica solved
                self.spending = self.spending or Spending(mean_ms, worth.default_price, settled=True)
                worth = replace(worth, default_price=self.spending.price)
            self.scheduler.toll.worth = replace(worth, pace=1.0) if self._options.full_only else worth

    def _forget(self, job: Job) -> None:
        """Take a job out of the queue."""
        self.scheduler.leave(job.id, time.perf_counter())
        self._waiting.pop(job.id, None)

    def _told_expired(self) -> None:
        """Tell those whose time is over, and come back when the next one's is."""
        now_s = time.perf_counter()
        for job, refusal in self.scheduler.expired(now_s):
            self._waiting.pop(job.id).put(_refused(refusal))
        if self._expiry:
            self._expiry.cancel()
        delay_s = self.scheduler.next_expiry_s() - now_s
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(delay_s + EXPIRY_S, self._told_expired) if delay_s < math.inf else None


def _kind_of(options: ServeOptions) -> Callable[[ServeOptions], Replica]:
    """Which kind of replica serves such a model."""
    if not options.has_engines:
        return ProcessReplica
    from budgetvlm.serving.engine_slots import EngineSlots  # brings PyTorch into the server's process

    return EngineSlots


def _refused(refusal: Refusal) -> Event:
    status, message = REFUSED[refusal.reason]
    told = {"message": message, "type": refusal.reason, "status": status, "retry_after_s": refusal.retry_after_s}
    return Event("error", told)
