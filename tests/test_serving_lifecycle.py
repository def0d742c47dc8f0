"""Replicas die, are started anew and exchanged; clients leave. No model takes part."""

import asyncio
import json
import os
import signal
import socket
import threading
import time

import pytest

from budgetvlm.serving import server as server_module
from budgetvlm.serving.dispatcher import Dispatcher
from budgetvlm.serving.replicas import ProcessReplica, ReplicaError
from budgetvlm.serving.serve_options import ServeOptions
from tests.fake_replicas import CHAT, WORDS, FakeReplica, in_background, served, until


def test_a_replica_that_dies_fails_its_request_at_once_and_is_back():
    with served(word_s=0.5) as server:
        thread, found = in_background(lambda: server.chat(latency_budget_ms=60_000))
        until(lambda: server.replicas[0].begun)
        server.kill(server.replicas[0])
        thread.join(2)
        status, headers, document = found[0]
        assert (status, document["error"]["code"]) == (503, "replica_died")
        assert int(headers["retry-after"]) >= 1
        until(lambda: server.jobs.ready)
        assert server.jobs.restarts == 1
        server.kind.word_s = 0.001
        assert server.chat()[0] == 200


def test_an_idle_replica_that_dies_is_started_anew_before_anybody_asks():
    with served() as server:
        server.kill(server.replicas[0])
        until(lambda: len(server.replicas) == 2 and server.jobs.ready)
        assert server.chat()[0] == 200
        assert not server.replicas[0].begun


def test_without_a_replica_those_who_cannot_wait_are_told_and_the_others_are_answered():
    with served(word_s=0.1) as server:
        first, _ = in_background(server.chat)
        until(lambda: server.replicas[0].begun)
        urgent, refused = in_background(lambda: server.chat(latency_budget_ms=1))
        patient, answered = in_background(server.chat)
        until(lambda: server.jobs.waiting == 2)
        server.kill(server.replicas[0])
        for thread in (first, urgent, patient):
            thread.join(5)
        assert (refused[0][0], refused[0][2]["error"]["code"]) == (503, "not_ready")
        assert answered[0][0] == 200


def test_while_no_replica_can_be_started_requests_are_refused_at_once():
    with served(word_s=0.2) as server:
        first, _ = in_background(server.chat)
        until(lambda: server.replicas[0].begun)
        patient, told = in_background(server.chat)
        until(lambda: server.jobs.waiting == 1)
        server.kind.fails = True
        server.kill(server.replicas[0])
        first.join(5)
        patient.join(5)
        assert told[0][0] == 503
        status, headers, document = server.chat()
        assert (status, document["error"]["code"]) == (503, "not_ready")
        assert 1 <= int(headers["retry-after"]) <= 60
        assert server.ask(method="GET", path="/ready")[0] == 503
        assert server.ask(method="GET", path="/health")[0] == 200


def test_a_client_that_leaves_is_not_worked_for_any_longer():
    with served(word_s=0.1) as server:
        leave_after_start(server, stream=False)
        (job,) = server.replicas[0].begun
        until(lambda: job.id in server.replicas[0].stopped)
        assert len(server.replicas[0].said[job.id]) < len(WORDS)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_never_reaches_a_replica(stream):
    with served(word_s=0.1) as server:
        first, _ = in_background(server.chat)
        until(lambda: server.replicas[0].begun)
        connection = started(server, stream)
        until(lambda: server.jobs.waiting == 1)
        connection.close()
        until(lambda: server.jobs.waiting == 0)
        first.join(5)
        assert server.chat()[0] == 200
        assert len(server.replicas[0].begun) == 2


def test_a_client_that_leaves_before_the_first_piece_of_a_stream_stops_the_work():
    with served(word_s=0.3) as server:
        leave_after_start(server, stream=True)
        (job,) = server.replicas[0].begun
        until(lambda: job.id in server.replicas[0].stopped)
        assert server.replicas[0].said[job.id] == []


def leave_after_start(server, stream):
    connection = started(server, stream)
    until(lambda: server.replicas[0].begun)
    connection.close()


def started(server, stream):
    """Send a request and read nothing."""
    body = json.dumps({**CHAT, "stream": stream}).encode()
    connection = socket.create_connection((server.host, server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_reload_drops_no_request():
    with served(word_s=0.02, replicas=2) as server:
        found, ends = [], time.monotonic() + 1.0

        def ask():
            while time.monotonic() < ends:
                found.append(server.chat()[0])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        server.run(server.jobs.reload())
        for thread in threads:
            thread.join(5)
        old, new = server.replicas[:2], server.replicas[2:]
        assert set(found) == {200}
        assert len(new) == 2 and all(replica.begun for replica in new)
        assert not any(replica.alive for replica in old)
        assert server.jobs.restarts == 0


def test_a_replica_that_never_took_its_place_is_ended_by_the_next_reload():
    with served(word_s=0.2) as server:
        thread, found = in_background(server.chat)
        until(lambda: server.replicas[0].begun)
        for _ in range(2):
            server.run(server.jobs.reload())
        thread.join(5)
        assert found[0][0] == 200
        until(lambda: [replica.alive for replica in server.replicas] == [False, False, True])
        assert server.chat()[0] == 200
        assert server.jobs.restarts == 0


def test_a_reload_while_the_first_replica_still_starts_replaces_it():
    async def reloaded_early():
        jobs = Dispatcher(ServeOptions(), kind)
        starting = asyncio.create_task(jobs.start())
        await asyncio.sleep(0)
        await asyncio.gather(jobs.reload(), starting)
        await asyncio.sleep(0.05)
        assert [replica.alive for replica in kind.made] == [False, True] and jobs.ready
        await jobs.close()

    kind = type("Fake", (FakeReplica,), {"made": []})
    asyncio.run(reloaded_early())


def test_a_signal_to_reload_while_the_model_is_opened_ends_nothing(monkeypatch):
    class Opening(Dispatcher):
        async def start(self):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
            raise ReplicaError(f"{len(told)} reloads")

        async def reload(self):
            told.append(self)

    told, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)  # so that pytest lives on where nobody listens
    monkeypatch.setattr(server_module, "Dispatcher", Opening)
    try:
        with pytest.raises(ReplicaError, match="1 reloads"):
            server_module.serve(ServeOptions(port=0))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_cannot_be_started_is_no_end_of_trying(monkeypatch):
    async def none_left(*command, **options):
        raise OSError("Too many open files")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", none_left)
    with pytest.raises(ReplicaError, match="cannot be started: Too many open files"):
        asyncio.run(ProcessReplica(ServeOptions()).start())


def test_a_controller_that_cannot_be_opened_leaves_the_one_before():
    with served() as server:
        server.kind.fails = True
        with pytest.raises(Exception, match="cannot be read"):
            server.run(server.jobs.reload())
        assert server.chat()[0] == 200
        assert server.replicas[0].alive and not server.replicas[0].retired
