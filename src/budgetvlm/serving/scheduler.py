"""Who is answered next, at which price, and who is refused: pure logic, with the time handed in.

Jobs that can be in time are started by their deadline, the earliest first. A job is admitted if all that wait can then
still be in time when each is answered about as fast as it can be: that the price sees to. Otherwise it is refused at
once, or, if its caller wants an answer also late, waits until no job that can be in time does: it delays nobody. Those
who set no budget wait their turn as if it were `patience_s`. Times of the clock in seconds, durations in ms.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Literal, Protocol

from budgetvlm.serving.serve_options import Order
from budgetvlm.serving.toll import Toll, Worth

Reason = Literal["queue_full", "too_late", "too_small", "expired"]
LEARNING = 0.1  # share of a finished job in what jobs are known to take, and of an offer in how many are refused
FORGETTING = 1.01  # what jobs take at least may be this much more with each offer; a machine has slow moments
LEAST_RETRY_S, MOST_RETRY_S = 1, 60


class JobFacts(Protocol):
    """What has to be known of a job; ``budget_ms`` may be infinite and counts from the arrival."""

    id: str
    arrived_s: float
    budget_ms: float
    price: float | None
    when_infeasible: str


@dataclass(frozen=True)
class Start:
    """A job that starts now, at a price; ``in_time``: it can be."""

    job: JobFacts
    price: float
    in_time: bool


@dataclass(frozen=True)
class Refusal:
    """Why a job is not answered.

    Attributes:
        reason: "queue_full"; "too_late": it cannot be in time with those who wait; "too_small": not even alone;
            "expired": it was to wait, and its time was over before its turn.
        retry_after_s: when another attempt makes sense; None: never.
    """

    reason: Reason
    retry_after_s: int | None


@dataclass
class _Waiting:
    """A job that waits, or that did.

    Attributes:
        least_s: that it takes. due_s: when it has to be answered. late: it cannot be, and delays nobody any more.
    """

    job: JobFacts
    least_s: float
    due_s: float
    late: bool = False

    def spare_s(self, now_s: float) -> float:
        """The time it has beside the least that it takes."""
        return self.due_s - now_s - self.least_s


class Scheduler:
    """See the module. Not for several threads at once.

    Attributes:
        replicas: that can work, or jobs that can be worked on at once; may change. Without any, nobody waits longer
            than its deadline.
        toll: says the price.

    Args:
        max_waiting: jobs that may wait.
        order: "arrival": first in, first out, and nobody is refused before the queue is full.
        patience_s: how long a job without a budget may wait, and how long a late one may beyond its deadline.
    """

    def __init__(
        self, worth: Worth, *, replicas: int = 1, max_waiting: int = 64, order: Order = "deadline",
        patience_s: float = 10.0,
    ) -> None:  # fmt: skip
        self.toll, self.replicas = Toll(worth), replicas
        self._max_waiting, self._by_deadline, self._patience_s = max_waiting, order == "deadline", patience_s
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[str, tuple[_Waiting, float]] = {}
        self._took_s: float | None = None
        self._refused, self._quickest_s = 0.0, math.inf

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many are under way."""
        return len(self._running)

    def offer(self, job: JobFacts, least_ms: float, now_s: float) -> Refusal | None:
        """Let a job wait for its turn, or say why not.

        Args:
            least_ms: that it takes once it is started, as far as can be told.
        """
        new = _Waiting(job, least_ms / 1e3, job.arrived_s + min(job.budget_ms / 1e3, self._patience_s))
        self._quickest_s = min(new.least_s, FORGETTING * self._quickest_s)
        refusal = self._judge(new, now_s)
        self._refused += LEARNING * ((refusal is not None) - self._refused)
        if refusal is None:
            self._waiting[job.id] = new
            self._note(now_s)
        return refusal

    def expired(self, now_s: float) -> list[tuple[JobFacts, Refusal]]:
        """Take out who is to be told now that there will be no answer."""
        gone = [one for one in self._waiting.values() if now_s > self._expires_s(one)]
        for one in gone:
            del self._waiting[one.job.id]
        return [(one.job, self._refusal("expired", now_s)) for one in gone]

    def next_expiry_s(self) -> float:
        """After which moment `expired` has somebody to tell, if nothing else happens."""
        return min(map(self._expires_s, self._waiting.values()), default=math.inf)

    def next(self, now_s: float) -> Start | None:
        """Start the next job if a replica is free and one waits."""
        for one in self._waiting.values():
            one.late = one.late or (self._by_deadline and one.spare_s(now_s) < 0)
        ready = [one for one in self._waiting.values() if now_s <= self._expires_s(one)]
        if len(self._running) >= self.replicas or not ready:
            return None
        first = min(ready, key=self._turn)
        del self._waiting[first.job.id]
        price = self.price(now_s)
        self._running[first.job.id] = first, now_s
        self._note(now_s)
        return Start(first.job, max(price, first.job.price or 0.0), first.spare_s(now_s) >= 0)

    def price(self, now_s: float) -> float:
        """What one pays that starts now, as those who wait lose by it."""
        return self.toll.price(self._spare_s(now_s), self.replicas, now_s)

    def finished(self, job_id: str, now_s: float, *, answered: bool = True) -> None:
        """A job's replica is free again; ``answered``: what it took is typical of an answer."""
        _, started_s = self._running.pop(job_id)
        if answered:
            took_s = now_s - started_s
            self._took_s = took_s if self._took_s is None else self._took_s + LEARNING * (took_s - self._took_s)
        self._note(now_s)

    def leave(self, job_id: str, now_s: float) -> bool:
        """Forget a job that waits; False: it does not."""
        found = self._waiting.pop(job_id, None) is not None
        self._note(now_s)
        return found

    def _judge(self, new: _Waiting, now_s: float) -> Refusal | None:
        """Why a new job may not wait; one that can be in time takes the place of one that cannot."""
        if self._by_deadline and not self._fits(new, now_s):
            new.late = True
            if new.job.when_infeasible == "reject":
                too_small = new.due_s - new.job.arrived_s < self._quickest_s
                return self._refusal("too_small" if too_small else "too_late", now_s)
        late = [one for one in self._waiting.values() if one.late]
        if len(self._waiting) < self._max_waiting:
            return None
        if new.late or not late:
            return self._refusal("queue_full", now_s)
        late[0].due_s = -math.inf  # it has waited longest, and is told by `expired`
        return None

    def _fits(self, new: _Waiting, now_s: float) -> bool:
        """Whether a new job and all who are due after it can be in time with it."""
        free_s = self._free_s(now_s)
        for one in sorted([*self._in_time(), new], key=lambda one: one.due_s):
            start_s = heapq.heappop(free_s)
            if one.due_s >= new.due_s and one.spare_s(start_s) < 0:
                return False
            heapq.heappush(free_s, start_s + self._pace_s(one))
        return True

    def _free_s(self, now_s: float) -> list[float]:
        """When each replica is expected to be free, as a heap."""
        ends = [
            max(started_s + (self._took_s or self._pace_s(one)), now_s) for one, started_s in self._running.values()
        ]
        free_s = ends + [now_s] * (self.replicas - len(ends))
        heapq.heapify(free_s)
        return free_s or [math.inf]

    def _pace_s(self, one: _Waiting) -> float:
        """What a job takes when others wait for it."""
        return one.least_s * self.toll.worth.pace

    def _in_time(self) -> list[_Waiting]:
        return [one for one in self._waiting.values() if not one.late]

    def _turn(self, one: _Waiting) -> tuple[bool, float]:
        return one.late, one.due_s if self._by_deadline and not one.late else one.job.arrived_s

    def _expires_s(self, one: _Waiting) -> float:
        """After which moment a job is not answered any more."""
        patience_s = self._patience_s if self.replicas and one.job.when_infeasible != "reject" else 0.0
        return one.due_s - one.least_s + patience_s if self._by_deadline else math.inf

    def _spare_s(self, now_s: float) -> list[float]:
        """The spare time of those who wait and can be in time."""
        return [one.spare_s(now_s) for one in self._in_time()]

    def _note(self, now_s: float) -> None:
        under_way = [one.spare_s(now_s) for one, _ in self._running.values()]
        all_busy = len(under_way) >= self.replicas  # otherwise who comes is not delayed
        self.toll.note(self._spare_s(now_s) + under_way if all_busy else [], now_s)

    def _refusal(self, reason: Reason, now_s: float) -> Refusal:
        """With the time in which the queue is worked off, longer where most are refused."""
        if reason == "too_small":
            return Refusal(reason, None)
        work_s = sum(map(self._pace_s, self._waiting.values())) + sum(end - now_s for end in self._free_s(now_s))
        wait_s = work_s / max(self.replicas, 1) / max(1 - self._refused, LEARNING)
        return Refusal(reason, math.ceil(max(LEAST_RETRY_S, min(wait_s, MOST_RETRY_S))))
