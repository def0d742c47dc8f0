"""Updates beside the server: at the lowest priority, a reload only where something changed, and whatever they do."""

import json
import os
import sys
import time

import pytest

from budgetvlm.serving import background_update
from budgetvlm.serving.serve_options import ServeOptions
from tests.fake_replicas import Served, in_background, until

BETTER = {"decision": "promote", "why": "it is better"}
TOLD = {"verdict": BETTER, "new_candidate": None, "why": "no other is trained", "drift": ["requests differ"]}


@pytest.fixture
def options(tmp_path):
    return ServeOptions(
        log_requests=tmp_path / "requests.sqlite", checkpoint=tmp_path, update_every=0.05, update_data="profile.json"
    )


def saying(monkeypatch, text, code=0):
    """Have updates say this, and return where they write their priorities."""
    words = [sys.executable, "-c", f"import sys; print({text!r}); print('it fails', file=sys.stderr); sys.exit({code})"]
    monkeypatch.setattr(background_update, "update_command", lambda options: words)


def test_another_version_is_read_and_no_request_is_dropped(options, monkeypatch):
    saying(monkeypatch, json.dumps(TOLD))
    with Served(options) as server:
        asking = [in_background(server.chat) for _ in range(8)]
        until(lambda: server.jobs.reloads > 1)
        for thread, answers in asking:
            thread.join()
            assert answers[0][0] == 200
        metrics = server.get("/metrics")
        assert 'budgetvlm_updates_total{result="promote"}' in metrics and "budgetvlm_drift 1.0" in metrics
        assert "budgetvlm_controller_version 0.0" in metrics


def test_without_a_change_nothing_is_read_and_a_line_is_said_once(options, monkeypatch, caplog):
    saying(monkeypatch, json.dumps({**TOLD, "verdict": {"decision": "wait", "why": "too early"}}))
    with Served(options) as server:
        until(lambda: server.jobs.updates.results["wait"] > 2)
        assert server.jobs.reloads == 0
    said = "update: wait: too early; no other is trained; requests differ"
    assert [record.getMessage() for record in caplog.records].count(said) == 1


def test_a_new_candidate_is_taken_up_and_what_cannot_be_read_is_tried_again(options, monkeypatch):
    saying(monkeypatch, json.dumps({**TOLD, "verdict": None, "new_candidate": 2}))
    with Served(options) as server:
        server.kind.fails = True
        until(lambda: server.jobs.updates.results["candidate"] > 0)
        saying(monkeypatch, json.dumps({**TOLD, "verdict": None}))
        until(lambda: server.jobs.updates.results["nothing"] > 0)
        assert server.jobs.reloads == 0
        server.kind.fails = False
        until(lambda: server.jobs.reloads == 1)


@pytest.mark.parametrize(("text", "code"), [("no document", 0), ("{}", 0), ("error", 2), ("[]", 0)])
def test_an_update_that_fails_is_counted_and_tried_again(options, monkeypatch, caplog, text, code):
    saying(monkeypatch, text, code)
    with Served(options) as server:
        until(lambda: server.jobs.updates.results["failed"] > 1)
        assert server.chat()[0] == 200
    assert "could not be updated" in caplog.text and ("it fails" in caplog.text) == bool(code)


def test_it_runs_at_the_lowest_priority_and_ends_with_the_server(options, monkeypatch, tmp_path):
    number = tmp_path / "number"
    code = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(background_update, "update_command", lambda options: [sys.executable, "-c", code])
    with Served(options) as server:
        until(lambda: number.exists() and number.read_text())
        process = int(number.read_text())
        until(lambda: os.getpriority(os.PRIO_PROCESS, process) == 19)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert server.replicas
