"""A replica stops, closes and saves when it is told to. Its model is planted and says a word when it is let."""

import socket
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from budgetvlm.errors import InputError
from budgetvlm.serving import wire
from budgetvlm.serving.jobs import Job
from budgetvlm.serving.replica_process import ReplicaProcess
from budgetvlm.serving.served_model import ServedModel
from tests.fake_replicas import until

pytestmark = pytest.mark.alone

WORDS = 50


class PlantedModel:
    """Says words until it is stopped, each of them when `more` is released."""

    def __init__(self):
        self.said, self.more, self.fails, self.part = 0, threading.Semaphore(0), None, torch.nn.Identity()

    def generate(self, *, messages, on_text, **asked):
        self.asked = messages
        if self.fails:
            raise self.fails
        for _ in range(WORDS):
            self.more.acquire()
            self.part(torch.zeros(1))
            self.said += 1
            if not on_text("word "):
                break
        return SimpleNamespace(to_dict=lambda: {"answer": "word " * self.said})


class PlantedServed(ServedModel):
    """A served model without controller, guard and files."""

    def __init__(self, options):
        self.model, self.facts, self.saved = PlantedModel(), self.described(), 0
        self.state = SimpleNamespace(due_s=lambda: None, answered=lambda model: None)
        self._keeping = threading.Lock()

    def save(self):
        self.saved += 1

    def described(self):
        return {"fastest_ms": 1.0}


class Planted(ReplicaProcess):
    """A replica without the process."""

    def _open(self, options):
        return PlantedServed(options)


@pytest.fixture
def replica():
    """A replica under way, and the server's end of its connection."""
    ours, theirs = socket.socketpair()
    made = Planted(theirs)
    ended = []

    def run():
        try:
            made.run()
        except (EOFError, OSError) as error:
            ended.append(error)
        theirs.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ours.settimeout(10)
    wire.send(ours, {})
    assert wire.receive(ours)[0]["kind"] == "ready"
    yield SimpleNamespace(served=made._served, model=made._served.model, server=ours, thread=thread)
    ours.close()
    thread.join(10)
    assert not thread.is_alive()


def ask(replica, name, kind="answer"):
    parts = [{"type": "image", "image": 0}, {"type": "text", "text": "what"}]
    image = Image.new("RGB", (3, 2), "red")
    job = Job(name, [{"role": "user", "content": parts}], [image], arrived_s=0.0, kind=kind, streams=kind == "answer")
    wire.send(replica.server, job.header(), [image.tobytes()])


def heard(replica):
    return wire.receive(replica.server)[0]


def test_a_job_that_nobody_waits_for_ends_within_one_token(replica):
    ask(replica, "first")
    for _ in range(3):
        replica.model.more.release()
        assert heard(replica)["kind"] == "text"
    wire.send(replica.server, {"kind": "stop", "id": "first"})
    replica.model.more.release(WORDS)
    events = [heard(replica)["kind"]]
    while events[-1] == "text":
        events.append(heard(replica)["kind"])
    assert events == ["text", "answer"]
    assert replica.model.said == 4


def test_a_shadow_answer_ends_before_the_next_part_of_the_model_runs(replica):
    ask(replica, "first", kind="shadow")
    replica.model.more.release(2)
    until(lambda: replica.model.said == 2)
    wire.send(replica.server, {"kind": "stop", "id": "first"})
    replica.model.more.release()
    told = heard(replica)
    assert (told["kind"], told["type"], replica.model.said) == ("error", "ClientLeft", 2)
    ask(replica, "second")
    replica.model.more.release(WORDS)
    assert heard(replica)["kind"] == "text", "who comes next is answered"


def test_a_shadow_answer_that_nobody_disturbs_is_told_as_a_whole(replica):
    ask(replica, "first", kind="shadow")
    replica.model.more.release(WORDS)
    told = heard(replica)
    assert (told["kind"], told["answer"]["answer"]) == ("answer", "word " * WORDS)


def test_the_model_gets_the_images_in_their_places(replica):
    ask(replica, "first")
    replica.model.more.release(WORDS)
    while heard(replica)["kind"] != "answer":
        pass
    image, text = replica.model.asked[0]["content"]
    assert image["image"].size == (3, 2) and image["image"].getpixel((0, 0)) == (255, 0, 0)
    assert text == {"type": "text", "text": "what"}


def test_a_stop_of_another_job_and_one_that_is_too_late_stop_nothing(replica):
    ask(replica, "first")
    wire.send(replica.server, {"kind": "stop", "id": "another"})
    replica.model.more.release(WORDS)
    while heard(replica)["kind"] != "answer":
        pass
    assert replica.model.said == WORDS
    wire.send(replica.server, {"kind": "stop", "id": "first"})
    ask(replica, "second")
    replica.model.more.release(WORDS)
    while heard(replica)["kind"] != "answer":
        pass
    assert replica.model.said == 2 * WORDS


def test_a_replica_that_is_to_close_ends_its_job_and_saves(replica):
    ask(replica, "first")
    replica.model.more.release()
    assert heard(replica)["kind"] == "text"
    wire.send(replica.server, {"kind": "close", "id": None})
    replica.model.more.release(WORDS)
    replica.thread.join(10)
    assert replica.model.said == 2 and replica.served.saved == 1


def test_a_replica_whose_server_is_gone_ends_and_saves(replica):
    ask(replica, "first")
    replica.model.more.release()
    assert heard(replica)["kind"] == "text"
    replica.server.close()
    replica.model.more.release(WORDS)
    replica.thread.join(10)
    assert not replica.thread.is_alive()
    assert replica.model.said <= 3 and replica.served.saved == 1


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (InputError("the question is empty"), "InputError", "the question is empty"),
        (ZeroDivisionError("secret"), "InternalError", "the model failed on this request"),
    ],
)
def test_an_error_ends_the_job_and_not_the_replica(replica, error, kind, says):
    replica.model.fails = error
    ask(replica, "first")
    told = heard(replica)
    assert (told["kind"], told["type"], told["message"]) == ("error", kind, says)
    replica.model.fails = None
    ask(replica, "second")
    replica.model.more.release(WORDS)
    assert heard(replica)["kind"] == "text"


def test_a_whole_answer_is_told_at_once(replica):
    wire.send(replica.server, Job("first", [{"role": "user", "content": "what"}], [], arrived_s=0.0).header())
    replica.model.more.release(WORDS)
    assert heard(replica)["kind"] == "answer"
