"""A serving engine for tests that behaves as vLLM does, without a model: it counts tokens, says words, takes its time.

The counts are those of a sketch (a model without weights), so they are exact. What is said depends on the image, the
question and the setting: see `FakeEngine.right`. Its faults can be changed while it runs.
"""

import base64
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from budgetvlm.errors import InputError
from budgetvlm.vlm.conversation import is_plain, read_messages

WORDS = ("A", "B", "C", "1", "2", "3")
CACHED = 1 / 3  # of the time of the first token, where the prompt was seen before
LEAVING_S = 0.002  # how often it looks whether a client is still there


@dataclass
class Faults:
    """What is wrong with an engine; may change while it runs.

    Attributes:
        next: what the next requests get, one each: "500", "503", "disconnect" (in the middle of the answer), "hang"
            (until the client leaves), "death".
        always: what all requests get that find none in ``next``.
        ignores: arguments of the image processor change nothing, in silence.
        most_crops: more are answered as so many.
        deadly: names among the arguments that end it: 500 for all that come after.
        slowness: times all times.
        confuses_caches: an image that was seen before is answered with the tokens of the first time.
        deaf: goes on with a request whose client has left.
        counts: streams say how many tokens there were. pieces: they come token by token, not at once.
    """

    next: deque[str] = field(default_factory=deque)
    always: str | None = None
    ignores: bool = False
    most_crops: int | None = None
    deadly: tuple[str, ...] = ()
    slowness: float = 1.0
    confuses_caches: bool = False
    deaf: bool = False
    counts: bool = True
    pieces: bool = True


class FakeEngine:
    """An engine in threads of this process, or with `process` in one of its own, which can be killed.

    Attributes:
        url: of its API. faults: see `Faults`.
        asked: bodies of all chat completions, with the images decoded under "images".
        left: how many clients went before their answer was complete.
        running, waiting: requests now. most_running: the most there were.

    Args:
        sketch: the model that it serves, an adapter on the device "meta".
        name: that it serves the model by.
        knobs: what it was started with, such as {"top_k": 2}; it tells nobody.
        trusted: whether requests may change the image processor's arguments.
        details: tells cached and image tokens apart. metrics: tells its own times.
        slots: requests that it works on at once, others wait.
        first_ms, token_ms: until the first token, and for each further one; ``image_token_ms`` for each image token.
        growth: by what share each request in flight lengthens the others' times.
        answer: says what is answered, from image, question, `max_crops` and ``knobs``.
        key: the API key, if it wants one.
    """

    def __init__(
        self, sketch, *, name="tiny", knobs=None, trusted=True, details=True, metrics=True, slots=64, first_ms=2.0,
        token_ms=0.5, image_token_ms=0.0, growth=0.0, answer=None, key=None, faults=None,
    ):  # fmt: skip
        self.sketch, self.name, self.knobs, self.trusted = sketch, name, knobs or {}, trusted
        self.details, self.metrics, self.key = details, metrics, key
        self.first_ms, self.token_ms, self.image_token_ms, self.growth = first_ms, token_ms, image_token_ms, growth
        self.faults, self.answer = faults or Faults(), answer or self.right
        self.asked, self.left, self.running, self.waiting = [], 0, 0, 0
        self.most_running = 0
        self._seen, self._told, self._slots, self._lock = {}, {}, threading.Semaphore(slots), threading.Lock()
        self._connections, self.dead = set(), False
        self.port = 0

    # --- its life ---

    def __enter__(self):
        self._listen()
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *error):
        if not self.dead:
            self.die()

    def _listen(self):
        handler = type("Handler", (_Handler,), {"engine": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def die(self):
        """End like a process that is killed: connections end and nobody listens any more."""
        self.dead = True
        self._server.socket.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()

    def revive(self):
        """Start anew at the same address, with nothing in its caches."""
        self.dead, self._seen = False, {}
        self.__enter__()

    # --- what it says ---

    def right(self, image, question, crops, knobs):
        """What it answers unless told otherwise: more often the full setting's words, the more the setting shows."""
        digest = self.digest(image, question)
        best, other = (f"{WORDS[digest[i] % 6]} {WORDS[digest[i + 1] % 6]}" for i in (0, 2))
        share = crops / self.sketch.images.most_crops
        for name, value in knobs.items():
            share *= value / self.sketch.knob_space.values(name)[-1]
        return best if digest[4] < 256 * (0.4 + 0.6 * share) else other

    @staticmethod
    def digest(image, question):
        """Of the question and of what is seen of an image, whatever its lowest bits are."""
        seen = image.resize((4, 4), Image.Resampling.NEAREST).tobytes() if image else b""
        return hashlib.sha256(bytes(byte >> 4 for byte in seen) + question.encode()).digest()

    def crops(self, image, kwargs):
        """The `max_crops` that arguments of the image processor mean; raises ValueError as the processor does.

        Names of other families are ignored, and a number that means none is taken for the next smaller one.
        """
        told = kwargs.get("images_kwargs", kwargs)
        options = self._options(image.height, image.width)
        full = options[-1]
        known = {name: value for name, value in told.items() if name in full}
        if not known or self.faults.ignores:
            return len(options)
        for number in map(_number, known.values()):
            if number is not None and not isinstance(number, int):
                raise ValueError(f"Failed to apply the processor on data with kwargs={known}: {number!r} is no integer")
        numbers = [name for name in known if _number(known[name]) is not None]
        meant = [n for n, one in enumerate(options, 1) if one == {**full, **known}]
        less = [
            n for n, one in enumerate(options, 1) if all(_number(one.get(k, 0)) <= _number(known[k]) for k in numbers)
        ]
        return min((meant or less or [1])[-1], self.faults.most_crops or len(options))

    def _options(self, height, width):
        """What the image processor is told for an image of this size at each `max_crops`, from 1 to the most."""
        if (height, width) not in self._told:
            each = range(1, self.sketch.images.most_crops + 1)
            self._told[height, width] = [self.sketch.images.options(height, width, crops) or {} for crops in each]
        return self._told[height, width]

    def tokens(self, conversation, crops):
        """Image tokens and text tokens of a prompt."""
        layouts = [self.sketch.images.layout_of(image, crops) for image in conversation.images]
        asked = conversation.question if is_plain(conversation) else conversation
        visual = sum(map(self.sketch.prompt.num_image_tokens, layouts))
        with self._lock:  # tokenizers are not for two threads at once
            return visual, self.sketch.prompt.num_text_tokens(asked)

    @contextlib.contextmanager
    def slot(self):
        """Wait for a slot and hold it."""
        with self._lock:
            self.waiting += 1
        self._slots.acquire()
        with self._lock:
            self.waiting, self.running = self.waiting - 1, self.running + 1
            self.most_running = max(self.most_running, self.running)
        try:
            yield
        finally:
            self._slots.release()
            with self._lock:
                self.running -= 1

    def seconds(self, ms):
        """How long something takes that takes these ms alone."""
        return ms / 1e3 * self.faults.slowness * (1 + self.growth * max(self.running - 1, 0))

    def document(self):
        """What /v1/models says."""
        card = {"id": self.name, "object": "model", "created": 1, "owned_by": "vllm", "root": f"/models/{self.name}"}
        return {"object": "list", "data": [{**card, "parent": None, "max_model_len": 2048}]}

    def gauges(self):
        """What /metrics says."""
        named = {"running": f"{self.running:.1f}", "waiting": f"{self.waiting:.1f} 1764547200000"}  # a time may follow
        lines = [f'vllm:num_requests_{n}{{engine="0",model_name="{self.name}"}} {value}' for n, value in named.items()]
        return "\n".join(["# TYPE vllm:num_requests_running gauge", *lines, "vllm:kv_cache_usage_perc 0.0", ""])


class EngineProcess:
    """A fake engine in a process of its own, for tests that kill it; its faults are those that it begins with.

    Args:
        engine: not started.
    """

    def __init__(self, engine):
        self._engine = engine

    def __enter__(self):
        context = multiprocessing.get_context("fork")  # the sketch is there already
        ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=[self._engine, theirs], daemon=True)
        self.process.start()
        self._engine.port = ours.recv()
        self.url = f"http://127.0.0.1:{self._engine.port}/v1"
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        """Kill it, as `kill -9` does."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def revive(self):
        """Start it anew at the same address."""
        self.__enter__()


def _serve(engine, ready):
    engine.die = lambda: os._exit(1)
    engine._listen()
    ready.send(engine.port)
    engine._server.serve_forever()


def _number(value):
    """The last number in an argument, which is the larger one of a size; None: it holds none to be compared."""
    if isinstance(value, dict):
        return _number(list(value.values())[-1])
    return None if isinstance(value, bool | list) else value


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that left is no error."""


class _Left(Exception):
    """The client is gone."""


class _Handler(BaseHTTPRequestHandler):
    engine: FakeEngine
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.engine._connections.add(self.connection)

    def finish(self):
        self.engine._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *words):
        """Say nothing."""

    def do_GET(self):
        engine, fault = self.engine, self.engine.faults.always
        if fault in ("500", "503"):
            return self._send(int(fault), _error("the engine is not well", int(fault)))
        if self.path == "/metrics":
            return self._send(200, engine.gauges().encode(), "text/plain; version=0.0.4")
        if self.path == "/health":
            return self._send(200, b"", "text/plain")
        if self.path == "/v1/models":
            return self._refused() or self._send(200, engine.document())
        return self._send(404, _error("Not Found", 404))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self._send(404, _error("Not Found", 404))
        engine, faults = self.engine, self.engine.faults
        fault = faults.next.popleft() if faults.next else faults.always
        try:
            conversation = read_messages(_decoded(body["messages"]))
        except (InputError, OSError, ValueError) as error:
            return self._send(400, _error(str(error), 400))
        engine.asked.append({**body, "images": conversation.images})
        if self._refused() or self._refused_body(body, fault):
            return None
        try:
            self._answer(body, conversation, fault)
        except (_Left, OSError):
            engine.left += 1
            self.close_connection = True

    def _refused(self):
        key = self.engine.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self._send(401, _error("Unauthorized", 401))
            return True
        return False

    def _refused_body(self, body, fault):
        """Refuse what vLLM refuses before it begins; says whether it did."""
        engine, kwargs = self.engine, body.get("mm_processor_kwargs")
        said = None
        if fault == "death":
            engine.die()
            raise _Left
        if fault in ("500", "503"):
            said = int(fault), "the engine is not well"
        elif body["model"] != engine.name:
            said = 404, f"The model `{body['model']}` does not exist."
        elif kwargs and not engine.trusted:
            said = 400, "mm_processor_kwargs are not allowed in requests: start with --trust-request-mm-kwargs"
        elif set(kwargs or ()) & set(engine.faults.deadly):
            engine.faults.always = "500"
            said = 500, "EngineCore encountered an issue. See stack trace (above) for the root cause."
        if said:
            self._send(said[0], _error(said[1], said[0]))
        return said is not None

    def _answer(self, body, conversation, fault):
        engine, began_s = self.engine, time.perf_counter()
        with engine.slot():
            queued_s = time.perf_counter() - began_s
            image = conversation.images[0] if conversation.images else None
            try:
                crops = engine.crops(image, body.get("mm_processor_kwargs") or {}) if image else 1
            except ValueError as error:
                return self._send(400, _error(str(error), 400))
            seen = hashlib.sha256(b"".join(one.tobytes() for one in conversation.images)).digest()
            if engine.faults.confuses_caches:
                crops = engine._seen.setdefault(seen, crops)
            key = seen, repr(body.get("mm_processor_kwargs")), repr(conversation.turns)
            cached = key in engine._seen
            engine._seen[key] = True
            visual, text = engine.tokens(conversation, crops)
            words = engine.answer(image, conversation.question, crops, engine.knobs).split(" ")
            told = _Told(self, body, visual, text, visual + text - 1 if cached else 0)
            self._wait((engine.first_ms + engine.image_token_ms * visual) * (CACHED if cached else 1.0))
            told.first_s = time.perf_counter() - began_s - queued_s
            self._say(words, told, fault)
            told.queued_s, told.took_s = queued_s, time.perf_counter() - began_s
            return told.end()

    def _say(self, words, told, fault):
        for number, word in enumerate(words[: told.most]):
            if number:
                self._wait(self.engine.token_ms)
            if fault == "hang":
                self._wait(1e9)
            told.piece(word if number == 0 else f" {word}")
            if fault == "disconnect" and number == min(1, len(words) - 1):
                self.connection.shutdown(socket.SHUT_RDWR)
                raise _Left
        told.finish = "stop" if len(words) <= told.most else "length"

    def _wait(self, ms):
        """Take this time, and notice a client that leaves meanwhile."""
        end_s = time.perf_counter() + self.engine.seconds(ms)
        while (left_s := end_s - time.perf_counter()) > 0:
            if self.engine.faults.deaf:
                time.sleep(left_s)
            elif select.select([self.connection], [], [], min(left_s, 1.0))[0]:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise _Left
                time.sleep(min(left_s, LEAVING_S))  # a next request is there already

    def _send(self, status, document, kind="application/json"):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@dataclass
class _Told:
    """What a client is told of an answer, as a stream or at once."""

    handler: _Handler
    body: dict[str, Any]
    visual: int
    text: int
    cached: int
    said: str = ""
    tokens: int = 0
    finish: str = "stop"
    first_s: float = 0.0
    queued_s: float = 0.0
    took_s: float = 0.0

    @property
    def most(self):
        return self.body.get("max_completion_tokens") or self.body.get("max_tokens") or 16

    def piece(self, text):
        if self.body.get("stream"):
            if not self.tokens:
                self._begin()
                self._line({"role": "assistant", "content": ""})
            if self.handler.engine.faults.pieces:
                self._line({"content": text})
        self.said, self.tokens = self.said + text, self.tokens + 1

    def end(self):
        if not self.body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": self.said}, "finish_reason": self.finish}
            document = self._document("chat.completion", [choice]) | {"usage": self._usage()}
            return self.handler._send(200, document | {"metrics": self._metrics()})
        self._line({} if self.handler.engine.faults.pieces else {"content": self.said}, self.finish)
        if (self.body.get("stream_options") or {}).get("include_usage") and self.handler.engine.faults.counts:
            last = self._document("chat.completion.chunk", []) | {"usage": self._usage()}
            self._chunk(f"data: {json.dumps(last | ({'metrics': m} if (m := self._metrics()) else {}))}\n\n")
        self._chunk("data: [DONE]\n\n")
        return self._chunk("")

    def _begin(self):
        self.handler.send_response(200)
        self.handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.handler.send_header("Transfer-Encoding", "chunked")
        self.handler.end_headers()

    def _line(self, delta, finish=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        self._chunk(f"data: {json.dumps(self._document('chat.completion.chunk', [choice]))}\n\n")

    def _chunk(self, text):
        data = text.encode()
        with contextlib.suppress(OSError if self.handler.engine.faults.deaf else ()):
            self.handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _document(self, kind, choices):
        return {"id": f"chatcmpl-{id(self):x}", "object": kind, "created": 1, "model": self.body["model"],
                "choices": choices}  # fmt: skip

    def _usage(self):
        prompt = self.visual + self.text
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + self.tokens, "completion_tokens": self.tokens}
        details = {"cached_tokens": self.cached, "multimodal_tokens": {"image": self.visual} if self.visual else None}
        return {**usage, "prompt_tokens_details": details if self.handler.engine.details else None}

    def _metrics(self):
        if not self.handler.engine.metrics:
            return None
        after_s = self.took_s - self.queued_s - self.first_s
        return {
            "time_to_first_token_ms": self.first_s * 1e3, "generation_time_ms": after_s * 1e3,
            "queue_time_ms": self.queued_s * 1e3, "mean_itl_ms": after_s * 1e3 / max(self.tokens - 1, 1),
            "tokens_per_second": self.tokens / max(self.took_s - self.queued_s, 1e-9),
        }  # fmt: skip


def _error(message, status):
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def _decoded(messages):
    """Messages with images opened from their data URLs."""

    def opened(part):
        if part["type"] != "image_url":
            return part
        data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
        return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}

    def content(value):
        return value if isinstance(value, str) else [opened(part) for part in value]

    return [{**message, "content": content(message["content"])} for message in messages]
