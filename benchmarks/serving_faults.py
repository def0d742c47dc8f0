"""What the server does with clients that are broken, slow, hostile or gone; prints what came back, by status.

    python benchmarks/serving_faults.py                                  # all but schemathesis, about 3 minutes
    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install schemathesis   # in an environment of its own
    python benchmarks/serving_faults.py --schemathesis /tmp/fuzz/bin/schemathesis --cases 10000

It starts `budgetvlm serve` with the bundled model. After each kind of fault a good request has to be answered. The exit
code is 1 if it is not, if there was a status of 500 or more other than 503, if an answer held a trace or a path, or if
the server keeps what the faults brought (memory, files, requests that stay open).
"""

import argparse
import base64
import http.client
import io
import json
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIGNS = ROOT / "examples" / "signs.png"
BODY_S = 1.0
FLAGS = ["--body_timeout_s", str(BODY_S), "--max_body_mb", "2", "--num_threads", "1"]
PRIVATE = re.compile(rb"Traceback|site-packages|/src/budgetvlm|File \\?\"/")
CLOSED = "no answer: the connection was closed"
SETTLED_S = 30.0
MOST_GROWTH_MB = 150.0  # of the server's memory over all faults; caches and the allocator's arenas included


@dataclass
class Outcome:
    """What one kind of fault brought.

    Attributes:
        statuses: how often each came back. told: answers that held something private.
    """

    name: str
    statuses: Counter = field(default_factory=Counter)
    told: int = 0

    @property
    def holds(self):
        """Whether nothing came back that should not."""
        numbers = [status for status in self.statuses if isinstance(status, int)]
        return not self.told and all(status < 500 or status == 503 for status in numbers)


class Server:
    """The server as a process, and ways to ask it."""

    def __init__(self):
        self._errors = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 (ends with the process)
        command = [sys.executable, "-m", "budgetvlm.cli", "serve", "--port", "0", *FLAGS]
        self.process = subprocess.Popen(command, stderr=self._errors)
        while not (found := re.search(r"serving at http://([\d.]+):(\d+)", self.errors())):
            if self.process.poll() is not None:
                sys.exit(self.errors())
            time.sleep(0.1)
        self.host, self.port = found[1], int(found[2])

    def errors(self):
        """What it wrote to standard error."""
        return Path(self._errors.name).read_text()

    def post(self, body, outcome, kind="application/json"):
        """Send a body and count what comes back."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": kind})
            response = connection.getresponse()
            outcome.statuses[response.status] += 1
            outcome.told += bool(PRIVATE.search(response.read()))
        except (OSError, http.client.HTTPException):
            outcome.statuses[CLOSED] += 1
        finally:
            connection.close()

    def metrics(self):
        """Each sample of /metrics."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        }

    def statuses(self):
        """How many requests of each status there were."""
        found = Counter()
        for name, value in self.metrics().items():
            if match := re.match(r'budgetvlm_http_requests_total\{.*status="(\d+)"', name):
                found[int(match[1])] += int(value)
        return found


def question(url, **changed):
    """The body of a good request, with an image."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "read the sign in red"}]
    return {"model": "reference", "messages": [{"role": "user", "content": parts}], **changed}


def data_url(data, kind="png"):
    """An image's file as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(document):
    """A document as the bytes of a body."""
    return json.dumps(document).encode()


GOOD = encoded(question(data_url(SIGNS.read_bytes())))


def files():
    """The example as a file of each format."""
    image, found = Image.open(SIGNS).convert("RGB"), {}
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        data = io.BytesIO()
        image.save(data, kind)
        found[kind] = data.getvalue()
    return found


def damaged(data, rng):
    """A file that is cut off, or has some bytes changed."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        changed[rng.randrange(len(changed) if rng.random() < 0.3 else min(200, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def chunk(kind, data):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs():
    """Files that claim or unfold to far more than they are: pixels, text, frames."""
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (16_385, 1), (6_000, 6_000), (0, 5)):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        yield b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9))
    pixels = chunk(b"IDAT", zlib.compress(bytes(50_000_000), 9))
    yield b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", zlib.compress(bytes(52))) + chunk(b"IEND", b"")
    yield b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")
    frames = io.BytesIO()
    images = [Image.new("P", (50, 50), number) for number in range(200)]
    images[0].save(frames, "gif", save_all=True, append_images=images[1:])
    yield frames.getvalue()


def with_bad_bodies(server, outcome, rng, scale):
    """Bodies cut off or changed anywhere, and JSON that is odd."""
    odd = [
        b"", b"null", b"[]", b'""', b"0", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"{" * 3, b'{"model": 1e999}',
        b'{"model": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800"}', GOOD + GOOD, GOOD[:-1], b"\0" * 1000,
        *(encoded(question(url)) for url in (data_url(b""), "x" * 100_000, data_url(b"A" * 3_000_000))),
    ]  # fmt: skip
    for body in odd:
        server.post(body, outcome)
        server.post(body, outcome, kind="text/plain")
    for _ in range(3 * scale):
        server.post(damaged(GOOD, rng), outcome)


def with_odd_values(server, outcome, rng, scale):
    """Fields of wrong types and sizes, in otherwise good requests."""
    values = [
        None, True, -1, 0, 1, 1.5, 10**30, float("nan"), float("inf"), 5e-324, "", "x", "\ud800", "\0", "é" * 300, [],
        {}, [None], {"a": {}}, [[]] * 50, "x" * 30_000,
    ]  # fmt: skip
    names = (
        "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "n", "price",
        "latency_budget_ms", "when_infeasible", "cut", "temperature", "logit_bias", "tools", "response_format", "seed",
    )  # fmt: skip
    good = question(data_url(SIGNS.read_bytes()), max_tokens=4)
    for name in names:
        for value in values:
            server.post(encoded({**good, name: value}), outcome)
    texts = ["\0", " ", "\n" * 100, "é", "😀" * 500, "<image>" * 5, "</s><s>", "\u202e\u200b", "x" * 19_000, "%s{}\\"]
    for text in texts:
        for role in ("system", "user", "assistant"):
            messages = [{"role": role, "content": text}, *good["messages"]]
            server.post(encoded({**good, "messages": messages}), outcome)
            server.post(encoded({**good, "messages": messages[:1]}), outcome)


def with_bad_images(server, outcome, rng, scale):
    """Images that are cut off or damaged, in six formats."""
    for kind, data in files().items():
        for _ in range(scale):
            server.post(encoded(question(data_url(damaged(data, rng), kind), max_tokens=1)), outcome)


def with_bombs(server, outcome, rng, scale):
    """Images that claim to be far larger than they are."""
    for bomb in bombs():
        server.post(encoded(question(data_url(bomb), max_tokens=1)), outcome)


def head_of(body):
    """The head of a request with a body."""
    lines = "POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()


def with_slow_bodies(server, outcome, rng, scale):
    """Clients that send a byte now and then."""

    def drip():
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(head_of(GOOD))
            connection.settimeout(0.1)
            end, answer = time.monotonic() + 5 * BODY_S, b""
            while time.monotonic() < end and not answer:
                try:
                    connection.sendall(b" ")
                    answer = connection.recv(100)
                except TimeoutError:
                    continue
                except OSError:
                    break
            outcome.statuses[int(answer.split()[1]) if answer else CLOSED] += 1

    in_parallel(drip, 40)


def with_leaving_clients(server, outcome, rng, scale):
    """Clients that are gone after a random while: in the head, in the body, in the queue, in the stream."""

    def leave():
        body = encoded(question(data_url(SIGNS.read_bytes()), stream=rng.random() < 0.5, max_tokens=64))
        data = head_of(body) + body
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
            time.sleep(rng.random() * 0.3)

    for _ in range(scale):
        in_parallel(leave, 8)
    outcome.statuses["left"] += 8 * scale


def in_parallel(call, number):
    """Run a call in several threads at once."""
    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def with_schemathesis(server, outcome, program, cases):
    """Cases made from the OpenAPI description; what came back is what the server counted."""
    before, seed, ran = server.statuses(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "openapi.json"
        description.write_text(json.dumps(described(server)))
        while ran < cases:
            seed += 1
            subprocess.run(
                [program, "run", description, "--url", f"http://{server.host}:{server.port}", "-n", "2000",
                 "--phases", "examples,coverage,fuzzing", "--seed", str(seed), "--continue-on-failure", "--no-shrink",
                 "--checks", "not_a_server_error", "--request-timeout", "60", "--warnings", "off"],
                cwd=folder, stdout=subprocess.DEVNULL, check=False,
            )  # fmt: skip
            ran = (server.statuses() - before).total()
            print(f"  {ran} cases", flush=True)
    outcome.statuses += server.statuses() - before


def described(server):
    """The OpenAPI description, with values that let more of the cases reach the model."""
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("GET", "/openapi.json")
    document = json.loads(connection.getresponse().read())
    schemas = document["components"]["schemas"]
    schemas["ChatRequest"]["properties"]["model"]["enum"] = ["reference", "reference@50ms"]
    rng = random.Random(0)
    small = io.BytesIO()
    Image.open(SIGNS).convert("RGB").resize((90, 60)).save(small, "png")
    urls = [data_url(small.getvalue()), *(data_url(damaged(small.getvalue(), rng)) for _ in range(5))]
    schemas["ImageURL"]["properties"]["url"]["enum"] = urls
    return document


def is_answered(server):
    """Whether a good request is answered rightly, with nothing left of those before."""
    end = time.monotonic() + SETTLED_S
    while server.metrics()["budgetvlm_requests_open"] and time.monotonic() < end:
        time.sleep(0.05)
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", GOOD, {"Content-Type": "application/json"})
    response = connection.getresponse()
    document = json.loads(response.read())
    return response.status == 200 and document["choices"][0]["message"]["content"] == "X85"


def main(argv=None):
    """Try all faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", metavar="PROGRAM", help="where it is installed; left out if not given")
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="of schemathesis (default: 10000)")
    parser.add_argument("--scale", type=int, default=100, metavar="N", help="tries of each random fault (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    server, rng = Server(), random.Random(args.seed)
    kinds = [
        with_bad_bodies, with_odd_values, with_bad_images, with_bombs, with_slow_bodies, with_leaving_clients,
    ]  # fmt: skip
    try:
        right = is_answered(server)
        before = server.metrics()
        for kind in kinds:
            outcome = Outcome(kind.__doc__)
            kind(server, outcome, rng, args.scale)
            right &= shown(outcome, server)
        if args.schemathesis:
            outcome = Outcome(with_schemathesis.__doc__)
            with_schemathesis(server, outcome, args.schemathesis, args.cases)
            right &= shown(outcome, server)
        return 0 if kept_nothing(server, before) and right else 1
    finally:
        server.process.terminate()
        print(f"the server ended with {server.process.wait(60)}")


def shown(outcome, server):
    """Print one kind of fault; whether all is well."""
    answered = is_answered(server)
    counts = ", ".join(f"{status}: {number}" for status, number in sorted(outcome.statuses.items(), key=str))
    print(f"{'ok  ' if outcome.holds and answered else 'MISS'} {outcome.name}\n     {counts}")
    if outcome.told:
        print(f"     {outcome.told} answers told of traces or paths")
    if not answered:
        print("     the next good request was not answered")
    return outcome.holds and answered


def kept_nothing(server, before):
    """Whether the server is as it was."""
    after = server.metrics()
    growth_mb = (after["process_resident_memory_bytes"] - before["process_resident_memory_bytes"]) / 1e6
    files = after["process_open_fds"] - before["process_open_fds"]
    traces = server.errors().count("Traceback")
    well = growth_mb < MOST_GROWTH_MB and files <= 8 and not after["budgetvlm_requests_open"] and not traces
    print(
        f"{'ok  ' if well else 'MISS'} left behind: {growth_mb:+.1f} MB, {files:+.0f} open files, "
        f"{after['budgetvlm_requests_open']:.0f} requests, {after['budgetvlm_replica_restarts_total']:.0f} replicas "
        f"died, {traces} traces in its log"
    )
    return well


if __name__ == "__main__":
    sys.exit(main())
