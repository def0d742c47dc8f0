"""The queue as clients see it: who is refused, in which order the others are answered, at which price. No model."""

import re
import time

import pytest

from budgetvlm.errors import ConfigError
from budgetvlm.serving.jobs import Job
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.way_back import WayBack
from tests.fake_replicas import FakeReplica, Served, in_background, served, until

WORK_S = 0.3  # of a request


def busy(server, **options):
    """Have the replica work on something for `WORK_S`."""
    thread, _ = in_background(lambda: server.chat(**options))
    until(lambda: server.jobs.scheduler.num_running)
    return thread


@pytest.fixture
def server():
    with served(word_s=WORK_S / 3, max_queue=3) as server:
        yield server


def test_they_are_answered_by_their_deadlines(server):
    threads = [busy(server)]
    for count, budget_ms in enumerate([9000, None, 5000], start=1):
        threads.append(in_background(lambda ms=budget_ms: server.chat(latency_budget_ms=ms))[0])
        until(lambda number=count: server.jobs.waiting == number)
    for thread in threads:
        thread.join(5)
    inf = float("inf")
    assert [job.budget_ms for job in server.replicas[0].begun] == [inf, 5000, 9000, inf]


def test_who_cannot_be_in_time_is_refused_at_once_where_that_is_asked_for(server):
    busy(server).join(5)  # it is known now how long an answer takes
    busy(server)
    status, headers, document = server.chat(latency_budget_ms=WORK_S * 500, when_infeasible="reject")
    assert (status, document["error"]["code"]) == (503, "too_late")
    assert int(headers["retry-after"]) >= 1
    assert server.jobs.waiting == 0


def test_who_waited_in_vain_is_told_when_its_time_is_over_although_the_replica_still_works(server):
    busy(server)
    budget_ms = WORK_S * 500  # of an answer the queue knows nothing yet
    status, headers, document = server.chat(latency_budget_ms=budget_ms, when_infeasible="reject")
    assert server.jobs.scheduler.num_running == 1
    assert (status, document["error"]["code"]) == (503, "expired")
    assert int(headers["retry-after"]) >= 1


def test_others_get_their_answer_late(server):
    busy(server)
    status, _, document = server.chat(latency_budget_ms=WORK_S * 500)
    assert (status, document["budgetvlm"]["budget_met"]) == (200, False)


def test_a_budget_that_nothing_keeps_is_a_mistake_of_the_request(server):
    status, headers, document = server.chat(latency_budget_ms=0.5, when_infeasible="reject")
    assert (status, document["error"]["code"]) == (400, "too_small")
    assert re.match(
        r"no setting is sure to keep 0\.50* ms, the fastest may take [\d.]+ ms; ", document["error"]["message"]
    )
    assert "retry-after" not in headers


def test_an_idle_replica_is_asked_again_how_fast_it_is(server):
    replica = server.replicas[0]
    replica.facts = {**replica.facts, "fastest_ms": 10_000.0}  # a slow moment, that no request would end
    for _ in range(2):
        assert server.chat(latency_budget_ms=100, when_infeasible="reject")[0] == 400
    until(lambda: not server.jobs.scheduler.num_running + server.jobs.waiting)
    assert [job.kind for job in replica.begun] == ["rehearsal"]


def test_a_full_queue_refuses(server):
    busy(server)
    waiting = [in_background(server.chat) for _ in range(3)]
    until(lambda: server.jobs.waiting == 3)
    status, headers, document = server.chat()
    assert (status, document["error"]["code"], document["error"]["type"]) == (429, "queue_full", "rate_limit_error")
    assert int(headers["retry-after"]) >= 1
    for thread, found in waiting:
        thread.join(5)
        assert found[0][0] == 200


def test_the_price_follows_the_queue_unless_it_is_fixed():
    def prices(**options):
        with served(word_s=0.02, **options) as server:
            threads = [busy(server, latency_budget_ms=2000)]
            for count in range(1, 6):
                threads.append(in_background(lambda: server.chat(latency_budget_ms=2000))[0])
                until(lambda number=count: server.jobs.waiting == number or not server.jobs.scheduler.num_running)
            for thread in threads:
                thread.join(5)
            return [job.price for job in server.replicas[0].begun]

    assert prices()[0] == 0.01 < max(prices())
    assert set(prices(price=0.0)) == {0.0}


class PricedReplica(FakeReplica):
    """Has jobs whose request came 40 ms ago where time is cheap, and 10 where it is not."""

    word_s = 0.0

    def answered(self, job):
        job.arrived_s = time.perf_counter() - (0.04 if job.price < 0.1 else 0.01)
        return super().answered(job)


@pytest.mark.parametrize("mean_ms", [15.0, 25.0, 35.0])
def test_a_mean_budget_is_kept_by_the_price(mean_ms):
    server = Served(ServeOptions(mean_budget_ms=mean_ms))
    server.kind = type("Priced", (PricedReplica,), {"made": []})
    with server:
        took = [server.chat()[2]["budgetvlm"]["latency_ms"] for _ in range(200)]
    assert sum(took) / len(took) == pytest.approx(mean_ms, rel=0.05)
    assert min(took) < 20 and max(took) > 30


def test_a_mean_budget_counts_what_the_client_is_told():
    with served(word_s=0.01, mean_budget_ms=1000.0) as server:
        told = [server.chat()[2]["budgetvlm"]["latency_ms"] for _ in range(3)]
        assert server.jobs.spending.debt == pytest.approx(sum(ms / 1000.0 - 1 for ms in told))


def test_a_mean_budget_and_a_price_exclude_each_other():
    with pytest.raises(ConfigError, match="another"):
        ServeOptions(mean_budget_ms=50, price=0.1)


def test_the_way_back_is_taken_off_the_budget_and_counted():
    way, job = WayBack(), Job("a", [], [], arrived_s=time.perf_counter() - 0.1, budget_ms=100.0)
    answer = {"latency_ms": 0.0, "budget_ms": 98.0, "budget_met": True}
    for _ in range(200):  # each is 100 ms on its way
        answer["latency_ms"] = 0.0
        job.arrived_s = time.perf_counter() - 0.1
        way.arrived(job, answer)
    assert answer["latency_ms"] == pytest.approx(100, abs=20)
    assert (answer["budget_ms"], answer["budget_met"]) == (100.0, False)
    assert 95 < way.reserve_ms < 140


@pytest.mark.parametrize(("budget_ms", "told_ms"), [(100.0, 97.0), (2.0, 1e-3), (float("inf"), None)])
def test_a_replica_is_told_what_is_left_without_the_way_back(budget_ms, told_ms):
    job = Job("a", [], [], arrived_s=0.0, budget_ms=budget_ms, reserved_ms=3.0)
    assert job.header()["budget_ms"] == told_ms
