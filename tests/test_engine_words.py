"""What engines say that no engine should, what a caller's own function raises, and keys that no message shows."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from budgetvlm.engines import engine_client
from budgetvlm.engines.engine_client import EngineClient
from budgetvlm.engines.fleet_file import ReplicaSpec, read_fleet
from budgetvlm.engines.limit import Limit
from budgetvlm.errors import ConfigError, EngineDownError

END = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class Says(BaseHTTPRequestHandler):
    """Answers all requests with the server's words."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        """Say nothing."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.words)))
        self.end_headers()
        self.wfile.write(self.server.words)


@pytest.fixture(scope="module")
def engine():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Says)
    server.daemon_threads, server.keys = True, []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def spec(engine, **more):
    return ReplicaSpec(f"http://127.0.0.1:{engine.server_port}/v1", **more)


@pytest.mark.parametrize(
    "words",
    [b"null", b"5", b"[]", b'{"choices": [null]}', b'{"choices": [{"delta": "a"}]}', b'{"choices": [], "usage": 5}'],
)
def test_what_is_no_event_is_the_engines_fault(engine, words):
    engine.words = b"data: " + words + b"\n\n" + END
    with pytest.raises(EngineDownError, match="says what no engine says"):
        EngineClient(spec(engine)).chat({"model": "tiny"})


@pytest.mark.parametrize("error", [BrokenPipeError("mine"), ValueError("mine"), TypeError("mine")])
def test_what_a_callers_function_raises_is_not_the_engines_fault(engine, error):
    engine.words = END

    def on_text(piece):
        raise error

    with pytest.raises(type(error)) as raised:
        EngineClient(spec(engine)).chat({"model": "tiny"}, on_text=on_text)
    assert raised.value is error


def test_a_key_is_sent_without_the_line_break_of_its_file(engine, monkeypatch):
    engine.words = b'{"data": [{"id": "tiny"}]}'
    monkeypatch.setenv("ENGINE_KEY", "sk-1234\n")
    assert EngineClient(spec(engine, api_key_env="ENGINE_KEY")).models() == [{"id": "tiny"}]
    assert engine.keys[-1] == "Bearer sk-1234"


@pytest.mark.parametrize("key", ["sk-12\n34", "sk-12\u00e934"])
def test_what_is_no_key_is_refused_and_not_shown(engine, monkeypatch, key):
    monkeypatch.setenv("ENGINE_KEY", key)
    with pytest.raises(ConfigError, match="ENGINE_KEY") as raised:
        EngineClient(spec(engine, api_key_env="ENGINE_KEY"))
    assert "sk-12" not in str(raised.value)


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:8000.*api_key_env") as raised:
        read_fleet("http://somebody:hunter2@127.0.0.1:8000/v1")
    assert "hunter2" not in str(raised.value) and "somebody" not in str(raised.value)


def test_a_connection_is_another_requests_only_once_nothing_cuts_it_any_more(engine, monkeypatch):
    engine.words, free = END, []

    class Looking(Limit):
        @contextmanager
        def cutting(self, connection):
            with super().cutting(connection):
                yield
                free.extend(one.is_idle() for one in client._http._transport._pool.connections)

    monkeypatch.setattr(engine_client, "Limit", Looking)
    client = EngineClient(spec(engine))
    assert client.chat({"model": "tiny"}, end_s=time.perf_counter() + 60).text == "a"
    assert free == [False]
    assert [one.is_idle() for one in client._http._transport._pool.connections] == [True]
