"""The server in front of engines that die, fail, hang and are slow. They are fakes; the controller is planted."""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from fake_engine import EngineProcess, FakeEngine, Faults
from PIL import Image
from tiny_vlm import write_tiny_model

from budgetvlm.controller.network import GRPOController
from budgetvlm.engines import standing
from budgetvlm.engines.opening import open_model
from budgetvlm.engines.router import key_of
from budgetvlm.errors import EngineDownError, EngineError, InfeasibleError, InputError
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.serving import dispatcher
from budgetvlm.serving.embedded import Router
from budgetvlm.serving.engine_slots import EngineSlots, ServedEngines
from budgetvlm.serving.replicas import ReplicaError
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.vlm.loading import load
from tests.fake_replicas import Served, in_background, until
from tests.server_process import ROOT, asked, image_part

FEW_MS, MANY_MS = 50.0, 500.0  # bounds of settings with few experts and with many
CHAT = {"messages": asked(image_part())}
SIGNS = ROOT / "examples" / "signs.png"
TAKEN_OVER_S = 2.0  # after which another engine answers instead; it takes a fraction of that
GRACE_S = 1.0  # after its budget, in which a request has its answer or an error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sketch(tiny):
    return load(str(tiny), device="meta")


class Planted(ServedEngines):
    """Engines with a controller that likes many experts best, and knows bounds of its own."""

    def __init__(self, fleet):
        vlm = open_model(str(fleet))
        blank = Image.new("RGB", (64, 48))
        experts = [setting.get("top_k", 4) for setting in vlm.knob_space.settings]
        controller = GRPOController(
            image_feat_dim=len(vlm.encode_overview(blank).feature), lang_feat_dim=len(vlm.question_feature("what")),
            knob_values=vlm.knob_space.to_dict(), bounds_ms=[FEW_MS if k == 1 else MANY_MS for k in experts],
            hidden_dim=8,
        )  # fmt: skip
        controller.start_from([0.5 + 0.1 * k for k in experts])
        self.model = AdaptiveVLM(vlm, controller, rehearsals=0, compiled=False)
        self.state = SimpleNamespace(due_s=lambda: None, answered=lambda model: None, save=lambda model: None)
        self._curve, self._keeping = None, threading.Lock()
        self.facts = self.described()
        self._attach()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Engines that are down are tried often."""
    monkeypatch.setattr(standing, "LONGEST_PAUSE_S", 0.5)


@pytest.fixture
def front(tiny, tmp_path):
    """Serve in front of replicas, each an engine or what the fleet's file says of one."""
    running = []

    def serve(*replicas, **options):
        listed = [one if isinstance(one, dict) else {"url": one.url} for one in replicas]
        fleet = tmp_path / "engines.yaml"
        fleet.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": listed}))
        kind = type("Slots", (EngineSlots,), {"_open": lambda self: Planted(fleet)})
        running.append(Served(ServeOptions(engine=str(fleet), **options), kind=kind))
        running[-1].__enter__()
        return running[-1]

    yield serve
    for server in running:
        server.__exit__()


def ask(server, **changed):
    """Ask once; returns status, the answer's setting or the error's code, and how long it took."""
    began_s = time.perf_counter()
    status, _, document = server.ask({"model": "engines", **CHAT, **changed})
    told = document["budgetvlm"]["setting"] if status == 200 else document["error"]["code"]
    return status, told, time.perf_counter() - began_s


def asks(server, count, **changed):
    """Ask several times at once; returns what each found, once all have."""
    asking = [in_background(lambda: ask(server, **changed)) for _ in range(count)]
    return lambda: [found[0] for thread, found in asking if thread.join(20) is None]


def started(url, experts, **more):
    return {"url": url, "knobs": {"top_k": experts}, **more}


def test_the_budget_decides_which_engine_answers(front, sketch):
    with FakeEngine(sketch, knobs={"top_k": 1}) as few, FakeEngine(sketch, knobs={"top_k": 4}) as many:
        server = front(started(few.url, 1), started(many.url, 4))
        before = len(few.asked), len(many.asked)
        for budget_ms, experts in ((10 * FEW_MS - 50, 1), (10 * MANY_MS, 4), (None, 4)):
            status, setting, _ = ask(server, **({"latency_budget_ms": budget_ms} if budget_ms else {}))
            assert (status, setting["top_k"]) == (200, experts)
        assert (len(few.asked) - before[0], len(many.asked) - before[1]) == (1, 2)
        assert server.get("/ready") == {"ready": True, "replicas": 2, "replicas_up": 2}


def test_one_is_killed_and_the_other_takes_over(front, sketch):
    few = EngineProcess(FakeEngine(sketch, knobs={"top_k": 1}, first_ms=100))
    many = EngineProcess(FakeEngine(sketch, knobs={"top_k": 4}, first_ms=100))
    with few, many:
        server, budget_ms = front(started(few.url, 1), started(many.url, 4)), 10 * MANY_MS
        assert ask(server)[1]["top_k"] == 4
        found = asks(server, 12, latency_budget_ms=budget_ms)
        until(lambda: sum(one.in_flight for one in server.jobs.replicas) > 2)
        many.kill()
        killed_s = time.perf_counter()
        status, setting, _ = ask(server, latency_budget_ms=budget_ms)
        assert (status, setting["top_k"]) == (200, 1)
        assert time.perf_counter() - killed_s < TAKEN_OVER_S
        for status, told, took_s in found():
            assert took_s < budget_ms / 1e3 + GRACE_S
            assert status == 200 or told in ("engine_failed", "not_ready")
        assert [status for status, *_ in found()] == [200] * 12  # there was time enough for the other
        until(lambda: server.get("/health")["replicas_up"] == 1)
        assert f'budgetvlm_replica_up{{replica="{many.url[7:-3]}"}} 0.0' in server.get("/metrics")
        many.revive()
        until(lambda: server.get("/health")["replicas_up"] == 2)
        assert ask(server)[1]["top_k"] == 4


def test_all_are_killed(front, sketch, caplog):
    with EngineProcess(FakeEngine(sketch, first_ms=150)) as only:
        server = front(only)
        found = asks(server, 3, latency_budget_ms=1000)
        until(lambda: any(one.in_flight for one in server.jobs.replicas))
        only.kill()
        for status, told, took_s in found():
            assert status == 200 or told in ("engine_failed", "not_ready")
            assert took_s < 1 + GRACE_S
        assert 1 <= caplog.text.count("a request failed at an engine") <= 6  # not one line for each try
        until(lambda: not server.jobs.ready)
        assert ask(server, latency_budget_ms=1000)[:2] == (503, "not_ready")
        only.revive()
        until(lambda: server.jobs.ready)
        assert ask(server)[0] == 200


def test_one_that_is_back_with_other_flags_stays_out(front, sketch):
    with FakeEngine(sketch) as changed, FakeEngine(sketch) as same:
        server = front(changed, same)
        changed.die()
        until(lambda: server.get("/health")["replicas_up"] == 1)
        changed.faults.ignores = True
        before = len(changed.asked)
        changed.revive()
        until(lambda: len(changed.asked) > before, 10)
        time.sleep(0.3)
        assert server.get("/health")["replicas_up"] == 1
        changed.faults.ignores = False
        until(lambda: server.get("/health")["replicas_up"] == 2, 10)


@pytest.mark.parametrize("fault", ["500", "503", "disconnect"])
def test_who_gets_an_error_is_answered_by_another(front, sketch, fault):
    with FakeEngine(sketch) as ill, FakeEngine(sketch) as well:
        server = front(ill, well)
        ill.faults.always = fault
        assert [status for status, *_ in asks(server, 8)()] == [200] * 8
        ill.faults.always = None
        until(lambda: server.get("/health")["replicas_up"] == 2)
        assert sum(one.failures for one in server.jobs.replicas) > 0


def test_a_request_that_no_engine_can_answer_ends_with_an_error_and_takes_none_down(front, sketch):
    with FakeEngine(sketch) as one:
        server = front(one)
        one.faults.next.extend(["500"] * 2)
        assert ask(server)[0] == 200, "it was tried again"
        assert server.get("/health")["replicas_up"] == 1


def test_a_slow_one_is_not_waited_for_by_all(front, sketch):
    with FakeEngine(sketch, faults=Faults(slowness=100)) as slow, FakeEngine(sketch) as quick:
        server = front(slow, quick)
        before = len(slow.asked), len(quick.asked)
        each = [in_background(lambda: [ask(server)[0] for _ in range(4)]) for _ in range(8)]
        assert [found[0] for thread, found in each if thread.join(20) is None] == [[200] * 4] * 8
        assert len(slow.asked) - before[0] < 32 and len(quick.asked) > before[1]  # of the same image


def test_a_client_that_leaves_frees_its_engine_between_two_tokens(front, sketch):
    with FakeEngine(sketch) as engine:
        server = front(engine)
        engine.token_ms = 20_000
        connection = server.leaving({"model": "engines", **CHAT, "stream": True})
        until(lambda: engine.running == 1)
        connection.close()
        until(lambda: engine.running == 0, 2.0)
        until(lambda: not any(one.in_flight for one in server.jobs.replicas))


def test_images_go_on_as_they_came_and_the_same_image_to_the_same_engine(front, sketch):
    with FakeEngine(sketch) as one, FakeEngine(sketch) as other:
        server = front(one, other)
        before = len(one.asked), len(other.asked)
        for _ in range(4):
            assert ask(server)[0] == 200
        counts = len(one.asked) - before[0], len(other.asked) - before[1]
        assert sorted(counts) == [0, 4]
        last = (one if counts[0] else other).asked[-1]
        assert last["messages"][0]["content"][0] == image_part()


def test_dearer_engines_are_asked_when_the_cheaper_ones_are_full(tiny, tmp_path, sketch):
    with FakeEngine(sketch) as dear, FakeEngine(sketch) as cheap:
        fleet = tmp_path / "engines.yaml"
        told = [{"url": dear.url, "cost": 2}, {"url": cheap.url, "cost": 1, "concurrency": 2}]
        fleet.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": told}))
        vlm = open_model(str(fleet))
        with contextlib.ExitStack() as held:
            picked = [held.enter_context(vlm.router.pick(vlm.served[0])).client.spec.url for _ in range(3)]
    assert picked == [cheap.url, cheap.url, dear.url]


def test_keys_keep_their_engine_when_others_come_and_go(tiny, tmp_path, sketch):
    with FakeEngine(sketch) as a, FakeEngine(sketch) as b, FakeEngine(sketch) as c:
        fleet = tmp_path / "engines.yaml"
        fleet.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": [{"url": e.url} for e in (a, b, c)]}))
        router = open_model(str(fleet)).router
        setting = next(iter(open_model(str(fleet)).served))
        noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        keys = [key_of([Image.fromarray(pixels)]) for pixels in noise]

        def placed():
            found = []
            for key in keys:
                with router.pick(setting, key) as endpoint:
                    found.append(endpoint)
            return found

        before = placed()
        assert {one.name for one in before} == {one.name for one in router.endpoints}
        gone = before[0]
        gone.down()
        after = placed()
        assert all(new is old for new, old in zip(after, before, strict=True) if old is not gone)
        gone.healthy, gone.in_flight = True, gone.concurrency - 1
        assert gone not in placed(), "it is clearly busier"
        for endpoint in router.endpoints:
            endpoint.in_flight = endpoint.concurrency
        with pytest.raises(EngineDownError, match="as many requests as they take"):
            router.ask(setting, lambda endpoint: None, end_s=time.perf_counter() + 0.05)
        for endpoint in router.endpoints:
            endpoint.down()
            endpoint.watched = True
        with pytest.raises(EngineDownError, match="no engine that answers"):
            placed()


def test_the_same_from_python(tiny, tmp_path, sketch, monkeypatch):
    monkeypatch.setattr(EngineSlots, "_open", lambda slots: Planted(slots._options.engine))
    fleet = tmp_path / "engines.yaml"
    with EngineProcess(FakeEngine(sketch, knobs={"top_k": 1})) as few, FakeEngine(sketch, knobs={"top_k": 4}) as many:
        listed = [started(few.url, 1), started(many.url, 4)]
        fleet.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": listed}))
        with Router(fleet) as router:
            said = []
            answer = router.generate(SIGNS, "read the sign", budget_ms=10 * MANY_MS, on_text=said.append)
            assert answer.setting["top_k"] == 4 and answer.budget_met and "".join(said) == answer.answer
            messages = [
                {"role": "user", "content": [{"type": "image", "image": SIGNS}, {"type": "text", "text": "what"}]}
            ]
            answer = router.generate(messages=messages, budget_ms=MANY_MS - 50)
            assert answer.setting["top_k"] == 1
            assert router.generate(SIGNS, "what", setting={"top_k": 4}).setting["top_k"] == 4
            few.kill()
            assert router.generate(SIGNS, "what", budget_ms=MANY_MS - 50).setting["top_k"] == 4
            with pytest.raises(InputError, match="the question is empty"):
                router.generate(SIGNS, " ")
            with pytest.raises(InfeasibleError):
                router.generate(SIGNS, "what", budget_ms=1, when_infeasible="reject")
            many.die()
            with pytest.raises(EngineError):
                router.generate(SIGNS, "what", budget_ms=300)


def test_a_router_that_is_closed_tells_those_who_wait_and_those_who_come_later(tiny, tmp_path, sketch, monkeypatch):
    monkeypatch.setattr(EngineSlots, "_open", lambda slots: Planted(slots._options.engine))
    monkeypatch.setattr(dispatcher, "CLOSE_S", 0.1)
    fleet, ended = tmp_path / "engines.yaml", []
    with FakeEngine(sketch, knobs={"top_k": 1}) as few, FakeEngine(sketch, knobs={"top_k": 4}) as many:
        listed = [started(few.url, 1, concurrency=1), started(many.url, 4, concurrency=1)]
        fleet.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": listed}))
        router = Router(fleet)
        few.faults.always = many.faults.always = "hang"

        def asking():
            with pytest.raises(EngineError):
                router.generate(SIGNS, "what")
            ended.append(True)

        threads = [threading.Thread(target=asking, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: router._jobs.waiting == 2)
        router.close()
        for thread in threads:
            thread.join(5)
        assert len(ended) == 4
        router.close()
        with pytest.raises(EngineError, match="closed"):
            router.generate(SIGNS, "what")


def test_a_router_that_cannot_be_opened_leaves_no_thread(tmp_path):
    before = threading.active_count()
    with pytest.raises(ReplicaError):
        Router("http://127.0.0.1:9", tmp_path)
    assert threading.active_count() == before
