"""What the server refuses, when, and how it says so. No model takes part."""

import base64
import http.server
import io
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from budgetvlm.errors import ConfigError
from budgetvlm.serving import image_files
from budgetvlm.serving.serve_options import ServeOptions
from tests.fake_replicas import CHAT, decoded, in_background, served, until

pytestmark = pytest.mark.alone

BODY_S = 0.4
LIMITS = {
    "max_body_mb": 0.3, "body_timeout_s": BODY_S, "max_images": 2, "max_pixels": 5000, "max_side": 300, "max_text": 100,
    "max_tokens": 50, "max_open": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with served(word_s=0.001, **LIMITS) as running:
        yield running
        assert running.chat()[0] == 200, "after all of this a good request is answered"


def png(width, height, *, pixels=True, format="PNG"):
    """An image's file; without pixels, only a head that claims to have them."""
    if pixels:
        data = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(data, format)
        return data.getvalue()
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def with_images(*urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would run a program on it
SMALL = data_url(png(40, 30))


def asks(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"messages": with_images(SMALL, SMALL)}, 200, None),
        ({"messages": with_images(SMALL, SMALL, SMALL)}, 400, "too_many_images"),
        ({"messages": with_images(data_url(png(301, 2)))}, 413, "image_too_large"),
        ({"messages": with_images(data_url(png(100, 51)))}, 413, "image_too_large"),
        ({"messages": with_images(data_url(png(70, 40)), data_url(png(70, 40)))}, 413, "image_too_large"),
        ({"messages": with_images(data_url(png(60_000, 60_000, pixels=False)))}, 413, "image_too_large"),
        ({"messages": with_images(data_url(png(40, 40, pixels=False)))}, 400, "invalid_image"),
        ({"messages": with_images(data_url(png(40, 30)[:60]))}, 400, "invalid_image"),
        (
            {"messages": with_images(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))},
            400,
            "invalid_image",
        ),
        ({"messages": with_images(data_url(b""))}, 400, "invalid_image"),
        ({"messages": with_images("data:image/png;base64,???")}, 400, "invalid_image_url"),
        ({"messages": with_images("data:text/plain,hello")}, 400, "invalid_image_url"),
        ({"messages": with_images("file:///etc/passwd")}, 400, "invalid_image_url"),
        ({"messages": with_images("http://127.0.0.1:1/a.png")}, 400, "invalid_image_url"),
        ({"messages": with_images("http://[::1")}, 400, "invalid_image_url"),
        ({"messages": asks("x" * 101)}, 400, "context_length_exceeded"),
        ({"messages": asks("\ud800")}, 400, "invalid_request"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request"),
        ({"messages": "read"}, 400, "invalid_request"),
        ({"model": "another"}, 404, "model_not_found"),
        ({"model": "\udfff"}, 400, "invalid_request"),
        ({"model": "reference@0ms"}, 400, "invalid_request"),
        ({"model": "reference@5000.5ms"}, 200, None),
        ({"max_tokens": 51}, 400, "invalid_request"),
        ({"max_tokens": 0}, 400, "invalid_request"),
        ({"max_completion_tokens": 10**30}, 400, "invalid_request"),
        ({"latency_budget_ms": float("nan")}, 400, "invalid_request"),
        ({"latency_budget_ms": float("inf")}, 400, "invalid_request"),
        ({"price": -1}, 400, "invalid_request"),
        ({"stop": ["a"] * 5}, 400, "invalid_request"),
        ({"stop": ""}, 400, "invalid_request"),
        ({"n": 2}, 400, "unsupported_value"),
        ({"logprobs": True}, 400, "unsupported_value"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_value"),
        ({"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "stop": None}, 200, None),
        (dict.fromkeys(("n", "stream", "stream_options", "cut", "price", "max_tokens", "tools")), 200, None),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 1, "user": "x", "unknown": {"a": [1]}}, 200, None),
    ],
)
def test_limits_of_the_request(server, changed, status, code):
    found, _, document = server.chat(**changed)
    assert found == status, document
    if code:
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert document["error"]["code"] == code


@pytest.mark.parametrize(
    ("raw", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe{}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"a\\ud800": 1, "model": {"\\ud800": 1}}', "application/json", 400),
        (b"null", "application/json", 400),
        (b"", "application/json", 400),
        (json.dumps(CHAT).encode(), "text/plain", 415),
        (json.dumps(CHAT).encode(), "application/x-www-form-urlencoded", 415),
        (json.dumps(CHAT).encode(), "Application/JSON; charset=utf-8", 200),
        (b'{"a": "' + b"x" * 300_000 + b'"}', "application/json", 413),
    ],
)
def test_bodies_that_are_no_request(server, raw, kind, status):
    found, _, document = server.ask(raw=raw, headers={"Content-Type": kind})
    assert found == status, document
    assert status == 200 or document["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/elsewhere", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_paths_that_do_not_exist(server, method, path, status):
    found, headers, document = server.ask(method=method, path=path)
    assert (found, document["error"]["type"]) == (status, "invalid_request_error")
    assert status != 405 or headers["allow"]


def head(server, *lines):
    connection = socket.create_connection((server.host, server.port), timeout=10)
    first = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    connection.sendall((first + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode())
    return connection


def status_of(connection):
    """The status of the answer, which the server may give before it has read the body."""
    data = b""
    while b"\r\n" not in data:
        piece = connection.recv(4096)
        assert piece, "no answer"
        data += piece
    return int(data.split()[1])


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server):
    with head(server, "Content-Length: 400000") as connection:
        assert status_of(connection) == 413


def test_a_body_without_a_length_is_refused_once_it_is_too_large(server):
    with head(server, "Transfer-Encoding: chunked") as connection:
        for _ in range(4):  # of the endless ones that could follow
            connection.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
        assert status_of(connection) == 413


def test_a_client_that_sends_a_large_body_whatever_comes_reads_why_it_was_refused(server):
    with head(server, "Content-Length: 8000000") as connection:
        for _ in range(80):
            connection.sendall(b"x" * 100_000)
        assert status_of(connection) == 413


def test_a_slow_body_ends(server):
    begin = time.monotonic()
    with head(server, "Content-Length: 1000") as connection:
        stop = threading.Event()

        def drip():
            while not stop.wait(0.05):
                connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        assert status_of(connection) == 408
        stop.set()
        thread.join()
    assert BODY_S <= time.monotonic() - begin < BODY_S + 2


def test_a_client_that_leaves_while_it_sends_is_forgotten(server):
    with head(server, "Content-Length: 1000") as connection:
        connection.sendall(b"xx")
        until(lambda: server.gate.open == 1)
    until(lambda: server.gate.open == 0)


def test_requests_beyond_those_that_may_be_open_are_refused_unread(server):
    connections = [head(server, "Content-Length: 1000") for _ in range(LIMITS["max_open"])]
    until(lambda: server.gate.open == LIMITS["max_open"])
    status, headers, document = server.chat()
    assert (status, document["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
    assert server.ask(method="GET", path="/health")[0] == 200
    for connection in connections:
        connection.close()
    until(lambda: server.gate.open == 0)


def test_bodies_beyond_what_may_be_held_are_refused():
    with served(word_s=0.001, max_open_mb=0.1, max_body_mb=0.08) as server:
        with head(server, "Content-Length: 75000") as first:
            first.sendall(b"x" * 70_000)
            until(lambda: server.gate.held == 70_000)
            assert server.chat()[0] == 200
            with head(server, "Content-Length: 75000") as second:
                second.sendall(b"x" * 70_000)
                assert status_of(second) == 503
        until(lambda: server.gate.held == 0)


KEY = "a-long-secret"


@pytest.mark.parametrize("given", ["flag", "file", "environment"])
def test_the_key(given, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(f"{KEY}\n")
    options = {"flag": {"api_key": KEY}, "file": {"api_key_file": tmp_path / "key"}, "environment": {}}[given]
    if given == "environment":
        monkeypatch.setenv("BUDGETVLM_API_KEY", KEY)
    with served(word_s=0.001, **options) as server:
        assert KEY not in repr(server.options)
        for bearer, status in (("", 401), ("Bearer wrong", 401), (f"Basic {KEY}", 401), (f"Bearer {KEY}", 200)):
            found, _, document = server.ask(CHAT, headers={"Authorization": bearer} if bearer else {})
            assert found == status
            assert status == 200 or document["error"]["code"] == "invalid_api_key"
        assert server.ask(method="GET", path="/v1/models")[0] == 401
        assert [server.ask(method="GET", path=path)[0] for path in ("/health", "/ready")] == [200, 200]
        assert server.ask(method="POST", path="/health")[0] == 401


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"api_key": "a", "api_key_file": "b"}, "exclude each other"),
        ({"max_open": 0}, "max_open=0 is less than 1"),
        ({"max_body_mb": float("nan")}, "max_body_mb=nan"),
        ({"max_body_mb": float("inf")}, "max_body_mb=inf is not finite"),
        ({"grace_s": float("inf")}, "grace_s=inf is not finite"),
        ({"api_key": " "}, "api_key is empty"),
        ({"host": ""}, "host is empty"),
        ({"max_new_tokens": 2000}, "more than max_tokens=1024"),
        ({"allow_hosts": ("https://a.example/",)}, "is no host"),
    ],
)
def test_options_that_cannot_work(options, says):
    with pytest.raises(ConfigError, match=says):
        ServeOptions(**options)


def test_a_key_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, says in (("empty", "is empty"), ("missing", "cannot be read")):
        with pytest.raises(ConfigError, match=says):
            ServeOptions(api_key_file=tmp_path / name).key()


def test_any_key_that_is_accepted_lets_its_owner_in(monkeypatch):
    monkeypatch.setenv("BUDGETVLM_API_KEY", " schlüssel\r\n")
    with served(word_s=0.001) as server:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            bearer = f"Bearer {key}".encode().decode("latin-1")  # http.client sends each character as one byte
            assert server.ask(CHAT, headers={"Authorization": bearer})[0] == status


@pytest.mark.parametrize(
    ("options", "name", "budget_ms"),
    [
        ({"model_name": "fast@300ms"}, "fast@300ms", None), ({"model_name": "fast@300ms"}, "fast@300ms@5000ms", 5000.0),
        ({"model_path": "."}, Path.cwd().name, None), ({"model_path": "organisation/model"}, "model", None),
    ],
)  # fmt: skip
def test_every_served_name_can_be_asked_for(options, name, budget_ms):
    with served(word_s=0.001, **options) as server:
        status, _, document = server.chat(model=name)
        assert (status, document["budgetvlm"]["budget_ms"]) == (200, budget_ms)
        assert server.get("/v1/models")["data"][0]["id"] == server.options.served_name


def test_base64_is_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(image_files, "ENCODED_PIECE", 8)
    for data in (b"", b"a", b"abcde", b"abcdef", b"abcdefg", bytes(range(256))):
        assert image_files._unpacked("head" + base64.b64encode(data).decode(), 4) == data
    for wrong in ("YWJj" * 3 + "Y", "YWI=" * 4, "YWJjYWI=YWJj", "YWJj YWJj", "é" * 8):
        with pytest.raises(ValueError):  # binascii.Error is one
            image_files._unpacked(wrong, 0)


class Host(http.server.BaseHTTPRequestHandler):
    """Another machine with images, redirects, and a slow one."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/to":
            self.send_response(302)
            self.send_header("Location", "/image.png")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        for _ in range(20 if self.path == "/slow" else 0):
            self.wfile.write(b"x")
            time.sleep(0.1)
        self.wfile.write(b"x" * 400_000 if self.path == "/large" else png(40, 30))

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as running:
        running.asked = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/image.png", 200, ""), ("/to", 400, "status 302"), ("/none", 400, "status 404"), ("/slow", 400, "in time"),
        ("/large", 413, "larger than"),
    ],
)  # fmt: skip
def test_images_of_allowed_hosts_are_fetched_within_limits(host, path, status, says):
    name = f"127.0.0.1:{host.server_port}"
    limits = {"allow_hosts": (name,), "fetch_timeout_s": 0.5, "max_body_mb": 0.3}
    with served(word_s=0.001, **limits) as server:
        host.asked.clear()
        found, _, document = server.chat(messages=with_images(f"http://{name}{path}"))
        assert found == status, document
        assert says in json.dumps(document)
        assert host.asked == [path]
        for other in (f"http://user@{name}{path}", f"http://127.0.0.1{path}", f"ftp://{name}{path}"):
            assert server.chat(messages=with_images(other))[2]["error"]["code"] == "invalid_image_url"
        assert host.asked == [path]


def test_draining_finishes_what_was_accepted_and_refuses_the_rest():
    with served(word_s=0.3) as server:
        thread, found = in_background(server.chat)
        until(lambda: server.replicas[0].begun)
        drained, _ = in_background(lambda: server.run(server.gate.drain(10)))
        until(lambda: server.gate.draining)
        status, headers, document = server.chat()
        assert (status, document["error"]["code"], headers["connection"]) == (503, "shutting_down", "close")
        assert server.ask(method="GET", path="/ready")[0] == 503
        assert server.ask(method="GET", path="/health")[0] == 200
        assert drained.is_alive() and not found, "it waits for what was accepted"
        thread.join(5)
        drained.join(5)
        assert found[0][0] == 200


def test_draining_ends_after_its_time():
    with served(word_s=0.5) as server:
        thread, _ = in_background(server.chat)
        until(lambda: server.replicas[0].begun)
        begin = time.monotonic()
        server.run(server.gate.drain(0.2))
        assert time.monotonic() - begin < 0.45
        thread.join(5)


def test_our_own_mistakes_show_no_trace(monkeypatch):
    with served() as server:
        monkeypatch.setattr(server.jobs, "submit", lambda job: 1 / 0)
        status, _, document = server.chat()
        assert (status, document["error"]["message"]) == (500, "the server failed on this request")


def test_a_broken_stream_says_so_in_its_last_event():
    with served(word_s=0.1) as server:
        thread, found = in_background(lambda: server.chat(stream=True))
        until(lambda: any(server.replicas[0].said.values()))
        server.kill(server.replicas[0])
        thread.join(5)
        lines = [line.removeprefix("data: ") for line in found[0][2].splitlines() if line]
        assert lines[-1] == "[DONE]" and lines[-3] == "event: error"
        assert decoded(lines[-2])["error"]["code"] == "replica_died"
