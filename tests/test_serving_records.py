"""What is kept of requests: metrics, lines of the access log, spans. No model takes part."""

import json
import re
import sys
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from budgetvlm.errors import ConfigError
from budgetvlm.serving import tracing
from budgetvlm.serving.app import make_app
from budgetvlm.serving.serve_options import ServeOptions
from tests.fake_replicas import CHAT, WORDS, FakeReplica, in_background, served, until

SECRET = "what does the letter say"


@pytest.fixture
def server(tmp_path):
    with served(word_s=0.02, access_log=tmp_path / "access.log", max_text=100) as running:
        running.log = tmp_path / "access.log"
        yield running


def values(server):
    """The present value of each sample, by its name and labels."""
    _, headers, text = server.ask(method="GET", path="/metrics")
    assert headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(text))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def lines(server):
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def test_metrics_count_what_came_of_requests(server):
    assert server.chat(latency_budget_ms=60_000)[0] == 200
    assert server.chat(latency_budget_ms=1)[2]["budgetvlm"]["budget_met"] is False
    assert server.chat(stream=True)[0] == 200
    assert server.chat(model="another")[0] == 404
    assert server.chat(messages=[{"role": "user", "content": "x" * 101}])[0] == 400
    assert server.ask(method="BREW", path="/coffee/17")[0] == 404
    until(lambda: values(server).get(("budgetvlm_budgets_total", "none")))
    found = values(server)
    expected = {
        ("budgetvlm_http_requests_total", "POST", "/v1/chat/completions", "200"): 3,
        ("budgetvlm_http_requests_total", "POST", "/v1/chat/completions", "404"): 1,
        ("budgetvlm_http_requests_total", "other", "other", "404"): 1,
        ("budgetvlm_refusals_total", "model_not_found"): 1,
        ("budgetvlm_refusals_total", "context_length_exceeded"): 1,
        ("budgetvlm_budgets_total", "met"): 1,
        ("budgetvlm_budgets_total", "missed"): 1,
        ("budgetvlm_budgets_total", "none"): 1,
        ("budgetvlm_settings_total", "max_crops=4,top_k=2"): 3,
        ("budgetvlm_tokens_total", "output"): 3 * len(WORDS),
        ("budgetvlm_request_duration_seconds_count",): 3,
        ("budgetvlm_stage_duration_seconds_count", "queue"): 3,
        ("budgetvlm_queue_length",): 0,
        ("budgetvlm_requests_open",): 0,
        ("budgetvlm_replicas",): 1,
        ("budgetvlm_replica_restarts_total",): 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["budgetvlm_stage_duration_seconds_sum", "vision"] == pytest.approx(0.003)
    assert 0.06 <= found["budgetvlm_request_duration_seconds_sum",] < 10


def test_names_follow_the_habits_of_prometheus(server):
    server.chat()
    _, _, text = server.ask(method="GET", path="/metrics")
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("budgetvlm_")]
    assert len(families) > 12
    for family in families:
        assert re.fullmatch(r"budgetvlm_[a-z_]+", family.name) and family.documentation.endswith(".")
        assert not re.search(r"_(ms|milliseconds|count|sum|bucket|total)$", family.name)
        assert family.type != "histogram" or family.name.endswith("_seconds")
        assert "{" not in family.documentation


def test_the_queue_is_read_when_it_is_asked_for(server):
    threads = [in_background(server.chat)[0] for _ in range(3)]
    until(lambda: values(server)["budgetvlm_queue_length",] == 2)
    assert values(server)["budgetvlm_requests_open",] == 3
    for thread in threads:
        thread.join(5)


def test_a_line_says_what_came_of_a_request_and_nothing_of_what_was_asked(server):
    status, headers, document = server.chat(messages=[{"role": "user", "content": SECRET}], latency_budget_ms=60_000)
    until(lambda: len(lines(server)) == 1)
    (line,) = lines(server)
    assert line["request"] == headers["x-request-id"]
    assert (line["status"], line["path"], line["client"]) == (status, "/v1/chat/completions", "127.0.0.1")
    assert (line["id"], line["budget_ms"], line["budget_met"]) == (document["id"], 60_000, True)
    assert line["latency_ms"] == pytest.approx(document["budgetvlm"]["latency_ms"])
    assert SECRET not in server.log.read_text() and "".join(WORDS) not in server.log.read_text()


def test_a_line_has_the_budget_that_was_given_not_what_is_left_of_it_for_the_replica(server):
    server.kind.answered = lambda replica, job: {**FakeReplica.answered(replica, job), "latency_ms": 0.0}
    for _ in range(2):  # the first shows how long the way back takes, which is taken off the second one's budget
        server.chat(latency_budget_ms=60_000)
    until(lambda: len(lines(server)) == 2)
    assert server.replicas[0].begun[1].header()["budget_ms"] < 60_000
    assert [line["budget_ms"] for line in lines(server)] == [60_000, 60_000]


def test_a_log_that_cannot_be_written_is_said_before_a_model_is_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"access_log=.*No such file or directory; give a file"):
        make_app(ServeOptions(access_log=tmp_path / "nowhere" / "log"))


def test_probes_are_logged_only_where_they_fail(server):
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/nowhere?key=secret"):
        server.ask(method="GET", path=path)
    until(lambda: len(lines(server)) == 2)
    assert [(line["path"], line["status"], line.get("error")) for line in lines(server)] == [
        ("/v1/models", 200, None), ("/nowhere", 404, "not_found"),
    ]  # fmt: skip
    assert "secret" not in server.log.read_text()


def test_texts_are_logged_where_that_was_asked_for(tmp_path):
    with served(word_s=0.001, access_log=tmp_path / "log", log_texts=True) as server:
        server.chat(messages=[{"role": "user", "content": SECRET}])
        until(lambda: (tmp_path / "log").read_text())
        line = json.loads((tmp_path / "log").read_text())
        assert (line["messages"][0]["content"], line["answer"]) == (SECRET, "".join(WORDS))


def test_a_log_that_is_moved_away_is_begun_anew(server):
    server.chat()
    until(lambda: lines(server))
    server.log.rename(server.log.with_suffix(".1"))
    server.chat()
    until(lambda: server.log.exists() and len(lines(server)) == 1)


def test_a_client_that_left_is_counted(server):
    left = threading.Event()

    def leave():
        with pytest.raises(TimeoutError):
            server.ask(CHAT, timeout=0.03)
        left.set()

    in_background(leave)[0].join()
    assert left.is_set()
    until(lambda: values(server)["budgetvlm_clients_left_total",] == 1)
    until(lambda: lines(server))
    assert lines(server)[0]["client_left"] is True


class Span:
    """What a span of OpenTelemetry has to do, kept to be looked at."""

    def __init__(self, name, start, parent, made):
        self.name, self.start, self.parent, self.attributes, self.end_time = name, start, parent, {}, None
        made.append(self)

    def is_recording(self):
        return True

    def set_attribute(self, name, value):
        self.attributes[name] = value

    def end(self, at):
        self.end_time = at


def test_spans_where_opentelemetry_is_installed(monkeypatch):
    trace = pytest.importorskip("opentelemetry.trace")
    made = []

    class Tracer:
        def start_span(self, name, context=None, kind=None, start_time=None):
            return Span(name, start_time, context, made)

    real = trace.get_tracer
    monkeypatch.setattr(
        trace, "get_tracer", lambda name, *rest, **more: Tracer() if name.startswith("budgetvlm") else real(name)
    )
    put = trace.set_span_in_context
    monkeypatch.setattr(
        trace, "set_span_in_context", lambda span, *rest: span if isinstance(span, Span) else put(span, *rest)
    )
    with served(word_s=0.001) as server:
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        server.ask({**CHAT, "latency_budget_ms": 60_000}, headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
        until(lambda: made and made[0].end_time)
    request, *stages = made
    assert request.name == "POST /v1/chat/completions"
    assert trace.get_current_span(request.parent).get_span_context().trace_id == int(trace_id, 16)
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["budgetvlm.budget_met"] is True
    assert [stage.name for stage in stages] == ["queue", "vision", "decode"]
    assert all(stage.parent is request for stage in stages)
    assert [stage.end_time - stage.start for stage in stages[1:]] == [1_000_000, 2_000_000]


def test_nothing_is_recorded_without_opentelemetry(monkeypatch):
    monkeypatch.setattr(tracing, "AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with served(word_s=0.001) as server:
        assert server.chat()[0] == 200
