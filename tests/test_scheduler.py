"""The scheduler, on planted jobs and a clock that is moved by hand."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from budgetvlm.controller.price_curve import AtPrice, PriceCurve
from budgetvlm.serving.scheduler import Scheduler
from budgetvlm.serving.toll import MOST_PRESSING, Toll, Worth

LEAST_MS, FULL_MS = 20.0, 100.0
WORTH = Worth(reference_ms=FULL_MS, default_price=0.01, highest_price=3.0, worth=0.3, pace=1.0)


@dataclass(frozen=True)
class Job:
    id: str
    arrived_s: float = 0.0
    budget_ms: float = 100.0
    price: float | None = None
    when_infeasible: str = "reject"


def scheduler(replicas: int = 1, worth: Worth = WORTH, **options) -> Scheduler:
    return Scheduler(worth, replicas=replicas, **options)


def offer(it: Scheduler, *jobs: Job, at: float = 0.0) -> list[str | None]:
    """Offer jobs, and say why each was refused."""
    found = [it.offer(job, LEAST_MS, at) for job in jobs]
    return [refusal and refusal.reason for refusal in found]


def started(it: Scheduler, at: float = 0.0) -> str | None:
    start = it.next(at)
    return start and start.job.id


# ---- order and admission


def test_the_earliest_deadline_is_next_whoever_came_first():
    it = scheduler()
    offer(
        it, Job("b", budget_ms=200), Job("none", budget_ms=math.inf), Job("a", budget_ms=100), Job("c", budget_ms=300)
    )
    order = []
    while name := started(it, at=0.0):
        order.append(name)
        it.finished(name, 0.0)
    assert order == ["a", "b", "c", "none"]


def test_first_in_first_out_where_that_is_asked_for_refuses_nobody_until_the_queue_is_full():
    it = scheduler(order="arrival", max_waiting=2)
    assert offer(it, Job("a", budget_ms=1), Job("b", 0.001, budget_ms=0.5), Job("c")) == [None, None, "queue_full"]
    assert it.expired(5.0) == []
    assert started(it, at=5.0) == "a"


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_as_many_are_admitted_as_can_be_in_time(replicas):
    it = scheduler(replicas)  # each takes 20 of 100 ms
    assert offer(it, *[Job(str(k)) for k in range(5 * replicas + 2)]) == [None] * 5 * replicas + ["too_late"] * 2


def test_one_who_would_make_another_late_is_refused_although_it_could_be_in_time():
    it = scheduler()
    assert offer(it, *[Job(str(k)) for k in range(5)], Job("urgent", budget_ms=30)) == [None] * 5 + ["too_late"]
    assert offer(it, Job("patient", budget_ms=121)) == [None]  # it is due after them


def test_what_is_under_way_counts():
    it = scheduler()
    offer(it, Job("long", budget_ms=1000))
    it.next(0.0)
    it.finished("long", 0.09)  # jobs take 90 ms
    offer(it, Job("next", 0.09, 1000), at=0.09)
    it.next(0.09)
    assert offer(it, Job("urgent", 0.1, 90), Job("other", 0.1, 110), at=0.1) == ["too_late", None]


def test_an_impossible_budget_is_refused_for_good():
    refusal = scheduler().offer(Job("a", budget_ms=19), LEAST_MS, 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("too_small", None)


def test_what_only_a_slow_moment_keeps_out_may_come_again():
    it = scheduler()
    offer(it, Job("a"))
    refusal = it.offer(Job("b", budget_ms=30), 3 * LEAST_MS, 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("too_late", 1)


def test_a_job_that_starts_too_late_is_said_to_be():
    it = scheduler()
    offer(it, Job("a", budget_ms=10, when_infeasible="fastest"))
    start = it.next(0.0)
    assert start is not None
    assert not start.in_time


# ---- those who cannot be in time delay nobody


def test_late_jobs_wait_until_nobody_else_does():
    it = scheduler()
    offer(it, *[Job(f"late{k}", budget_ms=5, when_infeasible="fastest") for k in range(3)], Job("a"), Job("b"))
    order = []
    for step in range(5):
        order.append(started(it, at=step * 0.02))
        it.finished(order[-1], (step + 1) * 0.02)
    assert order == ["a", "b", "late0", "late1", "late2"]


def test_late_jobs_neither_keep_others_out_nor_raise_the_price():
    alone, it = scheduler(), scheduler()
    offer(it, *[Job(f"late{k}", budget_ms=5, when_infeasible="best_effort") for k in range(20)])
    jobs = [Job(str(k)) for k in range(6)]
    assert offer(it, *jobs) == offer(alone, *jobs) == [None] * 5 + ["too_late"]
    first, same = it.next(0.0), alone.next(0.0)
    assert first is not None
    assert same is not None
    assert first.price == same.price


def test_what_became_late_while_it_waited_is_answered_by_its_policy():
    it = scheduler(patience_s=1.0)
    offer(it, Job("a"), Job("b", when_infeasible="fastest"))
    assert it.expired(0.079) == []
    assert [(job.id, refusal.reason) for job, refusal in it.expired(0.081)] == [("a", "expired")]
    start = it.next(0.081)
    assert start is not None
    assert (start.job.id, start.in_time) == ("b", False)


def test_a_job_to_be_refused_is_never_started():
    it = scheduler()
    offer(it, Job("a"))
    assert it.next(0.2) is None
    assert len(it.expired(0.2)) == 1
    assert it.num_waiting == 0


def test_one_who_can_be_in_time_takes_the_place_of_one_who_cannot():
    it = scheduler(max_waiting=2)
    late = [Job(f"late{k}", budget_ms=5, when_infeasible="fastest") for k in range(3)]
    assert offer(it, *late) == [None, None, "queue_full"]
    assert offer(it, Job("a")) == [None]
    assert [job.id for job, _ in it.expired(0.0)] == ["late0"]
    assert offer(it, Job("b")) == [None]
    assert [job.id for job, _ in it.expired(0.0)] == ["late1"]
    assert offer(it, Job("c")) == ["queue_full"]
    assert it.num_waiting == 2


def test_nobody_waits_for_ever_under_a_flood_of_urgent_jobs():
    it, told = scheduler(patience_s=1.0), {}
    offer(it, Job("late", budget_ms=5, when_infeasible="fastest"), Job("none", budget_ms=math.inf))
    for step in range(500):
        now = step * 0.02
        offer(it, Job(f"{step}", now, 40), at=now)
        told |= {job.id: now for job, _ in it.expired(now)}
        if name := started(it, at=now):
            told[name] = now
            it.finished(name, now + 0.02)
    assert told["none"] <= 1.0  # of the patience, as if it were its budget
    assert told["late"] <= 1.1


# ---- the queue


def test_the_queue_is_bounded():
    it = scheduler(max_waiting=3)
    jobs = [Job(str(k), budget_ms=math.inf) for k in range(5)]
    assert offer(it, *jobs) == [None, None, None, "queue_full", "queue_full"]


def test_who_leaves_is_forgotten():
    it = scheduler()
    offer(it, Job("a"), Job("b"))
    assert it.leave("a", 0.0)
    assert not it.leave("a", 0.0)
    assert started(it) == "b"


def test_no_more_jobs_start_than_there_are_replicas():
    it = scheduler(2)
    offer(it, *[Job(str(k)) for k in range(4)])
    assert [started(it) for _ in range(3)] == ["0", "1", None]
    it.replicas = 1  # one died
    it.finished("0", 0.02)
    assert it.next(0.02) is None
    it.finished("1", 0.02)
    assert started(it, at=0.02) == "2"


def test_without_a_replica_nobody_is_promised_anything():
    it = scheduler(0)
    assert offer(it, Job("a"), Job("b", when_infeasible="fastest")) == ["too_late", None]
    assert it.next(0.0) is None


def retry_s(waiting: int, refused: int) -> int:
    it = scheduler(max_waiting=waiting)
    offer(it, *[Job(str(k), budget_ms=math.inf) for k in range(waiting)])
    for k in range(refused):
        refusal = it.offer(Job(f"more{k}", budget_ms=math.inf), LEAST_MS, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s is not None
    return refusal.retry_after_s


def test_retry_after_is_the_time_in_which_the_queue_is_worked_off_and_longer_where_most_are_refused():
    assert retry_s(3, refused=1) == 1  # 60 ms, and no header says less than a second
    assert retry_s(300, refused=1) == 6  # 300 of 20 ms
    assert 6 < retry_s(300, refused=10) < 60
    assert retry_s(400, refused=1000) == 60


# ---- the price


def test_the_price_where_nobody_waits_is_the_default_or_the_callers():
    it = scheduler()
    offer(it, Job("a"))
    assert it.next(0.0).price == 0.01
    it.finished("a", 0.0)
    offer(it, Job("b", price=0.5))
    assert it.next(0.0).price == 0.5


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_price_is_what_those_who_wait_lose(replicas):
    it = scheduler(replicas)
    offer(it, Job("a", budget_ms=50), Job("b", budget_ms=120), Job("c", budget_ms=220))
    # those who wait on have 100 and 200 ms to spare and lose 0.3 times 100 / 100 + 100 / 200
    assert it.next(0.0).price == pytest.approx(0.3 * 1.5 / replicas)


def test_the_price_has_a_ceiling_which_a_caller_may_exceed():
    it = scheduler(max_waiting=100)
    offer(it, Job("mine", budget_ms=50, price=7.0), Job("a", budget_ms=80))
    offer(it, *[Job(str(k), budget_ms=2000) for k in range(80)])
    prices = []
    for _ in range(5):
        prices.append(it.next(0.0).price)
        it.finished(it_id(it), 0.0)
    assert prices[0] == 7.0
    assert max(prices[1:]) <= 3.0


def it_id(it: Scheduler) -> str:
    return next(iter(it._running))


def test_those_who_were_there_lately_are_expected_again():
    toll = Toll(WORTH)
    toll.note([0.1, 0.1], 0.0)  # pressing by 2
    mean = 2 * (1 - math.exp(-1))
    assert toll.price([], 1, 3.0) == pytest.approx(0.3 * mean)  # the memory is 30 full latencies
    toll.note([], 3.0)
    assert toll.price([], 1, 6.0) == pytest.approx(0.3 * mean * math.exp(-1))
    assert toll.price([], 1, 600.0) == 0.01


@pytest.mark.parametrize("replicas", [1, 2])
def test_who_comes_while_a_replica_is_free_is_not_delayed(replicas):
    it = scheduler(replicas)
    offer(it, Job("a", budget_ms=500 + LEAST_MS))
    it.next(0.0)
    it.finished("a", 3.0)  # it was alone for as long as the memory is
    mean = (1 - math.exp(-1)) * FULL_MS / 500
    assert it.price(3.0) == pytest.approx(0.3 * mean if replicas == 1 else 0.01)


def test_one_that_is_nearly_late_presses_no_more_than_others():
    assert Toll(WORTH).pressing([1e-9, -1.0]) == 2 * MOST_PRESSING


def test_what_time_is_worth_is_read_from_the_price_curve():
    points = ((0.1, 80.0, 0.9), (1.0, 40.0, 0.8), (2.0, 20.0, 0.5), (9.0, 10.0, 0.2))
    curve = PriceCurve(tuple(AtPrice(price, ms, 0.0, accuracy, 0.0) for price, ms, accuracy in points), 10)
    worth = Worth.of(curve, 100.0, 0.02)
    # 0.5 / 20 is the most accuracy for a ms, twice the fastest's time; 0.7 is gained by a time 8 times as long
    assert worth == Worth(100.0, 0.02, 2.0, pytest.approx(0.7 / math.log(8)), 2.0)
    # with 30 ms beside the model 0.8 / 70 is the most, and takes 70 ms where the fastest takes 40
    assert Worth.of(curve, 100.0, 0.02, own_ms=30.0) == replace(worth, highest_price=1.0, pace=70 / 40)


@pytest.mark.parametrize("curve", [None, PriceCurve((AtPrice(1.0, 10.0, 0.0, 0.5, 0.0),), 10)])
def test_without_a_curve_that_says_it_there_are_usual_values(curve):
    assert Worth.of(curve, 50.0, 0.02) == Worth(50.0, 0.02)


# ---- streams of jobs, served at planted times


def serve(it: Scheduler, load: float, seconds: float, seed: int = 0, begin_s: float = 0.0) -> dict[str, float]:
    """Poisson arrivals at a multiple of what the full setting could answer; a higher price makes answers quicker."""
    random, replicas = np.random.default_rng(seed), it.replicas
    gaps = random.exponential(FULL_MS / 1e3 / load / replicas, int(3 * seconds * load * replicas * 1e3 / FULL_MS))
    arrivals = begin_s + np.cumsum(gaps)
    arrivals = arrivals[arrivals < begin_s + seconds]
    jobs = [Job(f"{begin_s}-{k}", at, random.uniform(50, 200)) for k, at in enumerate(arrivals.tolist())]
    events = [(job.arrived_s, k, job) for k, job in enumerate(jobs)]
    late = admitted = 0
    prices, right = [], 0.0
    while events:
        now, kind, job = heapq.heappop(events)
        if kind < 0:
            it.finished(job.id, now)
            late += now > job.arrived_s + job.budget_ms / 1e3
        else:
            admitted += it.offer(job, 1.1 * LEAST_MS, now) is None
        late += len(it.expired(now))
        while start := it.next(now):
            left_ms = start.job.budget_ms - (now - start.job.arrived_s) * 1e3
            ms = 0.8 * FULL_MS * 0.25 ** min(start.price / WORTH.highest_price, 1.0)
            ms = max(LEAST_MS, min(ms, 0.9 * left_ms))
            right += math.log(ms / LEAST_MS) / math.log(FULL_MS / LEAST_MS)
            heapq.heappush(events, (now + ms * random.uniform(0.9, 1.1) / 1e3, -1, start.job))
            prices.append(start.price)
    return {"late": late / admitted, "admitted": admitted / len(jobs), "price": float(np.mean(prices)),
            "right": right}  # fmt: skip


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_price_rises_with_the_load_and_returns(replicas):
    it = scheduler(replicas)
    found = [serve(it, load, 20, begin_s=begin) for load, begin in ((0.2, 0), (1, 20), (4, 40), (0.2, 60), (0.2, 80))]
    calm, busy, flooded, _, after = (one["price"] for one in found)
    assert calm < busy / 2 < busy < flooded / 2
    assert after == pytest.approx(calm, rel=0.3)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("load", [0.5, 2, 4, 16])
def test_who_is_admitted_is_in_time(load, replicas):
    found = serve(scheduler(replicas), load, 20)
    assert found["late"] < 0.065
    assert found["admitted"] > (0.15 if load == 16 else 0.7)  # at 16, one in 3 could be answered by the fastest setting


def test_a_burst_is_taken_in_by_a_higher_price():
    it, jobs = scheduler(max_waiting=100), [Job(str(k), budget_ms=401) for k in range(30)]
    assert offer(it, *jobs).count(None) == 20  # of 20 ms each
    prices = []
    for _ in range(20):
        start = it.next(0.0)
        prices.append(start.price)
        it.finished(start.job.id, 0.0)
    assert prices[0] == pytest.approx(0.3 * 19 * 100 / 381)
    assert prices == sorted(prices, reverse=True)
    assert prices[-1] == 0.01


@pytest.mark.parametrize("load", [2, 4])
def test_fewer_are_late_than_at_a_price_of_0(load):
    """With a price of 0 everybody takes what the budget allows, and those behind find no time left."""
    ours, free = serve(scheduler(), load, 30), serve(scheduler(worth=WORTH.fixed(0.0)), load, 30)
    assert ours["late"] < free["late"] / 2
