"""What the real server does at signals and deaths, with the bundled model."""

import asyncio
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from budgetvlm._io import read_json, write_json
from budgetvlm.controller.checkpoint import load_controller
from budgetvlm.controller.value_network import ValueNetwork
from budgetvlm.controller.versions import keep_version, promote
from budgetvlm.decide import CLEARLY_WORSE
from budgetvlm.guard.saved import load_guard
from budgetvlm.serving.learnt_state import EVERY_REQUESTS, STATE_FILE
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.serving.server import _listening
from budgetvlm.vlm.loading import bundled_controller
from tests.fake_replicas import in_background, until
from tests.server_process import ServerProcess, asked, image_part

pytestmark = pytest.mark.alone

KEY = "a-long-secret"
BEARER = {"Authorization": f"Bearer {KEY}"}
QUESTION = {"model": "reference", "messages": asked(image_part()), "latency_budget_ms": 30_000}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(directory):
    shutil.copytree(bundled_controller("reference"), directory / "controller")
    flags = ["--checkpoint", directory / "controller", "--state_dir", directory / "state"]
    flags += ["--log_requests", directory / "requests.sqlite", "--explore", 0.5]
    with ServerProcess(*flags, BUDGETVLM_API_KEY=KEY) as running:
        yield running


def ask(server, **changed):
    return server.ask(QUESTION | changed, headers=BEARER)


PLANTED = 12_345  # requests that a guard says it was calibrated on; it passes this on unchanged


def test_the_guards_state_survives_the_death_of_its_replica(server, directory):
    calibrated, file = load_guard(directory / "controller").to_dict(), directory / "state" / STATE_FILE
    for _ in range(EVERY_REQUESTS):
        assert ask(server)[0] == 200
    until(file.exists, 60)
    state = read_json(file)
    assert state["guard"]["margin"] != calibrated["margin"] or state["guard"]["speed"] != calibrated["speed"]
    write_json(file, {**state, "guard": {**state["guard"], "calibrated_on": PLANTED}})
    server.kill_replica()
    begin = time.monotonic()
    status, _, document = ask(server, latency_budget_ms=1000)
    assert status == 200 or document["error"]["code"] in ("replica_died", "not_ready")
    assert time.monotonic() - begin < 2
    until(lambda: server.ask(method="GET", path="/ready")[0] == 200, 60)
    planted = file.read_text()
    for _ in range(EVERY_REQUESTS):
        assert ask(server)[0] == 200
    until(lambda: file.read_text() != planted, 60)
    assert read_json(file)["guard"]["calibrated_on"] == PLANTED, "the new replica began with another guard"
    assert load_guard(directory / "controller").to_dict() == calibrated


def test_what_was_served_is_kept_with_its_features_and_takes_a_score(server, directory):
    status, _, document = ask(server)
    assert status == 200
    told = server.ask({"id": document["id"], "score": 0.5}, path="/v1/feedback", headers=BEARER)
    assert told[0] == 200, told
    assert server.ask({"id": document["id"], "score": 0.5}, path="/v1/feedback")[0] == 401
    controller = load_controller(directory / "controller")
    connection = sqlite3.connect(directory / "requests.sqlite")
    columns = "image, language, seen_ms, price, allowed, chosen, probabilities, answered, budget_ms, latency_ms, score"
    found = connection.execute(f"SELECT {columns} FROM requests JOIN scores USING (id)").fetchone()
    connection.close()
    image, language, seen_ms, price, allowed, chosen, probabilities, answered, budget_ms, latency_ms, score = found
    sizes = controller.image_input.in_dim, controller.lang_input.in_dim
    assert (len(image) // 2, len(language) // 2) == sizes
    network = ValueNetwork(controller)
    features = [np.frombuffer(one, np.float16).astype(np.float32) for one in (image, language)]
    values = network.values(*features, seen_ms, price)
    allowed = np.unpackbits(np.frombuffer(allowed, np.uint8), count=len(values)).astype(bool)
    assert allowed.all() and budget_ms == 30_000 and seen_ms < budget_ms and score == 0.5
    probabilities = np.frombuffer(probabilities, np.float32)
    assert probabilities[chosen] > 0 and probabilities[values.argmax()] > 0.5
    assert probabilities[values < values.max() - CLEARLY_WORSE - 1e-3].sum() == 0
    assert probabilities.sum() == pytest.approx(1)
    assert dict(controller.knob_space.settings[answered]) == document["budgetvlm"]["setting"]
    assert latency_ms == pytest.approx(document["budgetvlm"]["latency_ms"], rel=0.2)


def test_a_controller_is_swapped_in_by_request_and_by_signal(server, directory):
    (first,) = server.replicas()
    candidate = load_controller(directory / "controller")
    setting = 0  # that it prefers, whatever it is asked
    with torch.no_grad():
        candidate.heads.bias[candidate.head_sum.shape[0] + setting] += 100
    candidate.save_pretrained(directory / "candidate")
    number = keep_version(directory / "controller", directory / "candidate", {})
    assert server.ask(method="POST", path="/admin/reload")[0] == 401
    assert server.ask(method="POST", path="/admin/reload", headers=BEARER)[:3:2] == (
        200, {"status": "reloaded", "replicas": 1, "replicas_up": 1},
    )  # fmt: skip
    until(lambda: len(server.replicas()) == 1, 60)
    (second,) = server.replicas()
    assert second != first
    assert ask(server)[0] == 200
    until(lambda: probabilities_of_last(directory)[setting] >= 0.099, 10)
    assert probabilities_of_last(directory).sum() == pytest.approx(1)
    metrics = server.ask(method="GET", path="/metrics", headers=BEARER)[2]
    assert "budgetvlm_controller_version 1.0" in metrics and f"budgetvlm_candidate_version {number}.0" in metrics
    promote(directory / "controller", number)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: second not in server.replicas(), 60)
    assert ask(server)[0] == 200
    until(lambda: probabilities_of_last(directory)[setting] > 0.4, 10)
    assert f"budgetvlm_controller_version {number}.0" in server.ask(method="GET", path="/metrics", headers=BEARER)[2]


def probabilities_of_last(directory):
    connection = sqlite3.connect(directory / "requests.sqlite")
    (found,) = connection.execute("SELECT probabilities FROM requests ORDER BY number DESC LIMIT 1").fetchone()
    connection.close()
    return np.frombuffer(found, np.float32)


def test_a_controller_that_is_damaged_is_not_swapped_in(server, directory):
    config = directory / "controller" / "config.json"
    whole = config.read_text()
    config.write_text(whole[: len(whole) // 2])
    status, _, document = server.ask(method="POST", path="/admin/reload", headers=BEARER)
    config.write_text(whole)
    assert (status, document["error"]["code"]) == (409, "reload_failed")
    assert str(directory) not in json.dumps(document)
    assert str(config) in server.errors()
    assert ask(server)[0] == 200


def test_a_signal_to_stop_lets_what_was_accepted_finish_and_ends_with_0(server, directory):
    threads = [in_background(lambda: ask(server)) for _ in range(6)]
    until(lambda: any(found for _, found in threads))
    server.process.terminate()
    for thread, _ in threads:
        thread.join(20)
    statuses = [found[0][0] for _, found in threads]
    assert set(statuses) <= {200, 503} and statuses.count(200) > 0
    assert server.process.wait(20) == 0
    assert server.replicas() == []
    assert "Traceback" not in server.errors()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "99999"], "cannot be listened on"), (["--checkpoint", "/nowhere"], "nowhere"),
        (["--api_key_file", "/nowhere"], "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_start_ends_with_2_and_says_why(flags, says):
    command = [sys.executable, "-m", "budgetvlm.cli", "serve", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 2
    assert says in ended.stderr and "Traceback" not in ended.stderr


def test_answers_are_sent_at_once():
    """A socket that does not say it is TCP would wait for the client's acknowledgement before it sends the rest."""

    async def accepted(listener):
        writers = asyncio.Queue()
        async with await asyncio.start_server(lambda _, writer: writers.put_nowait(writer), sock=listener):
            _, client = await asyncio.open_connection(*listener.getsockname())
            writer = await writers.get()
            try:
                return writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            finally:
                writer.close()
                client.close()

    with _listening(ServeOptions(port=0)) as listener:
        assert asyncio.run(accepted(listener))
