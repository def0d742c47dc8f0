"""Slots answer several jobs at once in threads of the server's process. Their model is planted."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.serving.engine_slots import EngineSlots
from budgetvlm.serving.jobs import Job
from budgetvlm.serving.replicas import GONE, Health
from budgetvlm.serving.serve_options import ServeOptions
from tests.fake_replicas import CHAT, WORDS, FakeReplica, Served, in_background, until
from tests.test_replica_process import PlantedServed

NUM_SLOTS = 3


class PlantedRouter:
    """Two engines, of which one takes two requests at once."""

    slots = NUM_SLOTS

    def __init__(self):
        self.capacity, self.closed = NUM_SLOTS, False

    def watch(self, changed):
        self.changed = changed

    def close(self):
        self.closed = True

    @property
    def endpoints(self):
        told = ("one:8000", True, 1, 0), ("two:8000", self.capacity == NUM_SLOTS, 0, 4)
        return [SimpleNamespace(**dict(zip(Health._fields, one, strict=True)), healthy=one[1]) for one in told]


class PlantedEngines:
    """Says words, each when `more` is released."""

    def __init__(self):
        self.vlm, self.more, self.fails = SimpleNamespace(router=PlantedRouter()), threading.Semaphore(0), None
        self.asked, self.left = [], []

    def generate(self, *, messages, on_text, arrived_s, **asked):
        self.asked.append(messages)
        if self.fails:
            raise self.fails
        said = []
        for word in WORDS:
            self.more.acquire()
            said.append(word)
            if on_text(word) is False:
                self.left.append(len(said))
                break
        job = SimpleNamespace(id="job", arrived_s=arrived_s, budget_ms=float("inf"))
        fake = FakeReplica(None)
        fake.said = {"job": said}
        return SimpleNamespace(to_dict=lambda: fake.answered(job))


class PlantedServedEngines(PlantedServed):
    def __init__(self, options):
        super().__init__(options)
        self.model = PlantedEngines()
        self.router = self.model.vlm.router

    def described(self):
        return FakeReplica(None).facts

    def follow(self):
        """All settings stay."""


class Slots(EngineSlots):
    """Slots of planted engines; all that were started are in `made`."""

    made: list
    broken = False

    def _open(self):
        if type(self).broken:
            raise ConfigError("the controller in /secret/place cannot be read")
        return PlantedServedEngines(None)

    async def start(self):
        await super().start()
        type(self).made.append(self)

    @property
    def model(self):
        return self._served.model


@pytest.fixture
def server():
    kind = type("PlantedSlots", (Slots,), {"made": []})
    with Served(ServeOptions(), kind=kind) as running:
        yield running
        for replica in running.replicas:  # a test that fails leaves no thread that waits
            replica.model.more.release(1000)


@pytest.fixture
def model(server):
    return server.replicas[0].model


def asked(server, count, **changed):
    """Ask several times at once, and wait until all are under way."""
    began = len(server.replicas[-1].model.asked)
    asking = [in_background(lambda: server.chat(**changed)) for _ in range(count)]
    until(lambda: len(server.replicas[-1].model.asked) == began + min(count, NUM_SLOTS))
    return asking


def ended(asking):
    for thread, _ in asking:
        thread.join(5)
    return [found[0][0] for _, found in asking]


def test_as_many_are_answered_at_once_as_there_are_slots(server, model):
    asking = asked(server, NUM_SLOTS + 1)
    until(lambda: server.jobs.waiting == 1)
    time.sleep(0.05)
    assert len(model.asked) == NUM_SLOTS
    model.more.release(len(WORDS) * (NUM_SLOTS + 1))
    assert ended(asking) == [200] * (NUM_SLOTS + 1)
    assert asking[0][1][0][2]["choices"][0]["message"]["content"] == "".join(WORDS)


def test_an_error_ends_a_job_and_no_slot(server, model):
    model.fails = InputError("the question is empty")
    assert ended(asked(server, 1)) == [400]
    model.fails = ZeroDivisionError("secret")
    assert ended(asked(server, 1)) == [500]
    model.fails = None
    model.more.release(len(WORDS) * NUM_SLOTS)
    assert ended(asked(server, NUM_SLOTS)) == [200] * NUM_SLOTS


def test_a_client_that_leaves_stops_its_job_alone(server, model):
    other = asked(server, 1)
    connection = server.leaving({**CHAT, "stream": True})
    until(lambda: len(model.asked) == 2)
    connection.close()
    until(lambda: [work for work, _ in server.replicas[0]._under_way.values() if work.left()])
    model.more.release(len(WORDS) + 1)
    assert ended(other) == [200]
    until(lambda: model.left == [1])


def test_fewer_are_answered_while_an_engine_is_down(server, model):
    router = model.vlm.router
    assert server.get("/ready") == {"ready": True, "replicas": 2, "replicas_up": 2}
    router.capacity = 1
    router.changed()
    until(lambda: server.jobs.scheduler.replicas == 1)
    assert server.get("/health") == {"status": "ok", "replicas": 2, "replicas_up": 1}
    asking = [in_background(server.chat) for _ in range(2)]
    until(lambda: server.jobs.waiting == 1)
    router.capacity = NUM_SLOTS
    router.changed()
    until(lambda: len(model.asked) == 2)
    model.more.release(2 * len(WORDS))
    assert ended(asking) == [200, 200]
    metrics = server.get("/metrics")
    assert 'budgetvlm_replica_failures_total{replica="two:8000"} 4.0' in metrics
    assert 'budgetvlm_replica_requests{replica="one:8000"} 1.0' in metrics


def test_without_an_engine_requests_are_refused_and_those_who_wait_told_by_their_deadline(server, model):
    asking = asked(server, NUM_SLOTS)
    began = time.monotonic()
    waiting = in_background(lambda: server.chat(latency_budget_ms=300))
    until(lambda: server.jobs.waiting == 1)
    model.vlm.router.capacity = 0
    model.vlm.router.changed()
    until(lambda: not server.jobs.ready)
    assert server.chat(latency_budget_ms=5000)[0] == 503
    assert ended([waiting]) == [503] and time.monotonic() - began < 1.3
    assert server.ask(method="GET", path="/ready")[0] == 503
    model.more.release(NUM_SLOTS * len(WORDS))
    assert ended(asking) == [200] * NUM_SLOTS


def test_a_reload_drops_no_request(server, model):
    asking = asked(server, NUM_SLOTS)
    server.run(server.jobs.reload())
    new = server.replicas[1]
    model.more.release(NUM_SLOTS * len(WORDS))
    assert ended(asking) == [200] * NUM_SLOTS
    until(lambda: model.vlm.router.closed)
    new.model.more.release(len(WORDS))
    assert server.chat()[0] == 200 and len(new.model.asked) == 1
    assert server.jobs.restarts == 0


def test_slots_that_are_closed_wait_for_their_jobs_no_longer_than_they_may():
    async def closed():
        slots = type("PlantedSlots", (Slots,), {"made": []})(ServeOptions())
        await slots.start()
        job = Job("job", [{"role": "user", "content": "what"}], [], arrived_s=0.0)
        events = slots.answer(job)
        telling = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        await slots.close(0.1)
        slots.model.more.release(len(WORDS))
        return slots, await telling

    slots, event = asyncio.run(closed())
    assert event is GONE and not slots.alive and not slots.capacity
    assert slots.model.vlm.router.closed and slots._served.saved == 1


def test_what_cannot_be_opened_is_said(server):
    server.kind.broken = True
    with pytest.raises(Exception, match="cannot be read"):
        server.run(server.jobs.reload())
    assert server.jobs.ready


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "./model"}, "is no file such as engines.yaml and no address"),
        ({"engine": "http://127.0.0.1:8000/v1", "model_path": "./model"}, "exclude each other"),
        ({"engine": "engines.yaml", "replicas": 2}, "those of engines stand in the fleet's file"),
        ({"model_path": "engines.yaml", "replicas": 2}, "those of engines stand in the fleet's file"),
    ],
)
def test_flags_that_do_not_fit_engines(options, says):
    with pytest.raises(ConfigError, match=says):
        ServeOptions(**options)


def test_engines_are_served_by_the_name_of_their_file():
    assert ServeOptions(engine="fleets/small.yaml").served_name == "small"
    assert ServeOptions(engine="http://127.0.0.1:8000/v1").served_name == "engines"
    assert ServeOptions(model_path="engines.yaml").has_engines
