"""A server in this process whose replicas hold no model: they say words at a pace, and die when they are told to."""

import asyncio
import contextlib
import json
import threading
import time
from dataclasses import asdict
from http.client import HTTPConnection

import uvicorn

from budgetvlm.serving.app import make_app
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.jobs import Event
from budgetvlm.serving.replicas import GONE, Replica, ReplicaError
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.toll import Worth

WORDS = ("red ", "blue ", "green")
WORD_S = 0.02


class FakeReplica(Replica):
    """Answers a job with some words, one each `word_s`.

    Attributes:
        begun, said: jobs that it began, and words that it said of each.
    """

    made: list  # all of them, in order; set for each test
    word_s = WORD_S
    fails = False  # whether the next ones cannot be started

    def __init__(self, options):
        super().__init__(options)
        model = {"knob_space": {"max_crops": [1, 4], "top_k": [2]}, "fingerprint": "planted"}
        self.options, self.facts = options, {"fastest_ms": 1.0, "worth": asdict(Worth(60.0)), "model": model}
        self.begun, self.said, self.stopped = [], {}, set()
        self._dead = asyncio.Event()

    async def start(self):
        if type(self).fails:
            raise ReplicaError("the controller in /secret/place cannot be read")
        await asyncio.sleep(0.01)
        type(self).made.append(self)

    @property
    def alive(self):
        return not self._dead.is_set()

    def die(self):
        self._dead.set()

    async def changed(self):
        await self._dead.wait()
        return False

    async def close(self, grace_s=None):
        self.die()

    async def stop_job(self, job):
        self.stopped.add(job.id)

    async def _events(self, job):
        self.begun.append(job)
        self.said[job.id] = []
        for word in WORDS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dead.wait(), self.word_s)
                yield GONE
                return
            if job.id in self.stopped:
                break
            self.said[job.id].append(word)
            yield Event("text", {"text": word})
        seen = {
            "controller": "digest", "knobs": '{"max_crops": [1, 4], "top_k": [1, 2]}',
            "seen_ms": 50.0, "price": 0.1, "allowed": [192], "chosen": 1,
            "answered": 1,
        }  # fmt: skip
        yield Event(
            "answer", {"answer": self.answered(job), "seen": seen, "features": [bytes(8), bytes(4), b"probable"]}
        )

    def answered(self, job):
        latency_ms = (time.perf_counter() - job.arrived_s) * 1e3
        whole = len(self.said[job.id]) == len(WORDS)
        return {
            "answer": "".join(self.said[job.id]), "finish_reason": "stop" if whole else "stopped",
            "setting": {"max_crops": 4, "top_k": 2}, "stages_ms": {"vision": 1.0, "decode": 2.0},
            "latency_ms": latency_ms, "predicted_ms": 3.0,
            "budget_ms": None if job.budget_ms == float("inf") else job.budget_ms,
            "budget_met": latency_ms <= job.budget_ms, "feasible": True, "num_vision_tokens": 16,
            "num_language_tokens": 4, "num_output_tokens": len(self.said[job.id]), "num_hurried_tokens": 0,
            "extrapolated": False,
        }  # fmt: skip


class Asking:
    """Something at an address that can be asked."""

    def leaving(self, body):
        """Ask and hear nothing of it; returns the connection."""
        connection = HTTPConnection(self.host, self.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def ask(self, body=None, method="POST", path="/v1/chat/completions", headers=(), raw=None, timeout=20):
        """One request; returns status, headers and the body's document."""
        connection = HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            data = raw if raw is not None else json.dumps(body) if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
            response = connection.getresponse()
            return response.status, dict(response.headers), decoded(response.read())
        finally:
            connection.close()

    def chat(self, **changed):
        """Ask the question of `CHAT`."""
        return self.ask({**CHAT, **changed})

    def get(self, path):
        """The document at a path, which has to be there."""
        status, _, document = self.ask(method="GET", path=path)
        assert status == 200, document
        return document


class Served(Asking):
    """A running server, its dispatcher and its replicas."""

    def __init__(self, options, kind=None, **words):
        self.kind = kind or type("Fake", (FakeReplica,), {"made": [], **words})
        self.options = options
        self.host, self.port = "127.0.0.1", 0

    def _serve(self, ready):
        async def main():
            self.jobs = Dispatcher(self.options, self.kind)
            self.app = make_app(self.options, self.jobs)
            config = uvicorn.Config(self.app, port=0, log_level="critical", access_log=False)
            self.server = uvicorn.Server(config)
            task = asyncio.create_task(self.server.serve())
            while not self.server.started:
                await asyncio.sleep(0.005)
            self.port = self.server.servers[0].sockets[0].getsockname()[1]
            self.loop = asyncio.get_running_loop()
            ready.set()
            await task

        asyncio.run(main())

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=[ready], daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive(), "the server does not end"

    @property
    def replicas(self):
        return self.kind.made

    @property
    def gate(self):
        return self.app.state.gate

    def kill(self, replica):
        self.loop.call_soon_threadsafe(replica.die)

    def run(self, coroutine):
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)


def decoded(data):
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()


CHAT = {"model": "reference", "messages": [{"role": "user", "content": "read the sign in red"}]}


def served(**options):
    words = {name: options.pop(name) for name in ("word_s", "fails") if name in options}
    return Served(ServeOptions(**options), **words)


def until(condition, seconds=5.0):
    """Wait until something holds, and fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def in_background(call):
    """Run a call in a thread; what it returned is in the list that comes back with the thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found
