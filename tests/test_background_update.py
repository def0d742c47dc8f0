"""Updates beside the server: at the lowest priority, a reload only where something changed, and whatever they do."""

import json
import os
import sys
import time

import pytest

from budgetvlm.serving import background_update
from budgetvlm.serving.serve_options import ServeOptions
from tests.fake_replicas import Served, in_background, until

TOLD = {"action": "promoted", "why": "version 2 is better", "drift": {"features": True, "accuracy": False}}


@pytest.fixture
def options(tmp_path):
    (data := tmp_path / "profile.json").write_text("{}")
    return ServeOptions(
        log_requests=tmp_path / "requests.sqlite", checkpoint=tmp_path, update_every=0.05, update_data=data
    )


def saying(monkeypatch, text, code=0):
    """Have updates say this, and return where they write their priorities."""
    words = [sys.executable, "-c", f"import sys; print({text!r}); print('it fails', file=sys.stderr); sys.exit({code})"]
    monkeypatch.setattr(background_update, "update_command", lambda options: words)


def test_the_command_is_that_of_a_user(options):
    from budgetvlm.commands.catalogue import command_parser

    command = background_update.update_command(options)
    assert command[1:4] == ["-m", "budgetvlm.cli", "update"]
    args = command_parser("update").parse_args(command[4:])
    assert (args.checkpoint, args.requests, args.data) == (
        options.checkpoint,
        options.log_requests,
        options.update_data,
    )


def test_another_version_is_read_and_no_request_is_dropped(options, monkeypatch):
    saying(monkeypatch, json.dumps({**TOLD, "versions": {"serving": 2, "candidate": None}}))
    with Served(options) as server:
        asking = [in_background(server.chat) for _ in range(8)]
        until(lambda: server.jobs.reloads > 1)
        for thread, answers in asking:
            thread.join()
            assert answers[0][0] == 200
        metrics = server.get("/metrics")
        assert 'budgetvlm_updates_total{action="promoted"}' in metrics
        assert 'budgetvlm_drift{of="features"} 1.0' in metrics and 'budgetvlm_drift{of="accuracy"} 0.0' in metrics
        assert "budgetvlm_controller_version 0.0" in metrics


def test_what_cannot_be_read_is_tried_again_after_the_next_update(options, monkeypatch):
    saying(monkeypatch, json.dumps({**TOLD, "versions": {"serving": 2, "candidate": None}}))
    with Served(options) as server:
        server.kind.fails = True
        until(lambda: server.jobs.updates.results["promoted"] > 1)
        assert server.jobs.reloads == 0 and server.chat()[0] == 200
        server.kind.fails = False
        until(lambda: server.jobs.reloads > 0)


def test_without_a_change_nothing_is_read_and_a_line_is_said_once(options, monkeypatch, caplog):
    saying(monkeypatch, json.dumps({**TOLD, "versions": {}}))
    with Served(options) as server:
        until(lambda: server.jobs.updates.results["promoted"] > 2)
        assert server.jobs.reloads == 0
    assert [record.getMessage() for record in caplog.records].count("update: version 2 is better") == 1


@pytest.mark.parametrize(("text", "code"), [("no document", 0), ("{}", 0), ("error", 2), ('{"action": 1}', 0)])
def test_an_update_that_fails_is_counted_and_tried_again(options, monkeypatch, caplog, text, code):
    saying(monkeypatch, text, code)
    with Served(options) as server:
        until(lambda: server.jobs.updates.results["failed"] > 1)
        assert server.chat()[0] == 200
    assert "could not be updated" in caplog.text and ("it fails (exit status 2)" in caplog.text) == bool(code)


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
